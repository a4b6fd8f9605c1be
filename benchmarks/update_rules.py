"""What the contenders of learning.py make of a gradient: plain torch, one equation a rule, fp32.

A rule turns the gradient G of a parameter into a direction U whose RMS is about 1, as AdamW's is; `RuleOptimizer` then
does W -= lr * U. Anything that is no matrix takes AdamW, as in worker/apollo.
Must not know: models, data. Invariant: a rule is pure but for the `memory` it is handed, one a parameter.

Sources: AdamW, arXiv 1711.05101; APOLLO, arXiv 2412.05270, algorithm 1; the factored second moment, Adafactor, arXiv
1804.04235, algorithm 4.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

EPS = 1e-8
Memory = dict[str, Any]


class Rule(Protocol):
    def direction(self, g: Tensor, memory: Memory, t: int) -> Tensor:
        """U of the shape of `g`; t is 1 for the first step."""

    def numbers(self, rows: int, cols: int) -> int:
        """How many numbers of state it keeps for a matrix (fp32: 4 bytes each)."""


def _mean(memory: Memory, name: str, value: Tensor, beta: float, t: int) -> Tensor:
    """The bias-corrected running mean of `value`: (b x + (1-b) value) / (1 - b^t)."""
    kept = memory.setdefault(name, torch.zeros_like(value))
    kept.mul_(beta).add_(value, alpha=1 - beta)
    return kept / (1 - beta**t)


@dataclass(frozen=True)
class Adam:
    """U = m / (sqrt(v) + eps). What v is a mean over says how finely the gradient is balanced:

    element: v_ij = E[g_ij^2], which is AdamW; factored: v_ij = r_i c_j / mean(r), r and c the means of E[g^2] over rows
    and columns, and U is shortened to RMS 1 at most unless `clip` is off; channel: one v for each row of a tall matrix,
    each column of a wide one; matrix: one v. beta1 = 0: m is G itself, and no state is kept for it.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    second: Literal["element", "factored", "channel", "matrix"] = "element"
    clip: bool = True

    def direction(self, g: Tensor, memory: Memory, t: int) -> Tensor:
        m = _mean(memory, "m", g, self.beta1, t) if self.beta1 else g
        squares = g.square()
        if self.second == "factored":
            rows = _mean(memory, "rows", squares.mean(1, keepdim=True), self.beta2, t)  # [rows, 1]
            cols = _mean(memory, "cols", squares.mean(0, keepdim=True), self.beta2, t)  # [1, cols]
            u = m / ((rows / rows.mean().clamp_min(1e-30)).sqrt() * cols.sqrt() + EPS)
            return u / max(1.0, float(u.square().mean().sqrt())) if self.clip else u
        if self.second == "channel":
            squares = squares.mean(1 if g.shape[0] >= g.shape[1] else 0, keepdim=True)
        elif self.second == "matrix":
            squares = squares.mean()
        return m / (_mean(memory, "v", squares, self.beta2, t).sqrt() + EPS)

    def numbers(self, rows: int, cols: int) -> int:
        second = {"element": rows * cols, "factored": rows + cols, "channel": max(rows, cols), "matrix": 1}
        return second[self.second] + (rows * cols if self.beta1 else 0)


@dataclass(frozen=True)
class Apollo:
    """APOLLO, algorithm 1, with rank R: R = G P, P ~ N(0, 1/R) redrawn every `gap` steps; N = m / (sqrt(v) + eps) of R;
    U = s G, s = ||N|| / ||R|| for the matrix or, with `channels`, for each channel (row of a tall matrix, column of a
    wide one); then the norm-growth limiter, then sqrt(scale) with scale = min(rows, cols) / R, so that U's RMS is N's.

    Variants: exact: s = ||N|| / ||G||, the norm that ||R|| estimates. signed: s = <N, R> / ||R||^2, by how much N goes
    along R, so that the momentum in N shortens or turns what goes against it. gamma = inf: no limiter.
    """

    rank: int = 1
    channels: bool = False
    exact: bool = False
    signed: bool = False
    gamma: float = 1.01
    beta1: float = 0.9
    beta2: float = 0.999
    gap: int = 200

    def direction(self, g: Tensor, memory: Memory, t: int) -> Tensor:
        tall = g if g.shape[0] >= g.shape[1] else g.T  # [channels, min(rows, cols)]
        if (t - 1) % self.gap == 0:
            draw = torch.Generator().manual_seed(memory["seed"] + t)
            memory["p"] = (torch.randn(tall.shape[1], self.rank, generator=draw) / math.sqrt(self.rank)).to(g.device)
        r = tall @ memory["p"]  # [channels, R]
        m = memory.setdefault("m", torch.zeros_like(r)).mul_(self.beta1).add_(r, alpha=1 - self.beta1)
        v = memory.setdefault("v", torch.zeros_like(r)).mul_(self.beta2).addcmul_(r, r, value=1 - self.beta2)
        n = m / (v.sqrt() + EPS)
        dim = 1 if self.channels else (0, 1)
        below = (tall if self.exact else r).square().sum(dim, keepdim=True).sqrt() + EPS
        above = (n * r).sum(dim, keepdim=True) / below if self.signed else n.square().sum(dim, keepdim=True).sqrt()
        u = above / below * tall
        norm, previous = float(u.norm()), memory.get("norm", 0.0)
        if previous and norm > self.gamma * previous:
            u, norm = u * (self.gamma * previous / norm), self.gamma * previous
        memory["norm"] = norm
        u = u * (math.sqrt(tall.shape[1] / self.rank) * math.sqrt(1 - self.beta2**t) / (1 - self.beta1**t))
        return u if tall is g else u.T

    def numbers(self, rows: int, cols: int) -> int:
        return 2 * self.rank * max(rows, cols)


@dataclass(frozen=True)
class Sgd:
    """U = G: its size is the gradient's, so that lr means something else."""

    def direction(self, g: Tensor, memory: Memory, t: int) -> Tensor:
        return g

    def numbers(self, rows: int, cols: int) -> int:
        return 0


class RuleOptimizer:
    """`rule` for the matrices among `named`, AdamW (or SGD, where that is the rule) for the rest. fp32."""

    def __init__(self, named: Iterable[tuple[str, torch.nn.Parameter]], rule: Rule, *, seed: int) -> None:
        self._named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self._rule, self._t = rule, 0
        self._rest = rule if isinstance(rule, Sgd) else Adam()
        self._memory: list[Memory] = [{"seed": 1_000_003 * seed + 1009 * i} for i in range(len(self._named))]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step with the gradients that are there; they are dropped."""
        self._t += 1
        for (_, parameter), memory in zip(self._named, self._memory, strict=True):
            assert parameter.grad is not None
            rule = self._rule if parameter.dim() == 2 else self._rest
            parameter.sub_(rule.direction(parameter.grad, memory, self._t), alpha=lr)
            parameter.grad = None
