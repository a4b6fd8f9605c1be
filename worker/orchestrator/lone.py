"""What a worker says to other replicas at each step of a version, where there are none: nothing.

Invariant: a worker alone does what it did before there were replicas, and in the same time.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from worker.checkpoint.batch_codec import Ready
from worker.config.protocol import Update
from worker.orchestrator.applying import NOBODY, Others
from worker.trainer.outliers import Guards
from worker.versions.replica_status import Members

T = TypeVar("T")


class Lone:
    """A worker without replicas: everything is said to nobody."""

    parts = 1
    members = Members()
    others: Others = NOBODY

    def heed(self, stopping: Callable[[], bool]) -> None:
        """Nobody is waited for any more once `stopping()`."""

    def attempt(self, work: Callable[[], T]) -> T:
        """`work()`, which makes a version."""
        return work()

    def begin(self, batch: Sequence[Ready], guards: Guards | None) -> None:
        """All begin with the gradients of `batch`."""

    def agreed(self) -> None:
        """All have done what they were told. Raises `GroupLostError`."""

    def journal(self, update: Update) -> None:
        """All journal `update`."""

    def apply(self) -> None:
        """All apply it: with `others`, at each border of it."""

    def roll(self) -> None:
        """It is live here, and our server serves it: where pauses are rolled, the others apply it now."""

    def after(self, update: Update) -> None:
        """It is live everywhere."""

    def compared(self) -> None:
        """All have the same weights; who has not, is told so and brought to ours."""

    def checkpoint(self) -> None:
        """Ours is due: so are theirs."""

    def look(self) -> None:
        """Between two versions."""

    def changed(self) -> None:
        """Our weights were made again: the others get them."""

    def end(self) -> None:
        """The worker ends as it should: so do the others."""
