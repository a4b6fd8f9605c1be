"""APOLLO-Mini, rank 1: the optimizer, on CPU and CUDA, for bf16 weights that somebody else owns.

In: parameters, their gradients, flat memory for the state. Out: parameters changed in place.
It knows torch, and Triton in its CUDA files alone; no Redis, no vLLM, no transformers.
"""

from worker.apollo.apollo_mini import ApolloMini, LastUpdate
from worker.apollo.errors import ApolloError, NonFiniteGradient, NonFiniteGradientError
from worker.apollo.products import GradientProduct
from worker.apollo.state_layout import state_bytes

__all__ = [
    "ApolloError",
    "ApolloMini",
    "GradientProduct",
    "LastUpdate",
    "NonFiniteGradient",
    "NonFiniteGradientError",
    "state_bytes",
]
