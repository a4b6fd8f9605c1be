"""What it takes to train a journaled batch again and get the same weights: its tokens, its order, its circumstances.

Must not know: Redis, vLLM, sockets, where records are kept.
Invariants: a batch that is trained again goes through the same trainer as the first time, from the very tokens of the
first time; every random draw follows from the seed and the optimizer's step. On a CPU, with the threads and the torch
of the record, the weights are the same bit for bit; `differences` names what is not as it was.
"""

import dataclasses
import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers

from producer.errors import TandemError
from producer.transcript import Transcript
from worker.config.hyperparameters import Hyperparameters
from worker.data.batch_capacity import Room
from worker.data.examples import Example, TokenSequence
from worker.data.replay_buffer import PREFIX
from worker.trainer.trainer import Gradients, Trainer

BURST = "burst"
"""The way of a manifest that names none."""


class ReplayError(TandemError):
    """A journaled batch cannot be trained again."""


@dataclass(frozen=True)
class Ready:
    """A transcript that is ready to train: what the drain holds, and what the journal keeps."""

    example: Example
    transcript: dict[str, Any]

    @property
    def id(self) -> str:
        return self.example.id

    @property
    def tokens(self) -> int:
        return self.example.tokens


def rename(ready: Ready, id: str) -> Ready:
    """The same under another id: a rehearsed transcript."""
    return Ready(dataclasses.replace(ready.example, id=id), ready.transcript)


def unpack_ready(record: Mapping[str, Any], dropped: frozenset[str]) -> list[Ready]:
    """As `unpack_batch`, with the transcripts."""
    texts = {item["id"]: item["transcript"] for item in record["batch"] or []}
    return [Ready(example, texts[example.id]) for example in unpack_batch(record, dropped)]


def make_ready(transcript: Transcript, example: Example) -> Ready:
    """Pair an example with the plain map it came from (without the application's own meta)."""
    return Ready(example, transcript.to_dict(meta=False))


def pack_batch(ready: Iterable[Ready]) -> list[dict[str, Any]]:
    """The batch as it goes into the journal: transcripts, and their tokens and masks as bytes, in order."""
    return [
        {
            "id": item.id,
            "transcript": item.transcript,
            "weight": item.example.weight,
            "sequences": [
                [np.asarray(s.ids, "<u4").tobytes(), np.packbits(np.asarray(s.mask, bool)).tobytes()]
                for s in item.example.sequences
            ],
        }
        for item in ready
    ]


def unpack_batch(record: Mapping[str, Any], dropped: frozenset[str]) -> list[Example]:
    """The examples of a journaled batch, without those of `dropped`. Raises `ReplayError`."""
    if record["batch"] is None:
        raise ReplayError(
            f"version {record['version']} cannot be trained again: its transcripts have expired (--keep-transcripts)"
        )
    return [
        Example(item["id"], tuple(_sequence(*s) for s in item["sequences"]), item["weight"], {})
        for item in record["batch"]
        if item["id"].removeprefix(PREFIX) not in dropped
    ]


def _sequence(ids: bytes, mask: bytes) -> TokenSequence:
    tokens = np.frombuffer(ids, "<u4")
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(tokens))
    return TokenSequence(tuple(tokens.tolist()), tuple(bits.astype(bool).tolist()))


def facts(device: torch.device) -> dict[str, Any]:
    """The circumstances that a bitwise repetition needs, as the journal keeps them."""
    return {
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed since the record, but for threads, which a replay sets as they were."""
    names = [name for name in now if name != "threads" and then.get(name) != now[name]]
    return [f"{name} was {then.get(name)} and is {now[name]}" for name in names]


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

RoomOf = Callable[[Hyperparameters], Room]
"""What the trainer that `Make` makes of the same takes at once."""

Steps = Sequence[tuple[dict[str, Any], frozenset[str]]]
"""Journaled batches to train again, in order: (record, ids to leave out)."""


def check_fits(steps: Steps, room: RoomOf) -> None:
    """Every batch of `steps` is there, and the trainer that would replay it takes it. Raises `ReplayError`.

    No trainer is made for it: that writes to the optimizer's state where it is fresh, and to what a live trainer's
    parameters learn. The error names the batch that needs the most: who does what it says is not refused again.
    """
    refused = []
    for record, dropped in steps:
        examples, ours = unpack_batch(record, dropped), room(hyperparameters(record["h"]))
        if not ours.holds(examples):
            in_burst = replace(ours, streaming=False).holds(examples)
            refused.append((ours.needs(examples), record["version"], ours, in_burst))
    if refused:
        needed, version, ours, _ = max(refused, key=lambda item: item[0])
        raise ReplayError(_misfit(needed, version, ours, burst=all(in_burst for *_, in_burst in refused)))


def _misfit(needed: int, version: int, room: Room, *, burst: bool) -> str:
    """burst: that way would do."""
    batch = "its batch" if room.whole else "a sequence of its batch"
    streaming = " (streaming takes one a version)" if room.whole else ""
    text = f"version {version} cannot be trained again as things are: {batch} has {needed} tokens, and a forward pass"
    text += f" here takes {room.longest} at most{streaming}; nothing was changed"
    if not room.packed:
        return f"{text}. Make it again on the kind of machine that trained it"
    return f"{text}. Use {'--apply burst, or ' if burst else ''}--max-tokens {needed}, if the GPU's memory allows it"


def replay(steps: Steps, make_trainer: Make, device: torch.device) -> list[str]:
    """Train journaled batches again, in order; says what was not as the first time.

    The weights and the optimizer's state must be those before the first of them, and `check_fits` must have passed.
    Raises whatever training raises, with the weights between two versions.
    """
    said: list[str] = []
    changed = sorted({line for record, _ in steps for line in differences(record["facts"], facts(device))})
    if changed:
        said.append(f"replay may not repeat every bit: {'; '.join(changed)}")
    trainer, made_for = None, None
    for record, dropped in steps:
        if trainer is None or record["h"] != made_for:
            trainer, made_for = make_trainer(hyperparameters(record["h"])), record["h"]
        if trainer.optimizer.step_count != record["step"]:
            raise ReplayError(
                f"version {record['version']} was step {record['step']} of the optimizer, which stands at"
                f" {trainer.optimizer.step_count}: the journal and the checkpoint do not belong together"
            )
        if not trainer.packed:  # the order of sums is each way's own; on a GPU it is memory that decides
            trainer.streaming = record["manifest"].get("way", BURST) != BURST
        examples = unpack_batch(record, dropped)
        with _threads(record["facts"]["threads"]):
            gradients = trainer.begin(examples) if examples else None
            if gradients is None or not gradients.nll:
                trainer.skip()
            else:
                trainer.apply()
        if gradients is not None and len(examples) == len(record["batch"]) and not dropped:
            said += _compare(record, gradients)
    return said


def hyperparameters(plain: Mapping[str, Any]) -> Hyperparameters:
    """From the journal; names that this version of Tandem does not have are an error."""
    try:
        return Hyperparameters(**plain)
    except TypeError as error:
        raise ReplayError(f"the journal's hyper-parameters are of another version of Tandem ({error})") from None


def plain_hyperparameters(h: Hyperparameters) -> dict[str, Any]:
    """For the journal."""
    return asdict(h)


def _compare(record: Mapping[str, Any], gradients: Gradients) -> list[str]:
    then = record["manifest"]["loss"]
    if gradients.loss == then:
        return []
    return [f"version {record['version']} was repeated with loss {gradients.loss!r}, not {then!r}"]


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Sixteen hex digits of all weights, in the order of their names: equal digests are equal weights, bit for bit.

    Reads every byte once (about a second a GB on a CPU); on CUDA they are copied to the host for it.
    """
    result = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        whole: Any = tensors[name].detach().cpu().contiguous()
        result.update(whole.reshape(-1).view(torch.uint8).numpy())
    return result.hexdigest()
