"""Guards by kind of feedback: what is broken is not trained but set aside, for a person to see; what is surprising is.

    guards = Guards(k=8.0, words=len(vocabulary))
    guards.remember(manifests)                  # at start: earlier versions, oldest first
    trainer.begin(examples, guards)          # refuses above guards.loss_limit(), before backward
    reason = guards.norm_refusal(norm, tokens, loss)  # burst only: None, or why this batch must not be applied
    manifest |= guards.measures(nll, norm)      # before it is journaled
    guards.remember([manifest])                 # the version is live

An answer to imitate is broken when its loss lies far above the recent ones and above that of a guess: a new fact may
cost any number of nats below it, and that is what there is to learn. The gradient of a batch is broken when its norm
lies far above the recent ones, and its loss does not explain it. A comment is broken when the model, shown it, would
say something else at nearly every word.

Must not know: torch, Redis.
Invariants: nothing is refused before `minimum` values are known; what was refused never enters the history, so that a
flood of outliers cannot make itself normal; the history follows from the manifests alone, so a restart changes nothing.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from producer.errors import TandemError
from producer.feedback import Kind
from worker.trainer.losses import Answers, has_teacher

LOSSES, NORM, TOKENS = "losses", "gradient_norm", "effective_tokens"
"""What a manifest keeps for the next start: each transcript's loss in nats a token, the L2 norm of the gradient of the
weighted mean, and how many tokens of equal weight average as much noise away."""
SPREAD = 0.05
"""The least spread, as a part of the median: a history of equal values must not refuse the first that differs."""
MOST_MOVED = 0.9
"""The most of the probability that a teacher may want elsewhere, as a mean over the answer."""


class GradientOutlierError(TandemError):
    """The gradient of a whole batch is too large; nothing was written. Bisection tries its halves."""


class History:
    """The last `window` values, and the bound that follows: median + k * 1.4826 * MAD (a normal spread's sigma)."""

    def __init__(self, *, k: float, minimum: int, window: int) -> None:
        self.k, self.minimum = k, minimum
        self.values: deque[float] = deque(maxlen=window)

    def add(self, values: Iterable[float]) -> None:
        """Remember finite values."""
        self.values.extend(value for value in values if math.isfinite(value))

    def bound(self) -> float:
        """The largest value that is no outlier; infinite while too few are known, or with k = 0."""
        if not self.k or len(self.values) < self.minimum:
            return math.inf
        median = statistics.median(self.values)
        deviation = statistics.median(abs(value - median) for value in self.values)
        return median + self.k * max(1.4826 * deviation, SPREAD * abs(median))


class Guards:
    """Loss outliers one transcript at a time, gradient outliers one batch at a time.

    k: how many robust standard deviations above the median are too many; 0 refuses nothing. minimum: transcripts
    (losses) and versions (norms, a quarter of it) that must be known first. window: transcripts remembered. words: of
    the vocabulary; log(words) nats a token is what guessing costs, and no answer below it is an outlier.
    """

    def __init__(self, k: float = 8.0, *, minimum: int = 64, window: int = 1024, words: int = 1) -> None:
        if k < 0 or minimum < 4 or window < minimum:
            raise TandemError("outliers: k must be at least 0, minimum at least 4, window at least minimum")
        self.losses = History(k=k, minimum=minimum, window=window)
        self.norms = History(k=k, minimum=minimum // 4, window=window // 4)
        self.k, self.guess = k, math.log(words)
        self.tokens: deque[float] = deque(maxlen=window // 4)
        """Effective tokens of the same versions as the norms."""
        self.refused = 0
        """Transcripts and batches refused since the start."""

    def remember(self, manifests: Iterable[Mapping[str, Any]]) -> None:
        """Learn from earlier versions' manifests, oldest first, as the journal has them or as Redis has them (text)."""
        for manifest in manifests:
            self.losses.add(_numbers(manifest.get(LOSSES, [])))
            if NORM in manifest and TOKENS in manifest:  # a norm alone is of the first rule: smaller with the weights
                self.norms.add(_numbers([manifest[NORM]]))
                self.tokens.extend(_numbers([manifest[TOKENS]]))

    def relearn(self, manifests: Iterable[Mapping[str, Any]]) -> None:
        """`remember` these, and nothing from before."""
        for values in (self.losses.values, self.norms.values, self.tokens):
            values.clear()
        self.remember(manifests)

    def loss_limit(self) -> float:
        """The highest mean loss, in nats per trained token, that a transcript may have to be trained."""
        return max(self.guess, self.losses.bound())

    def loss_reason(self, loss: float) -> str:
        """Why a transcript above `loss_limit` was set aside."""
        self.refused += 1
        return (
            f"its loss of {loss:.3f} nats a token lies above {self.loss_limit():.3f}, far beyond that of the last"
            f" {len(self.losses.values)} transcripts: set aside, requeue it to try again (--outliers 0 trains anything)"
        )

    def refusal(self, kind: Kind, answers: Answers) -> str | None:
        """Why a transcript whose loss depends on the weights is not trained; None if it is."""
        if not self.k or not has_teacher(kind) or answers.moved <= MOST_MOVED:
            return None
        self.refused += 1
        said = "comment" if kind == "comment" else "demonstration"
        return (
            f"shown the {said}, the model would say something else at nearly every word of the answer"
            f" ({answers.moved:.2f} of the probability, the bound is {MOST_MOVED:g}): nothing can be learnt along it."
            " Send the answer that you would have liked (chosen and rejected)"
        )

    def norm_refusal(self, norm: float, tokens: float | None = None, loss: float | None = None) -> str | None:
        """Why a batch with a gradient of L2 norm `norm`, over so many effective tokens, must not be applied; None if it
        may. A batch of fewer tokens than usual averages less noise away: it may have a norm larger by the square root.
        A loss above the usual explains a norm larger by as much.
        """
        bound = self.norms.bound()
        if loss is not None and self.losses.values and (usual := statistics.median(self.losses.values)) > 0:
            bound *= max(1.0, loss / usual)
        if tokens and self.tokens:
            bound *= max(1.0, math.sqrt(statistics.median(self.tokens) / tokens))
        if norm <= bound:
            return None
        self.refused += 1
        return (
            f"its gradient's norm of {norm:.4g} lies above {bound:.4g}, far beyond that of the last"
            f" {len(self.norms.values)} versions: set aside, requeue it to try again (--outliers 0 trains anything)"
        )

    @staticmethod
    def measures(nll: Mapping[str, float], norm: float | None = None, tokens: float = 0.0) -> dict[str, Any]:
        """What a version's manifest must keep for `remember`; tokens: the effective ones that `norm` averages over."""
        kept: dict[str, Any] = {LOSSES: [round(value, 4) for value in nll.values()]}
        return kept | ({NORM: norm, TOKENS: tokens} if norm is not None else {})


class ToldLimit:
    """The bounds that the guards of replica 0, or of rank 0, have now."""

    def __init__(self, most: float, k: float) -> None:
        self._most, self._guards, self.k = most, Guards(k), k

    def loss_limit(self) -> float:
        """As `Guards.loss_limit`, there."""
        return self._most

    def loss_reason(self, loss: float) -> str:
        """Who decides says why."""
        return "replica 0 says why"

    def refusal(self, kind: Kind, answers: Answers) -> str | None:
        """As `Guards.refusal`."""
        return self._guards.refusal(kind, answers)


def _numbers(values: Any) -> list[float]:
    """`values`, or the JSON that Redis keeps of them; nothing for what is neither."""
    try:
        found = json.loads(values) if isinstance(values, str) else list(values)
        return [float(value) for value in found]
    except (TypeError, ValueError):
        return []
