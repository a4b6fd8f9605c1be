"""Measures of the gradients that a backward pass left in the parameters.

Changes nothing.
"""

import math
from collections.abc import Iterable

import torch

from worker.apollo import ApolloMini


def gradient_norm(parameters: Iterable[torch.Tensor], optimizer: ApolloMini | None = None) -> float:
    """The L2 norm over all gradients together, summed in fp32 whatever their dtype; 0.0 without any.

    optimizer: says which of `parameters` are shards, whose squares are added up over all processes. No gradient is
    copied; the device is waited for once.
    """
    add_up = optimizer.sum_over_shards if optimizer is not None else None
    found = [
        (parameter, torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        for parameter in parameters
        if parameter.grad is not None
    ]
    if optimizer is None or add_up is None:
        return float(torch.linalg.vector_norm(torch.stack([norm for _, norm in found]))) if found else 0.0
    squares = torch.zeros(2, dtype=torch.float64)  # of what is whole here, of shards
    for parameter, norm in found:
        squares[int(optimizer.is_shard(parameter))] += norm.double().cpu() ** 2
    add_up([squares[1:]])
    return math.sqrt(float(squares.sum())) if float(squares.sum()) >= 0 else math.nan
