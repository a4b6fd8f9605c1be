"""A checksum of tensors that costs one read of them, where they lie.

Must not know: Redis, vLLM, versions, the optimizer.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element."""


@torch.no_grad()
def checksum(tensors: Iterable[Tensor]) -> str:
    """Sixteen hex digits of the sum of each tensor's words, in the order of `tensors`. Tensors that differ in one word
    have another one; it says nothing about words that changed places."""
    sums = [tensor.detach().view(_WORDS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    found = torch.stack(sums).cpu().numpy().tobytes() if sums else b""
    return hashlib.blake2b(found, digest_size=8).hexdigest()
