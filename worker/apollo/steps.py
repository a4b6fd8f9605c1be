"""The life of a step: opened, then finished or abandoned, and counted; who is told that one was refused.

What a step computes is the backend's. Must not know: Redis, vLLM, transformers.
Invariants: at most one step is open. The state area's count is the truth: on CUDA a step is counted when it is
launched, and whoever is told that it was refused finds the area's count again.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from worker.apollo.errors import ApolloError, NonFiniteGradientError
from worker.apollo.parameters import Backend, LastUpdate, Slot, Totals
from worker.apollo.state_layout import StateArea

T = TypeVar("T")
Pairs = Sequence[tuple[Slot, Tensor]]
"""(slot, gradient of its whole parameter)"""


class Steps:
    """Of one optimizer. projection_gap: steps between redraws of P."""

    def __init__(self, backend: Backend, area: StateArea, projection_gap: int) -> None:
        self.last_update = LastUpdate(lambda: Totals(0.0, 0.0, 0))
        self.area = area
        self.resume(backend, projection_gap)

    def resume(self, backend: Backend, projection_gap: int) -> None:
        """Go on from what the state area holds now; no step is open."""
        self.backend, self.projection_gap = backend, projection_gap
        self.count = int(self.area.step_count)
        self._open = False

    def prepare(self, step_scale: float = 1.0) -> None:
        """The host's part of the next step."""
        _check_scale(step_scale)
        self.told(lambda: self.backend.prepare(self.count // self.projection_gap, step_scale))

    def begin(self, step_scale: float = 1.0) -> None:
        """Open a step. Raises `ApolloError` for a scale that makes no sense, or if one is open."""
        _check_scale(step_scale)
        if self._open:
            raise ApolloError("the optimizer's previous step was neither finished nor abandoned")
        self.told(lambda: self.backend.begin(self.count // self.projection_gap, step_scale))
        self._open = True

    def update(self, pairs: Pairs) -> None:
        """A part of the open step."""
        if not self._open:
            raise ApolloError("update() outside begin() and finish()")
        self.backend.update(pairs)

    def decide_products(self, prepared: Any) -> None:
        """The first part of the open step, for matrices whose gradients are products."""
        if not self._open:
            raise ApolloError("decide_products() outside begin() and finish()")
        self.backend.decide_products(prepared)

    def write(self, pairs: Pairs) -> None:
        """A further part of it: those matrices' gradients."""
        if not self._open:
            raise ApolloError("write() outside begin() and finish()")
        self.backend.write(pairs)

    def finish(self) -> None:
        """Close it: the count goes up by one."""
        if not self._open:
            raise ApolloError("finish() without begin()")
        self.backend.finish()
        self._open = False
        self._taken()

    def abandon(self) -> None:
        """Close it where it failed: the count stays, and so does what was applied."""
        self._open = False

    @contextmanager
    def one(self, step_scale: float) -> Iterator[None]:
        """A step, finished at the end, or abandoned if anything is raised inside."""
        self.begin(step_scale)
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        self.finish()

    def capture(self, pairs: Pairs) -> Callable[..., None]:
        """A step over these gradients as one CUDA graph: calling the result, with its `step_scale`, replays it."""
        replay = self.backend.capture(pairs)

        def step(step_scale: float = 1.0) -> None:
            self.prepare(step_scale)
            replay()
            self._taken()

        return step

    def told(self, ask: Callable[[], T]) -> T:
        """`ask()`, which may report a refused step: then the steps launched are not the steps taken."""
        try:
            return ask()
        except NonFiniteGradientError:
            self.count = int(self.area.step_count)
            raise

    def _taken(self) -> None:
        self.count += 1
        self.last_update = LastUpdate(lambda: self.told(self.backend.totals))


def _check_scale(step_scale: float) -> None:
    if not 0 <= step_scale < math.inf:
        raise ApolloError(f"step_scale multiplies the step: it is 0 or more and finite, not {step_scale}")
