"""The parts of a model that liger has kernels for, found by asking the modules themselves what they compute.

    for norm in norms_of(model): ...      # an RMSNorm, with its epsilon, offset and rounding
    for mlp in gated_mlps_of(model): ...  # down(activation(gate(x)) * up(x)), gate and up apart or in one matrix

A module is called with small tensors of its own, on the CPU, and what it makes of them is compared with the formula. So
no name of a model or of a class is needed. What looks like such a part and computes anything else, or cannot be asked,
comes out as `Left`, with the reason.

Must not know: the optimizer.
Invariants: no parameter is read or written; a norm is found only if the formula has the same bits in bf16.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.model.replaced import replaced
from worker.model.stand_ins import Activation, activate, rms_norm

ROWS = 16
EPSILONS = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: x / RMS(x) * (offset + weight). wide: rounded once, at the end."""

    module: nn.Module
    eps: float
    offset: float
    wide: bool


@dataclass(frozen=True)
class GatedMlp:
    """An MLP whose gate goes through `activation`. up None: `gate` makes both, the gate first."""

    module: nn.Module
    gate: nn.Linear
    up: nn.Linear | None
    down: nn.Linear
    activation: Activation


@dataclass(frozen=True)
class Left:
    """What looks like a norm or an MLP with a gate, and is not known to be one. why: in words, without a full stop."""

    module: nn.Module
    why: str


def norms_of(model: nn.Module) -> Iterator[Norm | Left]:
    """All in `model`, which may be on any device, and what has one vector of weights and an epsilon besides."""
    known: dict[tuple[Any, ...], tuple[float, bool] | str] = {}
    for module in model.modules():
        if (eps := _epsilon(module)) is None:
            continue
        key = type(module), eps, tuple(module.weight.shape)  # type: ignore[arg-type]
        if key not in known:
            known[key] = _ask_norm(module, eps)
        found = known[key]
        yield Left(module, found) if isinstance(found, str) else Norm(module, eps, *found)


def gated_mlps_of(model: nn.Module) -> Iterator[GatedMlp | Left]:
    """All in `model`, which may be on any device, and what has linear layers of such shapes besides."""
    for module in model.modules():
        linears = [child for child in module.children() if type(child) is nn.Linear]
        if len(linears) not in (2, 3) or any(_has_parameters(child, linears) for child in module.children()):
            continue
        if (found := _ask_mlp(module, linears)) is not None:
            yield found


# -- norms ------------------------------------------------------------------------------------------------------------


def _epsilon(module: nn.Module) -> float | None:
    """Of what may be a norm: one vector, no children, and an epsilon by one of its usual names."""
    named = dict(module.named_parameters())
    if list(named) != ["weight"] or named["weight"].dim() != 1 or [*module.children(), *module.buffers()]:
        return None
    values = [getattr(module, name, None) for name in EPSILONS]
    return next((float(value) for value in values if isinstance(value, float)), None)


@torch.no_grad()
def _ask_norm(module: nn.Module, eps: float) -> tuple[float, bool] | str:
    """(offset, wide), or why it is none. Rows are small, too, so that the epsilon is seen."""
    size = next(module.parameters()).numel()
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-4, 2, ROWS)[:, None]
    x = (torch.randn(ROWS, size, generator=generator) * scales).to(torch.bfloat16)[None]  # [1, ROWS, n]
    weight = torch.randn(size, generator=generator).to(torch.bfloat16)
    try:
        found = torch.func.functional_call(module, {"weight": weight}, (x,))
    except Exception as error:  # any model's own code
        return _raised(error)
    for offset in (0.0, 1.0):
        for wide in (False, True):
            if isinstance(found, Tensor) and torch.equal(found, rms_norm(x, weight, eps, offset, wide)):
                return offset, wide
    return "it computes something else than an RMSNorm, or rounds otherwise"


# -- MLPs -------------------------------------------------------------------------------------------------------------


def _has_parameters(child: nn.Module, linears: list[nn.Linear]) -> bool:
    return child not in linears and next(child.parameters(), None) is not None


def _ask_mlp(module: nn.Module, linears: list[nn.Linear]) -> GatedMlp | Left | None:
    """Its linear layers hand over chosen numbers, in every order that their shapes allow; None if they allow none."""
    why: str | None = None
    outs = {id(one): one.out_features for one in linears}
    for down in linears:
        others = [one for one in linears if one is not down]
        wide = {outs[id(one)] for one in others}
        if len(wide) != 1 or down.in_features * (2 if len(others) == 1 else 1) != wide.pop():
            continue
        for gate, up in [(others[0], None)] if len(others) == 1 else [(others[0], others[1]), (others[1], others[0])]:
            for activation in ("silu", "gelu_tanh"):
                candidate = GatedMlp(module, gate, up, down, activation)  # type: ignore[arg-type]
                if (why := _differs(candidate)) is None:
                    return candidate
    return Left(module, why) if why is not None else None


@torch.no_grad()
def _differs(mlp: GatedMlp) -> str | None:
    """Why it is not known to compute that; None if it does."""
    generator = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(1, ROWS, 8, generator=generator) for _ in range(2))
    reached: list[Tensor] = []

    def last(x: Tensor) -> Tensor:
        reached.append(x)
        return torch.zeros_like(x)

    stand_ins: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [(mlp.down, last)]
    if mlp.up is None:
        stand_ins.append((mlp.gate, lambda x: torch.cat([a, b], -1)))
    else:
        stand_ins += [(mlp.gate, lambda x: a), (mlp.up, lambda x: b)]
    with ExitStack() as stack:
        for linear, forward in stand_ins:
            stack.enter_context(replaced(linear, forward))
        try:
            found = mlp.module(torch.zeros(1, ROWS, 8))
        except Exception as error:  # any model's own code
            return _raised(error)
    if len(reached) == 1 and isinstance(found, Tensor) and not bool(found.any()):
        expected = activate(a, mlp.activation) * b
        if reached[0].shape == expected.shape and torch.allclose(reached[0], expected, rtol=1e-6, atol=1e-7):
            return None
    return "it computes something else than an MLP with a gate of SiLU or GELU (tanh)"


def _raised(error: Exception) -> str:
    said = (str(error).splitlines() or [""])[0]
    return f"it does not take small tensors to be asked with ({type(error).__name__}: {said[:120]})"
