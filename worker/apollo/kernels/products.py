"""A step from gradients that are given as products, G = left^T right, and are never formed.

left: dY [T, rows]; right: X [T, cols]. R comes from the factors by two passes over them; the write forms a tile of the
product in fp32, and moves the weights by it. So G is rounded nowhere, and neither written nor read.
"""

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl

from worker.apollo.kernels.columns import (
    COLS,
    COLUMNS,
    DECAY,
    FACTOR,
    FIRST,
    FULL_COLS,
    GROUP,
    ID,
    KNOBS,
    OUT_TILE,
    OUT_TILES,
    PARTS,
    PROJECTION,
    SCRATCH,
    WRITTEN,
)
from worker.apollo.kernels.common import pointer
from worker.apollo.kernels.rounding import bits_of_blocks, rounded

# Columns of the table of products, int64 [products, PRODUCT_COLUMNS]. A matrix's are of different rows of it.
POSITION = tl.constexpr(0)  # of the matrix
LEFT = tl.constexpr(1)  # address and row stride of both factors
LEFT_STRIDE = tl.constexpr(2)
RIGHT = tl.constexpr(3)
RIGHT_STRIDE = tl.constexpr(4)
TOKENS = tl.constexpr(5)
FIRST_ROW = tl.constexpr(6)  # which rows of the matrix: from here on, this many
HEIGHT = tl.constexpr(7)
OUT = tl.constexpr(8)  # address of the weights' FIRST_ROW, and row stride
OUT_STRIDE = tl.constexpr(9)
TALL = tl.constexpr(10)  # 1: P is along the columns, 0: along the rows
NUMBER = tl.constexpr(11)  # of its first tile among the matrix's, and how many tiles the matrix has
NUMBERS = tl.constexpr(12)
PRODUCT_COLUMNS = tl.constexpr(13)


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


@triton.jit
def _move(
    w, row, rows, left, cols, sums, factor, decay, number, step, id, k0, k1,
    W_TYPE: tl.constexpr, STOCHASTIC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """W <- (W - factor * sums) * (1 - decay), as `write.apply` does, for BN columns from `left` on; the sum of W^2
    before. w: [BM, 1] of the rows' addresses; number: int64 [BM] of their first elements. SPLITS: how often the columns
    are halved first, which holds fewer registers."""
    if SPLITS > 0:
        HALF: tl.constexpr = BN // 2
        low, high = tl.split(tl.permute(tl.reshape(sums, [BM, 2, HALF]), [0, 2, 1]))
        squares = _move(
            w, row, rows, left, cols, low, factor, decay, number, step, id, k0, k1,
            W_TYPE, STOCHASTIC, BM, HALF, SPLITS - 1,
        )  # fmt: skip
        squares += _move(
            w, row, rows, left + HALF, cols, high, factor, decay, number, step, id, k0, k1,
            W_TYPE, STOCHASTIC, BM, HALF, SPLITS - 1,
        )  # fmt: skip
    else:
        col = left + tl.arange(0, BN)
        mask, at = (row < rows)[:, None] & (col < cols)[None, :], w + col[None, :]
        value = tl.load(at, mask, other=0).to(tl.float32)
        squares = tl.sum(tl.sum(value * value, 1), 0)
        value -= factor * sums
        value -= decay * value
        if STOCHASTIC:
            blocks = (number >> 3)[:, None] + (left // 8 + tl.arange(0, BN // 8))[None, :]
            tl.store(at, rounded(value, bits_of_blocks(blocks, step, id, k0, k1, BM, BN)), mask)
        else:
            tl.store(at, value.to(W_TYPE), mask)
    return squares


@triton.jit(do_not_specialize=["count", "key0", "key1"])
def apply_products(
    parameters, products, tiles, count, knobs, steps, statistics, partial_weights, key0, key1,
    TYPE: tl.constexpr, W_TYPE: tl.constexpr, STOCHASTIC: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    DOWN: tl.constexpr,
):  # fmt: skip
    """W <- (W - factor * left^T right) * (1 - decay) for a BM x BN tile, and its share of ||W||^2 before.

    UPCAST: for Triton's interpreter.
    """
    tile = tl.program_id(0)
    product = products + tl.load(tiles + 2 * tile).to(tl.int64) * PRODUCT_COLUMNS
    block = tl.load(tiles + 2 * tile + 1)
    position = tl.load(product + POSITION)
    parameter = parameters + position * COLUMNS
    rows, cols = tl.load(product + HEIGHT).to(tl.int32), tl.load(parameter + COLS).to(tl.int32)
    written = tl.load(statistics + WRITTEN * count + position)  # 0: a zero gradient, or a refused step
    squares = 0.0
    if written != 0:
        tokens = tl.load(product + TOKENS).to(tl.int32)
        l_stride, r_stride = tl.load(product + LEFT_STRIDE), tl.load(product + RIGHT_STRIDE)
        w_stride = tl.load(product + OUT_STRIDE)
        tl.multiple_of(rows, 8)
        tl.multiple_of(cols, 8)
        tl.multiple_of(l_stride, 8)
        tl.multiple_of(r_stride, 8)
        tl.multiple_of(w_stride, 8)
        if DOWN:
            down = tl.cdiv(rows, BM)
            top, left = (block % down) * BM, (block // down) * BN
        else:
            across = tl.cdiv(cols, BN)
            top, left = (block // across) * BM, (block % across) * BN
        row, col, k = top + tl.arange(0, BM), left + tl.arange(0, BN), tl.arange(0, BK)
        l_at = pointer(tl.load(product + LEFT), TYPE, True) + k[:, None] * l_stride + row[None, :]
        r_at = pointer(tl.load(product + RIGHT), TYPE, True) + k[:, None] * r_stride + col[None, :]
        sums = tl.zeros([BM, BN], tl.float32)
        for start in tl.range(0, tokens, BK, num_stages=STAGES):
            there = (start + k < tokens)[:, None]
            a = tl.load(l_at, there & (row < rows)[None, :], other=0)
            b = tl.load(r_at, there & (col < cols)[None, :], other=0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            sums = tl.dot(tl.trans(a), b, sums)
            l_at += BK * l_stride
            r_at += BK * r_stride

        factor = tl.load(statistics + FACTOR * count + position)
        decay = tl.load(knobs + tl.load(parameter + GROUP) * KNOBS + DECAY).to(tl.float32)
        id = tl.load(parameter + ID).to(tl.uint32)
        step = (tl.load(steps) + 1).to(tl.uint32)
        k0, k1 = key0.to(tl.uint32), key1.to(tl.uint32)
        full_cols = tl.load(parameter + FULL_COLS)
        number = tl.load(parameter + FIRST) + (tl.load(product + FIRST_ROW) + row.to(tl.int64)) * full_cols
        w = pointer(tl.load(product + OUT), W_TYPE, True) + row[:, None].to(tl.int64) * w_stride
        squares = _move(
            w, row, rows, left, cols, sums, factor, decay, number, step, id, k0, k1,
            W_TYPE, STOCHASTIC, BM, BN, SPLITS,
        )  # fmt: skip
    # A matrix has as many places for these sums as `write.apply` has tiles of it: those beyond ours become zero.
    target = partial_weights + tl.load(parameter + OUT_TILE)
    mine, all = tl.load(product + NUMBER) + block, tl.load(product + NUMBERS)
    tl.store(target + mine, squares)
    for other in range(mine + all, tl.load(parameter + OUT_TILES), all):
        tl.store(target + other, 0.0)
