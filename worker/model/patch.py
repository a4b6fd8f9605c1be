"""Puts the kernels into a transformers model on a GPU, and chooses what is recomputed in backward.

Any model: torch's variable-length FlashAttention, its grouped products for a mixture's experts, and liger's RMSNorm,
SwiGLU and GeGLU for the parts that compute just that; the rest stays as transformers wrote it. Qwen3.5: liger's own
change of it, and fla for the gated delta net and its convolution. The loss is `worker.model.loss`.
Invariants: parameters stay the very tensors they were; a kernel that is missing is an error that says what to install,
never a slower way taken unasked. What only a trace of the model shows is refused there (`worker.model.layer_trace`).
"""

import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType, ModuleType
from typing import Any

import torch
from packaging.version import Version

from worker.model import attention, gated_delta_net
from worker.model.experts import group_experts
from worker.model.fused_parts import Kernels, fuse_parts, liger_kernels
from worker.model.layers import recompute
from worker.model.model_error import ModelError
from worker.utils.stacks import is_stack

log = logging.getLogger("tandem")

INSTALL = "pip install 'tandem-worker[worker]' installs it on a GPU machine"
QWEN = ("qwen3_5_text", "qwen3_5_moe_text")


def fuse(model: Any, kept: Callable[[int], int] = lambda tokens: 0, kernels: Kernels | None = None) -> None:
    """Change `model`, a causal language model in training mode on a GPU, in place; it then takes packed rows only.

    kept: for a row of so many tokens, how many of the last layers keep their activations for backward; the others keep
    only their input and are computed again. kernels: for norms and MLPs of other models than Qwen3.5; by default
    liger's. Raises ModelError, ExpertsError.
    """
    kind = model.config.get_text_config().model_type
    if kind in QWEN:
        require()
        _fuse_qwen(model, kind)
    else:
        if kernels is None:
            require_package("liger_kernel", "liger-kernel", "0.8.5")
            kernels = liger_kernels()
        fused = fuse_parts(model, kernels)
        log.info("fused kernels for %d norms and %d MLPs", fused.norms, fused.mlps)
        for (name, why), count in fused.left.items():
            log.info("%s (%d of them) stays as transformers wrote it: %s", name, count, why)
        if any(is_stack(parameter.shape) for parameter in model.parameters()):
            group_experts(model)
    model.set_attn_implementation(attention.register())
    recompute(model, kept)


def _fuse_qwen(model: Any, kind: str) -> None:
    from liger_kernel import transformers as liger

    chosen = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False, "rms_norm": True}
    with names_kept(sys.modules[type(model).__module__]):  # models that are made later stay as transformers wrote them
        if kind == "qwen3_5_text":
            liger.apply_liger_kernel_to_qwen3_5(**chosen, swiglu=True, model=model)
        else:  # swiglu would take the experts, too
            liger.apply_liger_kernel_to_qwen3_5_moe(**chosen, swiglu=False, model=model)
    if kind != "qwen3_5_text":
        group_experts(model)
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.forward = MethodType(gated_delta_net.forward, layer.linear_attn)


@contextmanager
def names_kept(module: ModuleType) -> Iterator[None]:
    """What the block makes names of `module` mean, they no longer mean after it."""
    before = dict(vars(module))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def require() -> None:
    """Of Qwen3.5: raises ModelError naming the first kernel package that is missing or does not work here, and what to
    do."""
    require_package("fla", "flash-linear-attention", "0.6.0")
    require_package("liger_kernel", "liger-kernel", "0.8.5")
    triton = Version(importlib.metadata.version("triton"))
    hopper = torch.cuda.get_device_capability()[0] == 9
    if hopper and Version("3.4") <= triton < Version("3.7.1"):
        # fla refuses its own backward there (wrong results) and takes TileLang's instead, which compiles with nvcc.
        from fla.backends import TileLangBackend

        if not TileLangBackend.is_available():
            raise ModelError(
                f"triton {triton} cannot compile fla's backward pass on this GPU: install tilelang 0.1.9 or newer"
                " (and nvcc: a CUDA toolkit, or nvidia-cuda-nvcc 13 or newer), or triton 3.7.1 or newer"
            )


def require_package(name: str, package: str, first: str) -> None:
    """Raises ModelError where the module `name` of `package` is not there, or older than version `first`."""
    if importlib.util.find_spec(name) is None:
        raise ModelError(f"{package} is not installed, and training on a GPU needs it: {INSTALL}")
    if Version(found := importlib.metadata.version(package)) < Version(first):
        raise ModelError(f"{package} {found} is too old, {first} is needed: {INSTALL}")
