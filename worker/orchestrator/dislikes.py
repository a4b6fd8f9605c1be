"""What dislikes have cost: they say what not to answer and nothing else, so many of them can drive a model into noise.

    guard = DislikeGuard(examples, trainer.score, bound=0.3)
    guard.relearn(manifests)                     # at start, and after a rollback: those of the live version's ancestry
    refused = guard.refusals(version, batch)     # before a step on the weights of `version`: id -> why not
    manifest |= guard.after(version, share)      # after it: share of the step that dislikes have

A small set of conversations (`reference_set`, or the canary's) is scored before and after every version with dislikes.
By how much their loss rose counts against dislikes, by their share of the step; by how much it fell, for them, also if
something else brought it down between them. Over the bound, dislikes are refused, and all else is trained.

Must not know: torch, Redis.
Invariants: the account follows from the manifests alone, so a restart changes nothing; a version without dislikes costs
nothing; what other kinds of feedback raise counts against nobody here (the canary set judges that).
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from producer.errors import TandemError
from worker.data.examples import Example

RAISED, LOSS = "dislikes_raised", "reference_loss"
"""Of a manifest: the account after that version, in nats a token; and the set's loss then, where it was scored."""

Score = Callable[[Sequence[Example]], dict[str, float]]
"""Mean loss by example id, without gradients: `Trainer.score`."""


class DislikeGuard:
    """bound: by how much dislikes may have raised the set's loss, in nats a trained token, over the whole set."""

    def __init__(self, examples: Sequence[Example], score: Score, bound: float) -> None:
        if not bound > 0:
            raise TandemError("--dislikes-bound must be above 0")
        if not examples:
            raise TandemError("no reference conversation fits --max-length: raise it, or use --dislikes-bound 0")
        self.examples, self.score, self.bound = list(examples), score, bound
        self.raised = 0.0
        self.last: float | None = None
        """The set's loss after the last version with dislikes."""
        self._known: tuple[int, float] | None = None  # a version, and its loss

    def relearn(self, manifests: Iterable[Mapping[str, Any]]) -> None:
        """Take the account from these, oldest first."""
        self.raised, self.last, self._known = 0.0, None, None
        for manifest in manifests:
            raised, loss = _number(manifest.get(RAISED)), _number(manifest.get(LOSS))
            self.raised = raised if raised is not None else self.raised
            self.last = loss if loss is not None else self.last

    def refusals(self, version: int, batch: Sequence[Example]) -> dict[str, str]:
        """Who of `batch` must not be trained on the live `version`, and why."""
        disliked = [one.id for one in batch if one.kind == "disliked"]
        if not disliked:
            return {}
        now = self._loss(version)
        if self.last is not None and now < self.last:  # something else brought it down
            self.raised, self.last = max(0.0, self.raised - (self.last - now)), now
        if math.isfinite(now) and self.raised < self.bound:
            return {}
        return dict.fromkeys(disliked, self._reason(now))

    def after(self, version: int, share: float) -> dict[str, float]:
        """What the manifest of the new live `version` must keep. share: of its step, from 0 to 1, that dislikes have;
        0: it had none, and nothing is scored."""
        if share > 0:
            before = self._loss(version - 1)
            self.last = self._loss(version)
            self.raised = max(0.0, self.raised + share * (self.last - before))
            return {RAISED: self.raised, LOSS: self.last}
        return {RAISED: self.raised} if self.raised else {}

    def _reason(self, now: float) -> str:
        if not math.isfinite(now):
            return "the reference conversations have no finite loss any more: go back to an earlier version"
        many = len(self.examples)
        return (
            f"disliked answers have raised the loss of {many} reference conversations by {self.raised:.3f} nats a"
            f" token, and the bound is {self.bound:g}: more of them would make every answer worse. Say what to answer"
            " instead (a correction, or liked answers, which bring it down), or roll back; then requeue it"
            " (--dislikes-bound 0 trains anything)"
        )

    def _loss(self, version: int) -> float:
        """Of the set, under the live weights, which are those of `version`."""
        if self._known is None or self._known[0] != version:
            losses = self.score(self.examples)
            tokens = sum(example.trained_tokens for example in self.examples)
            total = sum(losses[example.id] * example.trained_tokens for example in self.examples)
            self._known = version, total / tokens
        return self._known[1]


def _number(value: Any) -> float | None:
    """As the journal has it, or as the text that Redis keeps."""
    try:
        return None if value is None else float(json.loads(value) if isinstance(value, str | bytes) else value)
    except (TypeError, ValueError):
        return None
