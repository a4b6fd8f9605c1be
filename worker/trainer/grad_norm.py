"""Measures of the gradients that a backward pass left in the parameters.

Changes nothing.
"""

from collections.abc import Iterable

import torch


def gradient_norm(parameters: Iterable[torch.Tensor]) -> float:
    """The L2 norm over all gradients together, summed in fp32 whatever their dtype; 0.0 without any.

    No gradient is copied; the device is waited for once.
    """
    norms = [
        torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        for parameter in parameters
        if parameter.grad is not None
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
