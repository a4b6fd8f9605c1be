"""Philox bits for stochastic rounding, mirrored from philox.py: a function of (seed, step, tensor, element) alone."""

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """philox.philox4x32: uint32 counters and keys."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def bits_of_blocks(block, step, id, key0, key1, ROWS_: tl.constexpr, COLS_: tl.constexpr):
    """Rounding bits of whole Philox blocks [ROWS_, COLS_ // 8] (int64): uint32 [ROWS_, COLS_], each below 65536."""
    w0, w1, w2, w3 = _philox(block.to(tl.uint32), (block >> 32).to(tl.uint32), step, id, key0, key1)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [.., 2, 2]: word 2 i + j at [i, j]
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS_, COLS_])


@triton.jit
def bits_of_elements(element, step, id, key0, key1):
    """Rounding bits of elements (int64) that need not start a block: a Philox block each, of which one lane is used."""
    block = element >> 3
    w0, w1, w2, w3 = _philox(block.to(tl.uint32), (block >> 32).to(tl.uint32), step, id, key0, key1)
    lane = (element & 7).to(tl.uint32)
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    return tl.where(lane % 2 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def rounded(value, bits):
    """philox.round_stochastic."""
    return ((value.to(tl.uint32, bitcast=True) + bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
