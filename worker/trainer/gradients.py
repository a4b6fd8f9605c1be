"""What a micro-batch's `Trainer.begin` found, and what bounds its losses.

Must not know: torch, Redis, vLLM, the header, versions.
"""

from dataclasses import dataclass, field
from typing import Protocol

from producer.feedback import Kind
from worker.trainer.losses.terms import Answers


class Limit(Protocol):
    """What says which losses are outliers, and what is broken: `worker.trainer.outliers.Guards`."""

    k: float
    """How far above the usual is too far; 0: nothing is."""

    def loss_limit(self) -> float:
        """The highest mean loss, in nats per trained token, that is trained."""

    def loss_reason(self, loss: float) -> str:
        """Why a transcript above it was set aside."""

    def refusal(self, kind: Kind, answers: Answers) -> str | None:
        """Why a transcript whose loss depends on the weights is not trained; None if it is."""


@dataclass(frozen=True)
class Gradients:
    """What `begin` found; the gradients themselves are in the parameters, or in streaming still to come."""

    loss: float
    """The weighted mean over trained tokens, in nats."""
    tokens: int
    trained_tokens: int
    nll: dict[str, float]
    """Example id -> mean negative log-likelihood of its trained tokens, in nats, under the weights before the step; of
    a correction, of the chosen answer's."""
    losses: dict[str, float] = field(default_factory=dict)
    """Example id -> its own loss, a mean over its trained tokens, in nats: `nll` for what is imitated."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Example id -> why it was left out; such an example has contributed nothing."""
    step_scale: float = 1.0
    """What `apply` multiplies the optimizer's step with: the mean of weight times |slope| over trained tokens."""
    shares: dict[str, float] = field(default_factory=dict)
    """Example id -> its part of the step, by weight times |slope|; together 1, or 0 where nothing is left to learn."""
    effective_tokens: float = 0.0
    """As many tokens of equal weight average as much noise away."""
