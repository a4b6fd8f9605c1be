"""APOLLO-Mini, rank 1: the optimizer, on CPU and CUDA, for bf16 weights that somebody else owns.

Knows torch, and Triton in its CUDA files only; no Redis, vLLM or transformers.
"""

from worker.apollo.errors import ApolloError, NonFiniteGradient
from worker.apollo.layout import state_bytes
from worker.apollo.optimizer import ApolloMini, LastUpdate

__all__ = ["ApolloError", "ApolloMini", "LastUpdate", "NonFiniteGradient", "state_bytes"]
