"""What it takes to train a journaled batch again and get the same weights: its order, its circumstances, its trainer.

Must not know: Redis, vLLM, sockets.
Invariants: a batch that is trained again goes through the same trainer as the first time, from the very tokens of the
first time; every random draw follows from the seed and the optimizer's step. On a CPU of the same kind, with the
threads and the torch of the record, the weights are the same bit for bit; `differences` names what is not as it was.
"""

import hashlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from worker.checkpoint.batch_codec import ReplayError, unpack_batch
from worker.checkpoint.records import UpdateRecord
from worker.config.hyperparameters import Hyperparameters
from worker.data.batch_capacity import BatchCapacity
from worker.memory.plan import Way
from worker.trainer.sharing import Alone, InTurn
from worker.trainer.trainer import Trainer
from worker.trainer.weighting import RULES, Rule

ALONE = {"ranks": 1}
"""What is not said of a trainer in one process."""
LATER = ("cpu",)
"""What the first journals do not say; nothing is known of it then."""
CPU_INFO = Path("/proc/cpuinfo")
KIND_OF_CPU = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
"""How `CPU_INFO` names it, on x86 and on ARM."""
ONEDNN_ISA = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables of oneDNN: the newest instructions that it uses."""


def facts(device: torch.device, ranks: int = 1) -> dict[str, Any]:
    """The circumstances that a bitwise repetition needs, as the journal keeps them. ranks: over how many processes the
    weights are divided."""
    return {
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        **({"cpu": _kind_of_cpu()} if device.type == "cpu" else {}),
        **({"ranks": ranks} if ranks > 1 else {}),
    }


def _kind_of_cpu() -> str:
    """Vendor, family and model of the first CPU, and what oneDNN may use of it: by these oneDNN and MKL choose kernels,
    which add up in orders of their own. Seen: an Intel of capability AVX512 does not repeat what others of it made."""
    first = CPU_INFO.read_text().split("\n\n")[0] if CPU_INFO.exists() else ""
    said = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in said.items()}
    parts = [found[name] for name in KIND_OF_CPU if name in found]
    return " ".join([*parts, *(f"up to {os.environ[name]}" for name in ONEDNN_ISA if name in os.environ)])


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed since the record, but for threads, which a replay sets as they were."""
    was, here = ALONE | dict(then), ALONE | dict(now)
    said = [name for name in here if name != "threads" and (name in was or name not in LATER)]
    names = [name for name in said if was.get(name) != here[name]]
    return [f"{name} was {was.get(name)} and is {here[name]}" for name in names]


def make_deterministic(device: torch.device) -> None:
    """Have torch choose algorithms that repeat, where that costs nothing: on a CPU."""
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Make = Callable[[Hyperparameters], Trainer]
"""Makes the trainer on the live weights; a new one takes over the step count from the state beside them."""

CapacityOf = Callable[[Hyperparameters], BatchCapacity]
"""What the trainer that `Make` makes of the same takes at once."""


def check_steps(records: Sequence[UpdateRecord], taken: int) -> None:
    """The optimizer's steps of `records` follow on each other, and on the `taken` ones of the weights that they start
    from. Raises `ReplayError`."""
    for expected, record in enumerate(records, taken):
        if record.step != expected:
            raise ReplayError(
                f"version {record.version} was step {record.step} of the optimizer, which would stand at {expected}:"
                " the journal and the checkpoint do not belong together. Put the state directory back as it was, from"
                " one backup; nothing was changed"
            )


def check_fits(records: Sequence[UpdateRecord], dropped: frozenset[str], room: CapacityOf) -> None:
    """Every batch of `records` is there, of a known format, and the trainer that would replay it takes it. Raises
    `ReplayError`.

    No trainer is made for it: that writes to the optimizer's state where it is fresh, and to what a live trainer's
    parameters learn. The error names the batch that needs the most: who does what it says is not refused again.
    """
    refused = []
    for record in records:
        rule_of(record)
        examples, ours = unpack_batch(record, dropped), replace(room(hyperparameters(record.h)), parts=record.parts)
        if ours.whole and ours.way == "streaming":  # one process streams one row: see `sharing_of`
            ours = replace(ours, parts=1)
        if not ours.holds(examples):
            in_burst = replace(ours, way="burst").holds(examples)
            refused.append((ours.needs(examples), record.version, ours, in_burst))
    if refused:
        needed, version, ours, _ = max(refused, key=lambda item: item[0])
        raise ReplayError(_misfit(needed, version, ours, burst=all(in_burst for *_, in_burst in refused)))


def _misfit(needed: int, version: int, room: BatchCapacity, *, burst: bool) -> str:
    """burst: that way would do."""
    batch = "its batch" if room.whole else "a sequence of its batch"
    single = f" ({room.way} takes one a version)" if room.whole else ""
    text = f"version {version} cannot be trained again as things are: {batch} has {needed} tokens, and a forward pass"
    text += f" here takes {room.longest} at most{single}; nothing was changed"
    if not room.packed:
        return f"{text}. Make it again on the kind of machine that trained it"
    return f"{text}. Use {'--apply burst, or ' if burst else ''}--max-tokens {needed}, if the GPU's memory allows it"


@dataclass(frozen=True)
class OtherLoss:
    """A batch that had another loss than the first time."""

    version: int
    now: float
    then: float


@dataclass(frozen=True)
class Replayed:
    """What was not as the first time. changed: circumstances, as `differences` has them."""

    changed: list[str] = field(default_factory=list)
    losses: list[OtherLoss] = field(default_factory=list)


def replay(
    records: Sequence[UpdateRecord],
    dropped: frozenset[str],
    make_trainer: Make,
    device: torch.device,
    trained: Callable[[], object] = lambda: None,
    ranks: int = 1,
) -> Replayed:
    """Train journaled batches again, in order, without the ids in `dropped`. trained: called after each. ranks: over
    how many processes the weights are divided.

    The weights and the optimizer's state must be those before the first of them, and `check_steps` and `check_fits`
    must have passed. Raises whatever training raises, with the weights between two versions.
    """
    changed = sorted({line for record in records for line in differences(record.facts, facts(device, ranks))})
    found = Replayed(changed)
    trainer, made_for = None, None
    for record in records:
        if trainer is None or record.h != made_for:
            trainer, made_for = make_trainer(hyperparameters(record.h)), record.h
        if trainer.optimizer.step_count != record.step:
            raise ReplayError(f"version {record.version}: the optimizer stands at {trainer.optimizer.step_count}")
        if not trainer.packed:  # the order of sums is each way's own; on a GPU it is memory that decides
            trainer.way = trained_way(record.manifest)
        trainer.sharing = sharing_of(record, trainer)
        examples = unpack_batch(record, dropped)
        with _threads(record.facts["threads"]):
            gradients = trainer.begin(examples, rule=rule_of(record)) if examples else None
            if gradients is None or not gradients.nll:
                trainer.skip()
            else:
                trainer.apply()
        whole = record.batch is not None and len(examples) == len(record.batch)
        then = record.manifest["loss"]
        if gradients is not None and whole and gradients.loss != then:
            found.losses.append(OtherLoss(record.version, gradients.loss, then))
        trained()
    return found


def sharing_of(record: UpdateRecord, trainer: Trainer) -> Alone:
    """How the batch is divided now: as it was, one part after the other. But streamed on a GPU it has to be one row,
    since there is no room for the sums of parts."""
    return InTurn(record.parts) if record.parts > 1 and not (trainer.packed and trainer.way == "streaming") else Alone()


def rule_of(record: UpdateRecord) -> Rule:
    """How weights counted when the record was written. Raises `ReplayError` for a format that is not known."""
    if record.format not in RULES:
        raise ReplayError(
            f"version {record.version} was journaled in format {record.format}, and this Tandem knows formats up to"
            f" {max(RULES)}: use the Tandem that wrote it, or a newer one"
        )
    return RULES[record.format]


def trained_way(manifest: Mapping[str, Any]) -> Way:
    """How a trainer goes the way of a version: hogwild is streaming to it, and those that name none were bursts."""
    named = manifest.get("way", "burst")
    return "burst" if named == "burst" else "factors" if named == "factors" else "streaming"


def hyperparameters(plain: Mapping[str, Any]) -> Hyperparameters:
    """From the journal; names that this version of Tandem does not have are an error."""
    try:
        return Hyperparameters(**plain)
    except TypeError as error:
        raise ReplayError(f"the journal's hyper-parameters are of another version of Tandem ({error})") from None


def plain_hyperparameters(h: Hyperparameters) -> dict[str, Any]:
    """For the journal."""
    return asdict(h)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Sixteen hex digits of all weights, in the order of their names: equal digests are equal weights, bit for bit.

    Reads every byte once (about a second a GB on a CPU); on CUDA they are copied to the host for it.
    """
    result = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        whole: Any = tensors[name].detach().cpu().contiguous()
        result.update(whole.reshape(-1).view(torch.uint8).numpy())
    return result.hexdigest()
