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

import torch
from torch import Tensor

LANES = 8
"""16-bit lanes in one Philox block."""

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_PROJECTION_KEY = 0x50524F4A  # "PROJ", folded into the key's high word


def seed_words(seed: int) -> tuple[int, int]:
    """A 64-bit seed as Philox's key (low word, high word)."""
    return seed & _MASK, (seed >> 32) & _MASK


def philox4x32(counter: Sequence[Tensor | int], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    counter: four int64 tensors (or ints) of one shape holding unsigned 32-bit words; key: two such words. Returns
    four int64 tensors of words. A 32 x 32-bit product overflows int64's sign, harmlessly: its low 64 bits are right,
    and the mask after the arithmetic shift takes the sign's copies away.
    """
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0 = ((p1 >> 32) ^ c1 ^ k0) & _MASK
        c2 = ((p0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
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
    """`projection` of each of `ids`, in a few operations for all: fp32 [ids, length]."""
    low, high = seed_words(seed)
    blocks, matrices = torch.arange((length + 3) // 4), torch.tensor(ids)[:, None] & _MASK
    words = philox4x32((blocks & _MASK, blocks >> 32, draw & _MASK, matrices), (low, high ^ _PROJECTION_KEY))
    uniform = [(word.double() + 0.5) / 2.0**32 for word in words]
    normals = []
    for radius, angle in (uniform[:2], uniform[2:]):
        distance = (-2 * radius.log()).sqrt()
        normals += [distance * (2 * math.pi * angle).cos(), distance * (2 * math.pi * angle).sin()]
    return torch.stack(normals, dim=-1).flatten(1)[:, :length].float()
