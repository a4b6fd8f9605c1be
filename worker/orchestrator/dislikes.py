"""What dislikes have cost: they say what not to answer and nothing else, so many of them can drive a model into noise.

    guard = DislikeGuard(examples, lambda: trainer, bound=0.3)
    guard.relearn(manifests)                     # at start, and after a rollback: those of the live version's ancestry
    refused = guard.refusals(version, batch)     # before a step on the weights of `version`: id -> why not
    manifest |= guard.after(version, share)      # after it: share of the step that dislikes have

What the weights expect at each word of a small set of conversations (`reference_set`, or the canary's) is noted before
the first version with dislikes. Before and after each of them, the divergence from that is measured: KL(then | now). By
how much it rose counts against dislikes, by their share of the step; by how much it fell, for them, also if something
else brought it down between them. Over the bound, dislikes are refused, and all else is trained. A loss of these
conversations would not do: it can stay where it is while the model's own answers go.

Must not know: torch, Redis.
Invariants: the account follows from the manifests, so a restart goes on with it (the divergence is then measured from
the weights at the restart); a version without dislikes costs nothing; what other kinds of feedback move counts against
nobody here (the canary set judges that).
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from producer.errors import TandemError
from worker.data.examples import Example

MOVED = "dislikes_moved"
"""Of a manifest: the account after that version, in nats a token."""

T = TypeVar("T")


class Weights(Protocol[T]):
    """What measures: `Trainer`."""

    def expectations(self, examples: Sequence[Example]) -> T:
        """What the present weights expect."""

    def drift(self, examples: Sequence[Example], then: T) -> dict[str, float]:
        """How far they are from that, by example id, in nats a trained token."""


class DislikeGuard(Generic[T]):
    """bound: by how much dislikes may have moved what is expected, in nats a trained token, over the whole set.

    weights: the live ones' trainer, whichever it is then.
    """

    def __init__(self, examples: Sequence[Example], weights: Callable[[], Weights[T]], bound: float) -> None:
        if not bound > 0:
            raise TandemError("--dislikes-bound must be above 0")
        if not examples:
            raise TandemError("no reference conversation fits --max-length: raise it, or use --dislikes-bound 0")
        self.examples, self.weights, self.bound = list(examples), weights, bound
        self.relearn([])

    def relearn(self, manifests: Iterable[Mapping[str, Any]]) -> None:
        """Take the account from these, oldest first."""
        self.moved = 0.0
        self._then: T | None = None  # what was expected when measuring began
        self._last: float | None = None  # how far from it, after the last version with dislikes
        self._known: tuple[int, float] | None = None  # a version, and how far it is
        for manifest in manifests:
            moved = _number(manifest.get(MOVED))
            self.moved = moved if moved is not None else self.moved

    def refusals(self, version: int, batch: Sequence[Example]) -> dict[str, str]:
        """Who of `batch` must not be trained on the live `version`, and why."""
        disliked = [one.id for one in batch if one.kind == "disliked"]
        if not disliked:
            return {}
        now = self._far(version)
        if self._last is not None and now < self._last:  # something else brought it down
            self.moved, self._last = max(0.0, self.moved - (self._last - now)), now
        if math.isfinite(now) and self.moved < self.bound:
            return {}
        return dict.fromkeys(disliked, self._reason(now))

    def after(self, version: int, share: float) -> dict[str, float]:
        """What the manifest of the new live `version` must keep. share: of its step, from 0 to 1, that dislikes have;
        0: it had none, and nothing is scored."""
        if share > 0:
            before = self._far(version - 1)
            self._last = self._far(version)
            self.moved = max(0.0, self.moved + share * (self._last - before))
            return {MOVED: self.moved}
        return {MOVED: self.moved} if self.moved else {}

    def _reason(self, now: float) -> str:
        if not math.isfinite(now):
            return "the reference conversations have no finite loss any more: go back to an earlier version"
        return (
            f"disliked answers have moved what the model expects in {len(self.examples)} reference conversations by"
            f" {self.moved:.3f} nats a token (KL), and the bound is {self.bound:g}: more of them would make every"
            " answer worse. Say what to answer instead (a correction, or liked answers), or roll back; then requeue it"
            " (--dislikes-bound 0 trains anything)"
        )

    def _far(self, version: int) -> float:
        """How far the live weights, which are those of `version`, are from what was expected when measuring began."""
        if self._then is None:
            self._then = self.weights().expectations(self.examples)
        if self._known is None or self._known[0] != version:
            found = self.weights().drift(self.examples, self._then)
            tokens = sum(example.trained_tokens for example in self.examples)
            self._known = version, sum(found[one.id] * one.trained_tokens for one in self.examples) / tokens
        return self._known[1]


def _number(value: Any) -> float | None:
    """As the journal has it, or as the text that Redis keeps."""
    try:
        return None if value is None else float(json.loads(value) if isinstance(value, str | bytes) else value)
    except (TypeError, ValueError):
        return None
