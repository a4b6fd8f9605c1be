"""Pass 1: every gradient is read once, for its projection R and its squared norm."""

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl

from worker.apollo.kernels.columns import BINDINGS, COLS, COLUMNS, GRADIENT, GRADIENT_STRIDE, PROJECTION, ROWS, SCRATCH
from worker.apollo.kernels.common import fold, pointer


@triton.jit(do_not_specialize=["first"])
def project_tall(
    parameters, bindings, tiles, first, projections, scratch, partial_squares,
    G_TYPE: tl.constexpr, ALIGNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """R = G P^T and ||G||^2 for BR whole rows of a tall matrix."""
    tile = first + tl.program_id(0)
    position = tl.load(tiles + 2 * tile).to(tl.int64)
    block = tl.load(tiles + 2 * tile + 1).to(tl.int64)
    parameter, binding = parameters + position * COLUMNS, bindings + position * BINDINGS
    rows = tl.load(parameter + ROWS)
    cols = tl.load(parameter + COLS).to(tl.int32)
    stride = tl.load(binding + GRADIENT_STRIDE)
    if ALIGNED:  # so that accesses become 16 bytes wide
        tl.multiple_of(cols, 8)
        tl.multiple_of(stride, 8)
    g = pointer(tl.load(binding + GRADIENT), G_TYPE, ALIGNED)
    p = projections + tl.load(parameter + PROJECTION)

    row = block * BR + tl.arange(0, BR)
    r = tl.zeros([BR, BC // 8], tl.float32)
    squares = tl.zeros([BR, BC // 8], tl.float32)
    for start in range(0, cols, BC):
        col = start + tl.arange(0, BC)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(g + row[:, None] * stride + col[None, :], mask, other=0).to(tl.float32)
        along = tl.load(p + col, col < cols, other=0)
        r += fold(x * along[None, :], BR, BC)
        squares += fold(x * x, BR, BC)
    tl.store(scratch + tl.load(parameter + SCRATCH) + row, tl.sum(r, 1), row < rows)
    tl.store(partial_squares + tile, tl.sum(tl.sum(squares, 1), 0))


@triton.jit(do_not_specialize=["first"])
def project_wide(
    parameters, bindings, tiles, first, projections, scratch, partial_squares,
    G_TYPE: tl.constexpr, ALIGNED: tl.constexpr, TR: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """P^T G over TR rows of BC columns, one of the partial rows of R, and ||G||^2, of a wide matrix."""
    tile = first + tl.program_id(0)
    position = tl.load(tiles + 2 * tile).to(tl.int64)
    block = tl.load(tiles + 2 * tile + 1)
    parameter, binding = parameters + position * COLUMNS, bindings + position * BINDINGS
    rows = tl.load(parameter + ROWS).to(tl.int32)
    cols = tl.load(parameter + COLS).to(tl.int32)
    stride = tl.load(binding + GRADIENT_STRIDE)
    if ALIGNED:  # so that accesses become 16 bytes wide
        tl.multiple_of(cols, 8)
        tl.multiple_of(stride, 8)
    g = pointer(tl.load(binding + GRADIENT), G_TYPE, ALIGNED)
    p = projections + tl.load(parameter + PROJECTION)

    across = tl.cdiv(cols, BC)
    part = block // across
    col = (block % across) * BC + tl.arange(0, BC)
    r = tl.zeros([BR, BC], tl.float32)
    squares = tl.zeros([BR, BC // 8], tl.float32)
    for start in range(part * TR, min(part * TR + TR, rows), BR):
        row = start + tl.arange(0, BR)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(g + row[:, None].to(tl.int64) * stride + col[None, :], mask, other=0).to(tl.float32)
        along = tl.load(p + row, row < rows, other=0)
        r += x * along[:, None]
        squares += fold(x * x, BR, BC)
    target = scratch + tl.load(parameter + SCRATCH) + part.to(tl.int64) * cols
    tl.store(target + col, tl.sum(r, 0), col < cols)
    tl.store(partial_squares + tile, tl.sum(tl.sum(squares, 1), 0))


@triton.jit(do_not_specialize=["first"])
def square(parameters, bindings, tiles, first, partial_squares, G_TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """||G||^2 of BLOCK elements of an AdamW parameter."""
    tile = first + tl.program_id(0)
    position = tl.load(tiles + 2 * tile).to(tl.int64)
    parameter, binding = parameters + position * COLUMNS, bindings + position * BINDINGS
    cols = tl.load(parameter + COLS)
    element = tl.load(tiles + 2 * tile + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = pointer(tl.load(binding + GRADIENT), G_TYPE, False)
    offset = element // cols * tl.load(binding + GRADIENT_STRIDE) + element % cols
    x = tl.load(g + offset, element < tl.load(parameter + ROWS) * cols, other=0).to(tl.float32)
    tl.store(partial_squares + tile, tl.sum(x * x, 0))
