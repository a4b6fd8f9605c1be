"""Runs every shape once before traffic, so that no kernel is compiled or tuned while a server waits for it.

    warm_up(trainer, tell)   # tell(done, all, what): for a progress bar
    warm_up(trainer, tell, replayed=(512,))   # and makes CUDA graphs of rows of these sizes

Must not know: the server.
Invariants: no weight and no state of the optimizer changes, not even for a moment: gradients are dropped as they come,
and the optimizer's kernels are compiled on tensors of their own.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

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


def warm_up(
    trainer: Trainer,
    tell: Tell = lambda done, all, what: None,
    replayed: Sequence[int] = (),
    lent: int = 0,
    within_longest: Sequence[int] = (),
) -> WarmUp:
    """Forward and backward of every row length, largest first (out of memory shows at once), then the optimizer; then,
    when all that others keep is allocated, graphs of the rows of `replayed` tokens. The longest row runs twice: first
    with a teacher, whose kernels are those of every length, then without one, which says what a token takes. lent:
    bytes of the graphs' memory that the longest row uses from then on, and already the second time, when it is watched:
    raises `LentMemoryError` where what stands there does not stay. within_longest: shorter rows that take no more
    memory than the longest one. They run for their kernels alone, of which every kind of layer has its own: a few
    layers do, but by factors, which are wanted of all."""
    longest, *shorter = sorted(trainer.sizes, reverse=True)
    work: list[tuple[str, Callable[[], object]]] = [(f"{longest} tokens", partial(_run, trainer, longest, taught=True))]
    launched = [size for size in shorter if size not in replayed]
    few = {size for size in launched if size in within_longest and trainer.room.way_of_row(size) != "factors"}
    work += [(f"{size} tokens", partial(_run, trainer, size, few_layers=size in few)) for size in launched]
    work.append(("optimizer", trainer.warm_optimizer))
    if replayed:
        work.append(("graphs", partial(trainer.capture, *replayed)))
    work += [(f"replay of {size} tokens", partial(_run, trainer, size)) for size in sorted(replayed, reverse=True)]
    if lent:
        work.append(("lending", partial(trainer.rows.lend, trainer.model, lent)))
    work.append(("again", partial(_run_watched, trainer, longest)))
    seconds = {}
    for done, (what, run) in enumerate(work):
        tell(done, len(work), what)
        seconds[what] = _timed(trainer, run)
    trainer.device_time.learn(longest, seconds["again"])
    tell(len(work), len(work), "ready")
    return WarmUp(seconds)


def _timed(trainer: Trainer, work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.monotonic() - started


def _run_watched(trainer: Trainer, size: int) -> None:
    with trainer.rows.watched():
        _run(trainer, size)


def _run(trainer: Trainer, size: int, taught: bool = False, few_layers: bool = False) -> None:
    """One forward and backward over a row of `size` tokens: two sequences, every token trained. taught: with a pass of
    their teacher over the same row before it."""
    cut = size // 3
    words = trainer.head.words
    ids = tuple((7 * i + 1) % words for i in range(size))
    mask = (False,) + (True,) * (size - 1)
    sequences = (TokenSequence(ids[:cut], mask[:cut]), TokenSequence(ids[cut:], mask[: size - cut]))
    plain = Example("warm-up", sequences, 1.0, {})
    row = [replace(plain, kind="comment", teachers=sequences) if taught else plain]
    trainer.dry_run(row, few_layers)
