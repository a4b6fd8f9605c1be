"""Gives the norms and MLPs of any model the kernels that were found to fit them (`worker.model.fusible`).

    fuse_parts(model, liger_kernels())     # on a GPU
    fuse_parts(model, STAND_INS)           # the same in plain torch: tests on a CPU, memory on the meta device

liger's own `apply_liger_kernel_to_*` are not called: they exchange classes of transformers' modules for the whole
process, and with them those of the model that the proof at attach compares with (`worker.trainer.proof`).

Must not know: the optimizer.
Invariant: only `forward` of single modules changes; linear layers are called as modules, so that others may watch them.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from worker.model.fusible import GatedMlp, Left, Norm, gated_mlps_of, norms_of
from worker.model.stand_ins import Activation, gated, rms_norm


@dataclass(frozen=True)
class Kernels:
    """As `rms_norm` and `gated` of `worker.model.stand_ins`."""

    norm: Callable[[Tensor, Tensor, float, float, bool], Tensor]
    gate: Callable[[Tensor, Tensor, Activation], Tensor]


STAND_INS = Kernels(rms_norm, gated)


def liger_kernels() -> Kernels:
    """liger's, which is installed; on a GPU."""
    from liger_kernel.ops import LigerGELUMulFunction, LigerRMSNormFunction, LigerSiLUMulFunction

    def norm(x: Tensor, weight: Tensor, eps: float, offset: float, wide: bool) -> Tensor:
        # Not in place: behind a norm of a layer's output the gradient is that of the residual stream as well.
        casting = "gemma" if wide else "llama"
        return LigerRMSNormFunction.apply(x, weight, eps, offset, casting, False, None)  # type: ignore[no-any-return]

    def gate(a: Tensor, b: Tensor, kind: Activation) -> Tensor:
        function = LigerSiLUMulFunction if kind == "silu" else LigerGELUMulFunction
        return function.apply(a, b)  # type: ignore[no-any-return]

    return Kernels(norm, gate)


class Fused(NamedTuple):
    """How many norms and MLPs run on kernels now; and, of those that are left as transformers wrote them, how many
    there are by class and reason."""

    norms: int
    mlps: int
    left: Counter[tuple[str, str]]


def fuse_parts(model: nn.Module, kernels: Kernels) -> Fused:
    """Have norms and MLPs of `model` run on `kernels`."""
    norms, mlps, left = 0, 0, Counter[tuple[str, str]]()
    for found in [*norms_of(model), *gated_mlps_of(model)]:
        match found:
            case Norm():
                found.module.forward = partial(_norm, found, kernels)  # type: ignore[method-assign]
                norms += 1
            case GatedMlp():
                found.module.forward = partial(_mlp, found, kernels)  # type: ignore[method-assign]
                mlps += 1
            case Left():
                left[type(found.module).__name__, found.why] += 1
    return Fused(norms, mlps, left)


def _norm(norm: Norm, kernels: Kernels, x: Tensor) -> Tensor:
    weight: Any = norm.module.weight
    return kernels.norm(x, weight, norm.eps, norm.offset, norm.wide)


def _mlp(mlp: GatedMlp, kernels: Kernels, x: Tensor) -> Tensor:
    if mlp.up is None:
        a, b = mlp.gate(x).chunk(2, -1)
    else:
        a, b = mlp.gate(x), mlp.up(x)
    return mlp.down(kernels.gate(a, b, mlp.activation))  # type: ignore[no-any-return]
