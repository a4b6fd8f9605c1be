"""How a mixture's experts are computed on a GPU: all of a layer in one grouped product, not one after the other.

transformers has it (`grouped_mm`, 5.17 to 5.19) and takes it by itself where torch can; here it is asked for, so that
what cannot is an error. On a CPU nothing is chosen: transformers decides there as it always did.

Must not know: the optimizer.
Invariant: an expert without tokens gets a gradient of zeros, by which its matrices are known to have no step to take.
"""

from typing import Any

import torch
from torch.nn import functional

from producer.errors import TandemError

GROUPED = "grouped_mm"
SIDE = 64
"""Of the small matrices that are tried."""


class ExpertsError(TandemError):
    """The experts cannot be computed as grouped products."""


def group_experts(model: Any) -> None:
    """Have `model`, a transformers model with experts, compute them as grouped products. Raises `ExpertsError` where it
    does not offer them, or where an expert without tokens would learn."""
    ask_for_groups(model)
    if not idle_gradient_is_zero(next(model.parameters()).device):
        raise ExpertsError(
            f"torch {torch.__version__} leaves the gradient of an expert without tokens undefined on this device: use"
            " another version of torch"
        )


def ask_for_groups(model: Any) -> None:
    """The choice alone, of a model on any device, the meta device too. Raises `ExpertsError`."""
    if not model._can_set_experts_implementation():
        raise ExpertsError(f"{type(model).__name__} does not offer transformers' grouped products for its experts")
    try:
        model.set_experts_implementation(GROUPED)
    except (ValueError, ImportError) as error:
        raise ExpertsError(f"the experts cannot be computed as grouped products: {error}") from error


def idle_gradient_is_zero(device: torch.device) -> bool:
    """Whether the second of three matrices, whose group is empty, gets zeros and not what its memory held before."""
    x = torch.ones(16, SIDE, dtype=torch.bfloat16, device=device)
    weight = torch.ones(3, SIDE, SIDE, dtype=torch.bfloat16, device=device, requires_grad=True)
    ends = torch.tensor([8, 8, 16], dtype=torch.int32, device=device)
    product = getattr(functional, GROUPED, None) or torch._grouped_mm
    y = product(x, weight.transpose(-2, -1), offs=ends)
    before = [torch.full_like(weight, torch.nan) for _ in range(4)]  # torch's allocator hands the same memory out again
    del before
    y.backward(torch.ones_like(y))
    assert weight.grad is not None
    return not weight.grad[1].any() and bool((weight.grad[0] == 8).all())
