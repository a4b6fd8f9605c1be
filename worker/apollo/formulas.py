"""The mathematics of APOLLO-Mini, once, in the order in which the paper has it.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025, arXiv 2412.05270, algorithm 1 with rank 1
and tensor-wise scaling. Everything here is pure or works in place on what it is given; it knows no parameter, device
or state layout. The CPU implementation calls these functions; kernels/ mirrors them line by line, under the same
names.

Departures from the paper's code, each with its reason:
- an all-zero gradient changes nothing for its matrix, and the limiter's memory has a floor: one empty batch would
  otherwise set it to 0 and hold the step near 0 for more than a thousand steps (growth is 1 % a step);
- moments are fp32 whatever the weights are: in bf16, v cannot decay at b2 = .999;
- eps defaults to 1e-8: 1e-6 shortens the step where gradients are near 1e-6.
A constant factor on the gradient leaves the step unchanged (eps aside), so clipping the global norm does next to
nothing: what is to shorten a step has to multiply the step itself (`learning_rate`).
"""

import math

from torch import Tensor

NORM_EPS = 1e-8
"""Added to the norms that are divided by."""

LIMITER_FLOOR = 1e-3
"""The limiter remembers no norm below this times sqrt(max(rows, cols)), which is ||U|| when the RMS of N is this."""


def is_tall(rows: int, cols: int) -> bool:
    """Which side is projected away: the columns of a tall matrix, else the rows. N keeps max(rows, cols) elements."""
    return rows >= cols


def project(gradient: Tensor, projection: Tensor, tall: bool) -> Tensor:
    """R = G P^T for a tall G [rows, cols], P [cols]; R = P^T G for a wide one, P [rows]. All fp32; R is 1-D."""
    return gradient @ projection if tall else projection @ gradient


def update_moments(m: Tensor, v: Tensor, r: Tensor, beta1: float, beta2: float) -> None:
    """m = b1 m + (1-b1) R;  v = b2 v + (1-b2) R^2, in place."""
    m.mul_(beta1).add_(r, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(r, r, value=1 - beta2)


def normalised(m: Tensor, v: Tensor, eps: float) -> Tensor:
    """N = m / (sqrt(v) + eps). The bias correction is in `step_size`, as in the paper's code."""
    return m / v.sqrt().add_(eps)


def channel_scale(n_norm: float, r_norm: float) -> float:
    """s = ||N|| / ||R||: by how much AdamW, seen through the projection, would stretch this gradient."""
    return n_norm / (r_norm + NORM_EPS)


def limiter_floor(rows: int, cols: int) -> float:
    """The smallest ||U|| that the norm-growth limiter remembers for a rows x cols matrix."""
    return LIMITER_FLOOR * math.sqrt(max(rows, cols))


def growth_excess(u_norm: float, previous: float, gamma: float) -> float:
    """c = max(||U|| / prev, gamma) / gamma: U is divided by it, so that ||U|| grows by gamma a step at most.

    `previous` is 0 when there is none yet. gamma = inf switches the limiter off.
    """
    if previous == 0:
        return 1.0
    growth = u_norm / (previous + NORM_EPS)
    return growth / gamma if growth > gamma else 1.0


def learning_rate(lr: float, step_scale: float) -> float:
    """lr * step_scale: the rate of one step, for the update and for the decay, after everything that normalises it.

    step_scale is the batch's own multiplier (its mean weight, say). Moments and the limiter's memory never see it.
    """
    return lr * step_scale


def step_size(rate: float, beta1: float, beta2: float, t: int) -> float:
    """rate * sqrt(1 - b2^t) / (1 - b1^t): rate from `learning_rate`; t counts steps, 1 for the first."""
    return rate * math.sqrt(1 - beta2**t) / (1 - beta1**t)


def root_scale(scale: float | str, rows: int, cols: int) -> float:
    """sqrt(scale); "auto" means min(rows, cols), with which a step is about as long as AdamW's at the same lr."""
    return math.sqrt(min(rows, cols) if scale == "auto" else float(scale))


def matrix_factor(
    n_norm: float, r_norm: float, g_norm: float, previous: float, root: float, front: bool, gamma: float, floor: float
) -> tuple[float, float]:
    """The one number that APOLLO-Mini makes of a matrix: U = factor * G. Returns (factor, ||U|| to remember).

    ||U|| = factor * ||G||, so U itself is never needed. `root` is sqrt(scale), applied before the limiter when `front`.
    """
    factor = channel_scale(n_norm, r_norm) * (root if front else 1.0)
    factor /= growth_excess(factor * g_norm, previous, gamma)
    remembered = max(factor * g_norm, floor)
    return factor * (1.0 if front else root), remembered


def apply(weight: Tensor, direction: Tensor, step: float, decay: float) -> Tensor:
    """W <- (W - step * U) * (1 - decay), in place on an fp32 `weight`; decay = rate * wd is decoupled and comes last.

    Written W - decay * W: 1 - decay itself would be rounded to fp32, the same way every step.
    """
    weight.add_(direction, alpha=-step)
    return weight.add_(weight, alpha=-decay) if decay else weight
