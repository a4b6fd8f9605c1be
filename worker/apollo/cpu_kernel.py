"""The kernel behind compiled_write.py, in the part of Python that numba compiles. Importing this imports numba.

numba takes int * uint64 to be a float, so every constant of Philox is a uint64. What it has no word for (fused
multiply-add, bf16) is LLVM's, in `_fma`, `_widened` and `_rounded`.
"""

# mypy: disable-error-code="no-untyped-def, no-any-return"
import logging
from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

log = logging.getLogger("tandem")

SPAN = 2048
"""Elements whose random bits are made together: they stay in the fastest cache."""

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)

_NUMBERS = (  # after the two matrices
    "int64, int64, int64, int64, float32, boolean, float32, uint64, uint64, uint64, uint64, float32[::1], float32[::1])"
)
SIGNATURES = [f"void(uint16[::1], int64, {direction}[::1], int64, {_NUMBERS}" for direction in ("uint16", "float32")]


@intrinsic
def _fma(typingctx, a, b, c):
    """a * b + c in fp32, rounded once."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def _widened(typingctx, value):
    """bf16 (as uint16) or fp32 -> fp32."""

    def generate(context, builder, signature, arguments):
        if value == types.float32:
            return arguments[0]
        raw = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(raw, ir.FloatType())

    return types.float32(value), generate


@intrinsic
def _rounded(typingctx, value, bits):
    """philox.round_stochastic: fp32 and 16 bits -> bf16 (as uint16)."""

    def generate(context, builder, signature, arguments):
        raw = builder.bitcast(arguments[0], ir.IntType(32))
        raw = builder.add(raw, builder.zext(arguments[1], ir.IntType(32)))
        return builder.trunc(builder.lshr(raw, ir.Constant(ir.IntType(32), 16)), ir.IntType(16))

    return types.uint16(types.float32, types.uint16), generate


def _write_rows(
    weight, weight_stride, direction, direction_stride, rows, cols, first, pitch, step, decays, decay, key0, key1,
    t, id, by_rows, by_cols,
):  # fmt: skip
    """Some rows: W <- W + step * direction, then W <- W + decay * W if `decays`. `step` and `decay` come negated.

    weight: bf16 as uint16, flat; direction: the same, or float32; row i begins at i times its stride, and its first
    element has the number first + i * pitch. A Philox block is eight 16-bit lanes in the order of its words' bytes.
    by_rows, by_cols: `Write.scales`, or both empty.
    """
    words = np.empty(SPAN // 4 + 2, np.uint64)  # two a block, one block more than SPAN fills
    lanes = words.view(np.uint16)
    for row in range(rows):
        for start in range(0, cols, SPAN):
            count = min(SPAN, cols - start)
            element = first + row * pitch + start
            skip = element & 7
            block = np.uint64(element >> 3)
            for i in range((skip + count + 7) >> 3):
                c0 = (block + np.uint64(i)) & _LOW
                c1 = (block + np.uint64(i)) >> _HALF
                c2, c3 = t, id
                k0, k1 = key0, key1
                for _ in range(10):
                    p0, p1 = c0 * _M0, c2 * _M1
                    c0 = (p1 >> _HALF) ^ c1 ^ k0
                    c2 = (p0 >> _HALF) ^ c3 ^ k1
                    c1, c3 = p1 & _LOW, p0 & _LOW
                    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
                words[2 * i] = c0 | (c1 << _HALF)
                words[2 * i + 1] = c2 | (c3 << _HALF)
            w_at, d_at = row * weight_stride + start, row * direction_stride + start
            w, d = weight[w_at : w_at + count], direction[d_at : d_at + count]
            bits = lanes[skip : skip + count]
            if len(by_rows):
                by_row, by_col = by_rows[row], by_cols[start : start + count]
                for k in range(count):
                    scaled = np.float32(np.float32(_widened(d[k]) * by_row) * by_col[k])
                    value = _fma(scaled, step, _widened(w[k]))
                    if decays:
                        value = _fma(value, decay, value)
                    w[k] = _rounded(value, bits[k])
                continue
            for k in range(count):
                value = _fma(_widened(d[k]), step, _widened(w[k]))
                if decays:
                    value = _fma(value, decay, value)
                w[k] = _rounded(value, bits[k])


def compiled() -> Callable[..., None]:
    """`_write_rows` as machine code; kept beside this file or in the user's cache folder for the next process."""
    try:
        return numba.njit(SIGNATURES, nogil=True, cache=True)(_write_rows)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        log.info("the compiled sweep cannot be kept: no folder for it can be written to; NUMBA_CACHE_DIR names one")
        return numba.njit(SIGNATURES, nogil=True)(_write_rows)
