"""Replicas in a test: processes that form a group over gloo, each with the tiny model, and what they leave in files."""

import json
import logging
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from chaos_processes import Forked
from patience import PATIENCE, until
from stack_parts import transcripts

from worker.checkpoint import replay

KINDS: list[dict[str, Any]] = [
    {},
    {"rating": -1},
    {"rating": True},
    {"rejected": "I have no idea."},
    {},
    {"rating": -0.5},
    {"comment": "Say it in fewer words."},
    {"method": "distill"},
    {},
]
SIZES = (4, 2, 1, 5, 3)
"""Transcripts of the versions, in turn."""


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def feedback(count: int) -> list[dict[str, Any]]:
    """Transcripts of all kinds and of different lengths."""
    sent = [item | KINDS[i % len(KINDS)] for i, item in enumerate(transcripts("r", count))]
    for i, item in enumerate(sent):
        if i % 3 == 0:
            item["messages"][0]["content"] += " Please." * (40 * (i % 4))
    return sent


def built(model: Path, versions: int, max_length: int = 512) -> list[list[Any]]:
    """The examples of `versions` micro-batches."""
    from transformers import AutoTokenizer

    from producer.transcript import Transcript
    from worker.config.hyperparameters import Hyperparameters
    from worker.trainer.factory import make_builder

    h = Hyperparameters(lr=1e-3, max_length=max_length)
    sizes = [SIZES[i % len(SIZES)] for i in range(versions)]
    builder = make_builder(AutoTokenizer.from_pretrained(model), model, h)
    every = iter([builder.build(Transcript.from_dict(one), one["id"]) for one in feedback(sum(sizes))])
    return [[next(every) for _ in range(size)] for size in sizes]


def trainer_of(model: Path, way: str, dtype: str = "bfloat16") -> Any:
    """A trainer on weights of its own."""
    from worker.checkpoint import model_directory
    from worker.checkpoint.replay import make_deterministic
    from worker.config.hyperparameters import Hyperparameters
    from worker.trainer.factory import make_trainer

    make_deterministic(torch.device("cpu"))
    loaded, tokenizer = model_directory.load(model, getattr(torch, dtype))
    h = Hyperparameters(lr=1e-3, max_length=512)
    return make_trainer(loaded, loaded.named_parameters(), tokenizer, h, state=None, way=way)


def train(trainer: Any, batches: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """A version of each batch; what was found, and a digest of weights and state after each."""
    said = []
    for batch in batches:
        found = trainer.begin(batch)
        norm = trainer.gradient_norm()
        trainer.prepare()
        trainer.apply()
        said.append({"loss": found.loss, "nll": found.nll, "norm": norm, "digest": digest(trainer)})
    return said


def digest(trainer: Any) -> str:
    """Of all weights and the optimizer's state."""
    return replay.digest(dict(trainer.model.named_parameters()) | {"state": trainer.optimizer.area.memory})


def train_replica(number: int, count: int, port: int, model: str, way: str, versions: int, out: str) -> None:
    """In a process of its own: one replica of `count`; its `train` as JSON in `out`."""
    from worker.distributed.rendezvous import Address, Rendezvous
    from worker.trainer.sharing import Ranks
    from worker.utils import torch_setup

    torch_setup.prepare()
    torch.set_num_threads(1)
    batches, trainer = built(Path(model), versions), trainer_of(Path(model), way)
    meeting = Rendezvous(Address("127.0.0.1", port), number, count, seconds=120)
    if number == 0:
        meeting.open()
        group = meeting.form(range(1, count), 600, lambda hello: None)
    else:
        group = meeting.join({}, lambda: False)
    assert group is not None and group.size == count
    trainer.sharing = Ranks(group)
    failed = _fail_once(trainer, number == count - 1, batches[0]) if way == "burst" else ""
    said = train(trainer, batches)
    if failed:
        said[0]["failed"] = failed
    group.exchange({})  # nobody leaves before all are done
    group.close()
    Path(out).write_text(json.dumps(said))


def wait_for_a_command(number: int, count: int, port: int, out: str) -> None:
    """In a process of its own: the last replica ends, 0 closes the group, and who waits for a command says why."""
    from worker.distributed.errors import GroupLostError
    from worker.distributed.rendezvous import Address, Rendezvous

    meeting = Rendezvous(Address("127.0.0.1", port), number, count, seconds=120)
    if number == 0:
        meeting.open()
    group = meeting.form(range(1, count), PATIENCE, lambda hello: None) if number == 0 else meeting.join({}, bool)
    assert group is not None
    if number == count - 1:
        os._exit(0)
    try:
        if number == 0:
            group.gather({})
        else:
            group.gather({})
            for _ in group.called():
                pass
    except GroupLostError as error:
        Path(out).write_text(str(error))
    until(lambda: Path(out).parent.joinpath("done").exists(), "the test to be over")


def lead_and_be_stopped(port: int, out: str, forms: bool) -> None:
    """In a process of its own: replica 0 of 2, which is stopped; forms: when it has its group, or before."""
    from worker.distributed.rendezvous import Address, Rendezvous

    meeting = Rendezvous(Address("127.0.0.1", port), 0, 2, seconds=PATIENCE)
    meeting.open()
    Path(out).touch()
    if forms:
        group = meeting.form([1], PATIENCE, lambda hello: None)
        assert group is not None
        group.exchange({})
    os.kill(os.getpid(), signal.SIGSTOP)


def follow_until_told(port: int) -> None:
    """In a process of its own: replica 1 of 2, until SIGTERM; it says after a moment that replica 0 does not answer."""
    from worker.distributed import group as groups
    from worker.distributed import rendezvous
    from worker.distributed.rendezvous import Address, Rendezvous

    logging.basicConfig(level=logging.INFO)
    groups.SILENT_SECONDS = rendezvous.KNOCK_SECONDS = 0.5
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    found = Rendezvous(Address("127.0.0.1", port), 1, 2, seconds=PATIENCE).join({}, lambda: bool(told))
    if found is not None:
        found.exchange({})
        print("joined", flush=True)
        for _ in found.called():
            if told:
                break


def _fail_once(trainer: Any, ours: bool, batch: Sequence[Any]) -> str:
    """What `begin` raises when the forward pass fails at one replica: `ours`, or another."""
    forward = trainer._forward

    def broken(*arguments: Any, **more: Any) -> Any:
        raise MemoryError("no room for this part")

    if ours:
        trainer._forward = broken
    try:
        trainer.begin(batch)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        trainer._forward = forward
    return "nothing was raised"


def replicas(model: Path, folder: Path, count: int, way: str, versions: int) -> list[list[dict[str, Any]]]:
    """What each of `count` replicas said of `versions` versions."""
    port = free_port()
    outs = [folder / f"{way}-{number}.json" for number in range(count)]
    processes = [
        Forked(train_replica, (n, count, port, str(model), way, versions, str(out)), {}, folder / f"{way}-{n}.log")
        for n, out in enumerate(outs)
    ]
    for process in processes:
        assert process.ended() == 0, process.said()
    return [json.loads(out.read_text()) for out in outs]
