"""Puts the kernels into a transformers Qwen3.5 text model on a GPU, and chooses what is recomputed in backward.

fla: the gated delta net and its convolution. torch: variable-length FlashAttention, and a mixture's experts as grouped
products. liger: RMSNorm, and SwiGLU where there are no experts. The loss is `worker.model.loss`.
Invariants: parameters stay the very tensors they were; a kernel that is missing is an error that says what to install,
never a slower way taken unasked.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from packaging.version import Version

from producer.errors import TandemError
from worker.model import attention, gated_delta_net
from worker.model.experts import group_experts

INSTALL = "pip install 'tandem-worker[worker]' installs it on a GPU machine"


class ModelError(TandemError):
    """A kernel package is missing or of a version that cannot be used, or the model is not a Qwen3.5."""


def fuse(model: Any, kept: Callable[[int], int] = lambda tokens: 0) -> None:
    """Change `model`, a Qwen3_5ForCausalLM or Qwen3_5MoeForCausalLM in training mode on a GPU, in place; it then takes
    packed rows only. No GPU has run a mixture yet.

    kept: for a row of so many tokens, how many of the last layers keep their activations for backward; the others keep
    only their input and are computed again. Raises ModelError.
    """
    kind = model.config.get_text_config().model_type
    if kind not in ("qwen3_5_text", "qwen3_5_moe_text"):
        raise ModelError(f"the model is a {kind}: on a GPU Tandem trains Qwen3.5's text models (qwen3_5_text)")
    require()
    from liger_kernel import transformers as liger

    chosen = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False, "rms_norm": True}
    if kind == "qwen3_5_text":
        liger.apply_liger_kernel_to_qwen3_5(**chosen, swiglu=True, model=model)
    else:
        liger.apply_liger_kernel_to_qwen3_5_moe(**chosen, swiglu=False, model=model)  # it would take the experts, too
        group_experts(model)
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.forward = MethodType(gated_delta_net.forward, layer.linear_attn)
    model.set_attn_implementation(attention.register())
    _recompute(model, kept)


def require() -> None:
    """Raises ModelError naming the first kernel package that is missing or does not work here, and what to do."""
    for name, package, first in (
        ("fla", "flash-linear-attention", "0.6.0"),
        ("liger_kernel", "liger-kernel", "0.8.5"),
    ):
        if importlib.util.find_spec(name) is None:
            raise ModelError(f"{package} is not installed, and training Qwen3.5 on a GPU needs it: {INSTALL}")
        if Version(found := importlib.metadata.version(package)) < Version(first):
            raise ModelError(f"{package} {found} is too old, {first} is needed: {INSTALL}")
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


def _recompute(model: Any, kept: Callable[[int], int]) -> None:
    # Non-reentrant checkpoints stop a layer's recomputation at the last tensor that backward needs, which spares the
    # down projection. There is no dropout, so the state of the random generators is not kept.
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    layers = model.model.layers

    def choose(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The last layers are those whose activations backward frees first."""
        embeds = kwargs.get("inputs_embeds")  # [B, T, H]
        tokens = kwargs["input_ids"].numel() if embeds is None else embeds.shape[:2].numel()
        first = len(layers) - kept(tokens)
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = number < first

    model.model.register_forward_pre_hook(choose, with_kwargs=True)
