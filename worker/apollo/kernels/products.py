"""R = G P of gradients that are known as products, G = left^T right, by two passes over the factors.

left: dY [T, rows]; right: X [T, cols]. Factors are a hundredth of what G is, and R is not rounded with G.
"""

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl

from worker.apollo.kernels.columns import COLS, COLUMNS, PARTS, PROJECTION, SCRATCH
from worker.apollo.kernels.common import pointer

# Columns of the table of products, int64 [products, PRODUCT_COLUMNS]. A matrix's are of different rows of it.
POSITION = tl.constexpr(0)  # of the matrix
LEFT = tl.constexpr(1)  # address and row stride of both factors
LEFT_STRIDE = tl.constexpr(2)
RIGHT = tl.constexpr(3)
RIGHT_STRIDE = tl.constexpr(4)
TOKENS = tl.constexpr(5)
FIRST_ROW = tl.constexpr(6)  # which rows of the matrix: from here on, this many
HEIGHT = tl.constexpr(7)
TALL = tl.constexpr(8)  # 1: P is along the columns, 0: along the rows
PRODUCT_COLUMNS = tl.constexpr(9)


@triton.jit(do_not_specialize=["most"])
def project_factor(
    parameters, products, projections, along, most, TYPE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    """along[product, t] = right[t] P for a tall matrix, left[t] P for a wide one. most: tokens of a row of `along`."""
    number = tl.program_id(0).to(tl.int64)
    product = products + number * PRODUCT_COLUMNS
    tokens = tl.load(product + TOKENS).to(tl.int32)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    if tl.program_id(1) * BT < tokens:
        parameter = parameters + tl.load(product + POSITION) * COLUMNS
        p = projections + tl.load(parameter + PROJECTION)
        if tl.load(product + TALL) != 0:
            length = tl.load(parameter + COLS).to(tl.int32)
            address, stride = tl.load(product + RIGHT), tl.load(product + RIGHT_STRIDE)
        else:
            length = tl.load(product + HEIGHT).to(tl.int32)
            address, stride = tl.load(product + LEFT), tl.load(product + LEFT_STRIDE)
        tl.multiple_of(length, 8)
        tl.multiple_of(stride, 8)
        source = pointer(address, TYPE, True)
        sums = tl.zeros([BT, BC], tl.float32)
        for start in range(0, length, BC):
            col = start + tl.arange(0, BC)
            mask = (t < tokens)[:, None] & (col < length)[None, :]
            x = tl.load(source + t[:, None].to(tl.int64) * stride + col[None, :], mask, other=0).to(tl.float32)
            sums += x * tl.load(p + col, col < length, other=0)[None, :]
        tl.store(along + number * most + t, tl.sum(sums, 1), t < tokens)


@triton.jit(do_not_specialize=["most"])
def project_product(parameters, products, scratch, along, most, TYPE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """R, of which `along` is the other side's part: BC of its elements. A wide matrix's further parts are zero."""
    number = tl.program_id(0).to(tl.int64)
    product = products + number * PRODUCT_COLUMNS
    parameter = parameters + tl.load(product + POSITION) * COLUMNS
    target = scratch + tl.load(parameter + SCRATCH)
    cols = tl.load(parameter + COLS).to(tl.int32)
    if tl.load(product + TALL) != 0:
        length = tl.load(product + HEIGHT).to(tl.int32)
        address, stride = tl.load(product + LEFT), tl.load(product + LEFT_STRIDE)
        target += tl.load(product + FIRST_ROW)
        parts = 1
    else:
        length = cols
        address, stride = tl.load(product + RIGHT), tl.load(product + RIGHT_STRIDE)
        parts = tl.load(parameter + PARTS).to(tl.int32)
    if tl.program_id(1) * BC < length:
        tl.multiple_of(length, 8)
        tl.multiple_of(stride, 8)
        source = pointer(address, TYPE, True)
        tokens = tl.load(product + TOKENS).to(tl.int32)
        col = tl.program_id(1) * BC + tl.arange(0, BC)
        sums = tl.zeros([BT, BC], tl.float32)
        for start in range(0, tokens, BT):
            t = start + tl.arange(0, BT)
            mask = (t < tokens)[:, None] & (col < length)[None, :]
            x = tl.load(source + t[:, None].to(tl.int64) * stride + col[None, :], mask, other=0).to(tl.float32)
            sums += x * tl.load(along + number * most + t, t < tokens, other=0)[:, None]
        tl.store(target + col, tl.sum(sums, 0), col < length)
        for _ in range(1, parts):
            target += length
            tl.store(target + col, tl.zeros([BC], tl.float32), col < length)
