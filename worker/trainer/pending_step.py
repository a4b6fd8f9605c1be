"""What the backward passes of one micro-batch leave until the optimizer has applied it, by its way.

    pending.way = "burst"
    with pending.recording():
        pending.keep(loss)             # after each forward pass
        pending.part_done(sharing)     # after each part
    pending.add_up(sharing)
    pending.norm()                     # what may refuse the micro-batch; None in streaming
    pending.apply(sharing)             # one step of the optimizer
    pending.forget()

Burst leaves all gradients in the parameters, and is one sweep of the optimizer. Factors leave what the gradients of
matrices are products of (`factor_sweep`). Streaming leaves the loss with its graph: its backward pass is in `apply`,
where every gradient is applied and freed as it comes. How the parts of several replicas become one, `sharing` says.

Must not know: Redis, vLLM, the header, versions.
Invariant: no weight changes outside `apply`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from worker.apollo import ApolloMini
from worker.memory.plan import Way
from worker.trainer.factor_sweep import FactorSweep
from worker.trainer.grad_norm import gradient_norm
from worker.trainer.sharing import Alone, InTurn, Ranks


class PendingStep:
    """Of `optimizer`'s parameters. sweep: over their factors. way: of the micro-batch."""

    def __init__(self, optimizer: ApolloMini, sweep: FactorSweep, way: Way) -> None:
        self.optimizer, self.sweep, self.way = optimizer, sweep, way
        self.step_scale = 1.0
        """What the optimizer's step is multiplied with."""
        self._loss: torch.Tensor | None = None  # streaming: of the whole micro-batch, its graph alive

    def parameters(self) -> list[torch.Tensor]:
        """All that the optimizer may change."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around forward and backward. By factors, the buffer is taken first, and both keep factors."""
        if self.way != "factors":
            yield
            return
        self.sweep.reserve()
        with self.sweep.factors.recording():
            yield

    def dropping(self) -> AbstractContextManager[None]:
        """In streaming: gradients are held back as when they are applied, and dropped."""
        return self.optimizer.dropping() if self.way == "streaming" else nullcontext()

    def keep(self, loss: torch.Tensor) -> bool:
        """Of one forward pass: its gradients, or in streaming its graph. Whether its backward pass has run."""
        if self.way == "streaming":
            self._loss = loss if self._loss is None else self._loss + loss
            return False
        self.sweep.factors.begin_pass()
        loss.backward()  # type: ignore[no-untyped-call]
        return True

    def part_done(self, sharing: Alone) -> None:
        """A part that is made in turn has gradients of its own, in streaming too: they are added up outside the graph,
        as those of several replicas are."""
        if isinstance(sharing, InTurn) and self._loss is not None:
            self._loss.backward()  # type: ignore[no-untyped-call]
            self._loss = None
        sharing.part_done(self.parameters())

    def add_up(self, sharing: Alone) -> None:
        """Before anything is decided by them: gradients are those of the whole micro-batch. In streaming they come,
        and are added up, while they are applied."""
        if self.way != "streaming" or isinstance(sharing, InTurn):
            factors = self.sweep.factors if self.way == "factors" else None
            sharing.all_done(self.parameters(), factors)

    def norm(self) -> float | None:
        """The L2 norm of all gradients together; None in streaming, where it is not known yet.

        By factors, raises `NonFiniteGradientError`, with nothing written: `apply` could only find it half-way.
        """
        if self.way == "factors":
            return self.sweep.norm()
        return gradient_norm(self.parameters(), self.optimizer) if self.way == "burst" else None

    def prepare(self) -> None:
        """Do ahead what `apply` would do first."""
        self.optimizer.prepare()
        if self.way == "factors":
            self.sweep.prepare()

    def apply(self, sharing: Alone) -> None:
        """One step of the optimizer. Burst changes nothing if a gradient is not finite; whatever the other ways raise
        leaves weights half-written."""
        if self.way == "streaming" and not isinstance(sharing, InTurn):  # whose gradients are there
            self._stream(sharing)
        elif self.way == "factors":
            self.sweep.apply(self.step_scale)
        else:
            self.optimizer.step(step_scale=self.step_scale)

    def _stream(self, sharing: Alone) -> None:
        loss, self._loss = self._loss, None  # the graph is freed on the way
        if isinstance(sharing, Ranks):
            sharing.stream(loss, self.optimizer, self.parameters(), self.step_scale)
            return
        assert loss is not None, "apply() without begin()"
        with self.optimizer.streaming(step_scale=self.step_scale):
            loss.backward()  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Let go of everything: nothing is applied."""
        self._loss, self.step_scale = None, 1.0
        self.sweep.forget()
        self.optimizer.zero_grad(set_to_none=True)
