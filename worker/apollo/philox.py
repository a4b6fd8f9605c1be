"""Counter-based randomness: Philox4x32-10, the rounding bits made of it, and the projection vectors.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A draw is a pure function of (seed, step, id,
element), so tiling, sharding, order and device change nothing. kernels/rounding.py makes the same bits.

Rounding bits of element (row, col) of a logical matrix, with e = row * cols + col in the *unsharded* matrix:
key = seed; counter = (e // 8 low word, e // 8 high word, step, id); of the four output words, the 16-bit lane e % 8,
where lane 2k is the low and lane 2k + 1 the high half of word k. `step` is the paper's t, 1 for the first step.
Projections use a key of their own, so that the two never meet.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

LANES = 8
"""16-bit lanes in one Philox block."""

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_PROJECTION_KEY = 0x50524F4A  # "PROJ", folded into the key's high word
_CHUNK = 1 << 14  # Philox blocks: what is in use at a time stays in a core's cache


def seed_words(seed: int) -> tuple[int, int]:
    """A 64-bit seed as Philox's key (low word, high word)."""
    return seed & _MASK, (seed >> 32) & _MASK


def philox4x32(counter: Sequence[Tensor | int], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    counter: four int64 tensors (or ints) of one shape holding unsigned 32-bit words; key: two such words. Returns
    four int64 tensors of words.
    """
    c0, c1, c2, c3 = _rounds([torch.as_tensor(word, dtype=torch.int64) for word in counter], key)
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return c0, c1, c2, c3


def _rounds(counter: Sequence[Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """`philox4x32` of int64 tensors, or of numpy's int64 arrays.

    A 32 x 32-bit product overflows int64's sign, harmlessly: its low 64 bits are right, and the mask after the
    arithmetic shift takes the sign's copies away.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0 = ((p1 >> 32) ^ c1 ^ k0) & _MASK
        c2 = ((p0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def rounding_bits(seed: int, step: int, id: int, first: Tensor, count: int) -> Tensor:
    """The 16 random bits of `count` consecutive elements from each of `first` [n] (int64 element numbers).

    Returns int32 [n, count], each in [0, 65536).
    """
    blocks = first[:, None] // LANES + torch.arange((count + 2 * LANES - 2) // LANES)  # [n, blocks that may be touched]
    words = philox4x32((blocks & _MASK, (blocks >> 32) & _MASK, step & _MASK, id & _MASK), seed_words(seed))
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    lanes = lanes.to(torch.int32).flatten(1)  # [n, blocks * 8]
    if len(first) == 1:
        skip = int(first[0]) % LANES
        return lanes[:, skip : skip + count]
    return lanes.gather(1, (first % LANES)[:, None] + torch.arange(count))


def round_stochastic(value: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16, up with the probability of the part that is cut off. `bits`: 16 random bits an element, int32.

    Adding them below bf16's last place and cutting is unbiased, and the result is one of the two neighbours; a value
    that bf16 holds exactly stays.
    """
    raw = value.view(torch.int32) + bits
    return (raw >> 16).to(torch.int16).view(torch.bfloat16)


def projection(seed: int, id: int, draw: int, length: int) -> Tensor:
    """The projection vector of matrix `id`: fp32 [length], independent N(0, 1) entries, the `draw`-th of its redraws.

    Box-Muller in float64 over Philox blocks with counter (block low, block high, draw, id).
    """
    return projections(seed, [id], draw, length)[0]


def projections(seed: int, ids: Sequence[int], draw: int, length: int) -> Tensor:
    """`projection` of each of `ids`: fp32 [ids, length].

    By numpy, in one thread. torch's threads meet at a barrier in each of the hundred operations, and where a server
    uses the CPUs too, the 31,000 vectors of a mixture of experts took two minutes of waiting for each other.
    """
    low, high = seed_words(seed)
    key, blocks = (low, high ^ _PROJECTION_KEY), (length + 3) // 4
    normals = np.empty((len(ids) * blocks, 4), np.float32)
    matrices = np.array(ids, np.int64) & _MASK
    for first in range(0, len(normals), _CHUNK):
        numbers = np.arange(first, min(first + _CHUNK, len(normals)))
        block, matrix = numbers % blocks, matrices[numbers // blocks]
        words = _rounds((block & _MASK, block >> 32, np.full_like(block, draw & _MASK), matrix), key)
        uniform = [(word.astype(np.float64) + 0.5) / 2.0**32 for word in words]
        for column in (0, 2):
            distance = np.sqrt(-2 * np.log(uniform[column]))
            angle = 2 * math.pi * uniform[column + 1]
            normals[numbers, column], normals[numbers, column + 1] = distance * np.cos(angle), distance * np.sin(angle)
    return torch.from_numpy(normals.reshape(len(ids), -1)[:, :length])
