"""Runs every shape once before traffic, so that no kernel is compiled or tuned while a server waits for it.

    warm_up(trainer, tell)   # tell(done, all, what): for a progress bar

Must not know: the server.
Invariants: no weight and no state of the optimizer changes, not even for a moment: gradients are dropped as they come,
and the optimizer's kernels are compiled on tensors of their own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from worker.data.examples import Example, TokenSequence
from worker.trainer.trainer import Trainer

Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class WarmUp:
    """What it cost: seconds by what was run, in order."""

    seconds: dict[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in self.seconds.items())
        return f"warm-up took {sum(self.seconds.values()):.1f} s ({parts})"


def warm_up(trainer: Trainer, tell: Tell = lambda done, all, what: None) -> WarmUp:
    """Forward and backward of every row length, largest first (out of memory shows at once), then the optimizer."""
    work = [(f"{size} tokens", size) for size in sorted(trainer.sizes, reverse=True)]
    seconds = {}
    for done, (what, size) in enumerate(work):
        tell(done, len(work) + 1, what)
        seconds[what] = _timed(trainer, lambda size=size: _run(trainer, size))  # type: ignore[misc]
    tell(len(work), len(work) + 1, "optimizer")
    seconds["optimizer"] = _timed(trainer, trainer.optimizer.warm_up)
    tell(len(work) + 1, len(work) + 1, "ready")
    return WarmUp(seconds)


def _timed(trainer: Trainer, work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.monotonic() - started


def _run(trainer: Trainer, size: int) -> None:
    """One forward and backward over a row of `size` tokens: two sequences, every token trained."""
    cut = size // 3
    words = trainer.head.weight.shape[0]
    ids = tuple((7 * i + 1) % words for i in range(size))
    mask = (False,) + (True,) * (size - 1)
    sequences = (TokenSequence(ids[:cut], mask[:cut]), TokenSequence(ids[cut:], mask[: size - cut]))
    trainer.dry_run([Example("warm-up", sequences, 1.0, {})])
