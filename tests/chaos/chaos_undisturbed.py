"""A run in which nothing is killed, and nothing rolled back: batches go into fresh weights by the trainer alone."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from chaos_history import PREFIX, ids_of, parts_of
from chaos_plan import transcript
from chaos_processes import LEARNING

from producer import Transcript
from worker.trainer.sharing import Alone, InTurn

EVERY = 16
"""Batches between two points that a run can go back to."""

Batches = tuple[tuple[str, ...], ...]


class Undisturbed:
    """The weights and the trainer of a fresh server, which it writes to without any protocol."""

    def __init__(self, session: Any) -> None:
        self.session, self.weights = session, session.weights
        self._done: Batches = ()
        self._kept: dict[Batches, list[torch.Tensor]] = {(): [t.clone() for t in self._memory()]}
        self._trainer = session.trainer

    def go_to(self, batches: Sequence[Sequence[str]]) -> None:
        """Train `batches`, from where the weights are, or from the last point before they part."""
        wanted = tuple(map(tuple, batches))
        if wanted[: len(self._done)] != self._done:
            self._go_back(max((kept for kept in self._kept if wanted[: len(kept)] == kept), key=len))
        for batch in wanted[len(self._done) :]:
            self._train(batch)
            self._done = (*self._done, batch)
            if len(self._done) % EVERY == 0 and self._done not in self._kept:
                self._kept[self._done] = [tensor.clone() for tensor in self._memory()]

    def _memory(self) -> list[torch.Tensor]:
        return [*self.weights.tensors.values(), self.weights.state]

    @torch.no_grad()
    def _go_back(self, done: Batches) -> None:
        for tensor, kept in zip(self._memory(), self._kept[done], strict=True):
            tensor.copy_(kept)
        self._done, self._trainer = done, self.session.manager.rebuilder.make_trainer(self.session.h)

    def _train(self, batch: tuple[str, ...]) -> None:
        ids, parts = ids_of(batch), parts_of(batch)
        if not ids:
            self._trainer.skip()
            return
        examples = []
        for id in ids:
            item = transcript(int(id.removeprefix(PREFIX)[1:]))
            examples.append(self.session.builder.build(Transcript.from_dict(item), item["id"]))
        self._trainer.sharing = InTurn(parts) if parts > 1 else Alone()
        gradients = self._trainer.begin(examples)
        assert not gradients.rejected
        self._trainer.apply()


@contextlib.contextmanager
def undisturbed(run_dir: Path) -> Iterator[Undisturbed]:
    """On the fresh server of `run_dir`."""
    from worker.config.hyperparameters import Hyperparameters
    from worker.orchestrator.session import open_session

    torch.set_num_threads(1)
    options = dict(zip(LEARNING[::2], LEARNING[1::2], strict=True))
    h = Hyperparameters(lr=float(options["--lr"]), max_length=int(options["--max-length"]))
    with open_session(run_dir, "undisturbed", h, state_dir=run_dir / "state") as session:
        yield Undisturbed(session)
