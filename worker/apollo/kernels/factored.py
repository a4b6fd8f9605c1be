"""The factored rule (factored.py, mirrored): means of G^2 over rows and columns, and what X is multiplied with.

    sum_strip    pass 1 where a program sees whole rows: sums of G^2 by row and by column, and S, in one read
    sum_tile     pass 1 of wider ones: sums of a tile by row and by column; `square_update` reads G again for ||X||^2
    collapse     adds up the partial sums            follow    the running means; a and b
    matrix_size  the one number of a matrix          (the write is write.apply)

`sides` holds, for each parameter from SIDES on: `rows` numbers (first the means of G^2, then a), `cols` numbers (the
same for b), and `cols` numbers S. Partial sums lie in `scratch`, which later launches use again.
Invariants: as in __init__.py; no state changes before `follow`.
"""

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl

from worker.apollo.kernels.columns import (
    BAD,
    BETA2,
    BINDINGS,
    CHUNK,
    CHUNKS,
    COLS,
    COLUMNS,
    EPS,
    FACTOR,
    GRADIENT,
    GRADIENT_STRIDE,
    GROUP,
    KNOBS,
    MOVED,
    PARTS,
    RATE,
    ROW_SCRATCH,
    ROWS,
    SCRATCH,
    SIDES,
    SQUARES,
    STRIP,
    WRITTEN,
    M,
    V,
)
from worker.apollo.kernels.common import count_own, fold, pointer, power, steps_of


@triton.jit
def correction(knob, steps):
    """factored.correction, in float64, of the step after `steps`."""
    return 1 - power(tl.load(knob + BETA2), steps + 1)


@triton.jit
def followed(kept, mean, knob):
    """factored.follow."""
    beta2 = tl.load(knob + BETA2)
    return beta2.to(tl.float32) * kept + (1 - beta2).to(tl.float32) * mean


@triton.jit
def row_factor(r, corrected, eps):
    """factored.row_factors."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(r, corrected)) + eps)


@triton.jit
def column_factor(c, corrected, eps):
    """factored.column_factors."""
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.div_rn(c, corrected)), eps))


@triton.jit(do_not_specialize=["first"])
def sum_strip(
    parameters, bindings, tiles, first, knobs, sides, scratch, partial_squares,
    G_TYPE: tl.constexpr, ALIGNED: tl.constexpr, TR: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """TR whole rows of at most BC columns: their means of G^2, and their shares of the columns' sums of G^2 and S."""
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
    knob = knobs + tl.load(parameter + GROUP) * KNOBS
    corrected = correction(knob, steps_of(parameter)).to(tl.float32)
    eps = tl.load(knob + EPS).to(tl.float32)
    kept = tl.load(parameter + M).to(tl.pointer_type(tl.float32))
    side = sides + tl.load(parameter + SIDES)

    col = tl.arange(0, BC)
    sums, weighted = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    whole = tl.zeros([BR], tl.float32)
    for start in tl.range(block * TR, min(block * TR + TR, rows), BR, num_stages=STAGES):
        row = start + tl.arange(0, BR)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(g + row[:, None].to(tl.int64) * stride + col[None, :], mask, other=0).to(tl.float32)
        squares = x * x
        in_rows = tl.sum(squares, 1)
        whole += in_rows
        mean = in_rows / cols
        tl.store(side + row, mean, row < rows)
        r = followed(tl.load(kept + row, row < rows, other=0), mean, knob)
        a = tl.where(row < rows, row_factor(r, corrected, eps), 0.0)
        sums += tl.sum(squares, 0)
        weighted += tl.sum(squares * (a * a)[:, None], 0)
    target = scratch + tl.load(parameter + SCRATCH) + block.to(tl.int64) * 2 * cols + col
    tl.store(target, sums, col < cols)
    tl.store(target + cols, weighted, col < cols)
    tl.store(partial_squares + tile, tl.sum(whole, 0))


@triton.jit(do_not_specialize=["first"])
def sum_tile(
    parameters, bindings, tiles, first, scratch, partial_squares,
    G_TYPE: tl.constexpr, ALIGNED: tl.constexpr, TR: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The shares of TR rows and BC columns in the sums of G^2 by row and by column."""
    tile = first + tl.program_id(0)
    position = tl.load(tiles + 2 * tile).to(tl.int64)
    block = tl.load(tiles + 2 * tile + 1)
    parameter, binding = parameters + position * COLUMNS, bindings + position * BINDINGS
    rows = tl.load(parameter + ROWS).to(tl.int32)
    cols = tl.load(parameter + COLS).to(tl.int32)
    stride = tl.load(binding + GRADIENT_STRIDE)
    if ALIGNED:
        tl.multiple_of(cols, 8)
        tl.multiple_of(stride, 8)
    g = pointer(tl.load(binding + GRADIENT), G_TYPE, ALIGNED)

    across = tl.cdiv(cols, BC)
    part, strip = block // across, block % across
    col = strip * BC + tl.arange(0, BC)
    by_rows = scratch + tl.load(parameter + ROW_SCRATCH) + strip.to(tl.int64) * rows
    sums = tl.zeros([BR, BC], tl.float32)
    whole = tl.zeros([BR], tl.float32)
    for start in range(part * TR, min(part * TR + TR, rows), BR):
        row = start + tl.arange(0, BR)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(g + row[:, None].to(tl.int64) * stride + col[None, :], mask, other=0).to(tl.float32)
        squares = x * x
        in_rows = tl.sum(fold(squares, BR, BC), 1)
        whole += in_rows
        tl.store(by_rows + row, in_rows, row < rows)
        sums += squares
    target = scratch + tl.load(parameter + SCRATCH) + part.to(tl.int64) * cols
    tl.store(target + col, tl.sum(sums, 0), col < cols)
    tl.store(partial_squares + tile, tl.sum(whole, 0))


@triton.jit
def _added(source, parts, pitch, there, BLOCK: tl.constexpr, PARTS_: tl.constexpr):
    """The sum of `parts` vectors, `pitch` apart, at `source` [BLOCK]."""
    sums = tl.zeros([PARTS_, BLOCK], tl.float32)
    for start in range(0, parts, PARTS_):
        part = start + tl.arange(0, PARTS_).to(tl.int64)
        mask = (part < parts)[:, None] & there[None, :]
        sums += tl.load(source[None, :] + part[:, None] * pitch, mask, other=0)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["first"])
def collapse(
    parameters, chunks, first, scratch, sides,
    ACROSS: tl.constexpr, BLOCK: tl.constexpr, PARTS_: tl.constexpr,
):  # fmt: skip
    """The means of G^2 of BLOCK rows or columns, and S, from their partial sums. ACROSS: `sum_tile`'s BC."""
    chunk = first + tl.program_id(0)
    position = tl.load(chunks + 2 * chunk).to(tl.int64)
    number = tl.load(chunks + 2 * chunk + 1).to(tl.int64)
    parameter = parameters + position * COLUMNS
    rows, cols, is_strip = tl.load(parameter + ROWS), tl.load(parameter + COLS), tl.load(parameter + STRIP)
    parts = tl.load(parameter + PARTS)
    side = sides + tl.load(parameter + SIDES)
    in_rows = tl.cdiv(rows, BLOCK)
    if number < in_rows:
        if is_strip == 0:  # sum_strip has the rows' means already
            k = number * BLOCK + tl.arange(0, BLOCK)
            source = scratch + tl.load(parameter + ROW_SCRATCH) + k
            found = _added(source, tl.cdiv(cols, ACROSS), rows, k < rows, BLOCK, PARTS_)
            tl.store(side + k, found / cols.to(tl.float32), k < rows)
    else:
        k = (number - in_rows) * BLOCK + tl.arange(0, BLOCK)
        source = scratch + tl.load(parameter + SCRATCH) + k
        pitch = tl.where(is_strip != 0, 2 * cols, cols)
        found = _added(source, parts, pitch, k < cols, BLOCK, PARTS_)
        tl.store(side + rows + k, found / rows.to(tl.float32), k < cols)
        if is_strip != 0:
            weighted = _added(source + cols, parts, pitch, k < cols, BLOCK, PARTS_)
            tl.store(side + rows + cols + k, weighted, k < cols)


@triton.jit(do_not_specialize=["first"])
def follow(
    parameters, chunks, first, knobs, statistics, sides, partial_norms, control,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """r of BLOCK rows, or c of BLOCK columns; a or b in place of the means; the chunk's shares of the sum of r and of
    ||X||^2, the latter where S is known."""
    chunk = first + tl.program_id(0)
    position = tl.load(chunks + 2 * chunk).to(tl.int64)
    parameter = parameters + position * COLUMNS
    if (tl.load(control + BAD) == 0) & (tl.load(statistics + position) > 0):  # SQUARES is row 0
        number = tl.load(chunks + 2 * chunk + 1).to(tl.int64)
        rows, cols = tl.load(parameter + ROWS), tl.load(parameter + COLS)
        side = sides + tl.load(parameter + SIDES)
        knob = knobs + tl.load(parameter + GROUP) * KNOBS
        corrected = correction(knob, steps_of(parameter)).to(tl.float32)
        eps = tl.load(knob + EPS).to(tl.float32)
        in_rows = tl.cdiv(rows, BLOCK)
        if number < in_rows:
            k = number * BLOCK + tl.arange(0, BLOCK)
            kept = tl.load(parameter + M).to(tl.pointer_type(tl.float32)) + k
            r = followed(tl.load(kept, k < rows, other=0), tl.load(side + k, k < rows, other=0), knob)
            tl.store(kept, r, k < rows)
            tl.store(side + k, row_factor(r, corrected, eps), k < rows)
            tl.store(partial_norms + 2 * chunk, tl.sum(r, 0))
            tl.store(partial_norms + 2 * chunk + 1, 0.0)
        else:
            k = (number - in_rows) * BLOCK + tl.arange(0, BLOCK)
            kept = tl.load(parameter + V).to(tl.pointer_type(tl.float32)) + k
            c = followed(tl.load(kept, k < cols, other=0), tl.load(side + rows + k, k < cols, other=0), knob)
            tl.store(kept, c, k < cols)
            b = column_factor(c, corrected, eps)
            tl.store(side + rows + k, b, k < cols)
            known = tl.where(tl.load(parameter + STRIP) != 0, cols, 0)  # how many S there are
            weighted = tl.load(side + rows + cols + k, k < known, other=0)
            tl.store(partial_norms + 2 * chunk, 0.0)
            tl.store(partial_norms + 2 * chunk + 1, tl.sum(b * b * weighted, 0))


@triton.jit(do_not_specialize=["first"])
def square_update(
    parameters, bindings, tiles, first, sides, partial_squares,
    G_TYPE: tl.constexpr, ALIGNED: tl.constexpr, TR: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """||X||^2 of one of `sum_tile`'s tiles."""
    tile = first + tl.program_id(0)
    position = tl.load(tiles + 2 * tile).to(tl.int64)
    block = tl.load(tiles + 2 * tile + 1)
    parameter, binding = parameters + position * COLUMNS, bindings + position * BINDINGS
    rows = tl.load(parameter + ROWS).to(tl.int32)
    cols = tl.load(parameter + COLS).to(tl.int32)
    stride = tl.load(binding + GRADIENT_STRIDE)
    if ALIGNED:
        tl.multiple_of(cols, 8)
        tl.multiple_of(stride, 8)
    g = pointer(tl.load(binding + GRADIENT), G_TYPE, ALIGNED)
    side = sides + tl.load(parameter + SIDES)

    across = tl.cdiv(cols, BC)
    part, strip = block // across, block % across
    col = strip * BC + tl.arange(0, BC)
    b = tl.load(side + rows + col, col < cols, other=0)
    total = tl.zeros([BR, BC // 8], tl.float32)
    for start in range(part * TR, min(part * TR + TR, rows), BR):
        row = start + tl.arange(0, BR)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(g + row[:, None].to(tl.int64) * stride + col[None, :], mask, other=0).to(tl.float32)
        x = x * tl.load(side + row, row < rows, other=0)[:, None] * b[None, :]
        total += fold(x * x, BR, BC)
    tl.store(partial_squares + tile, tl.sum(tl.sum(total, 1), 0))


@triton.jit(do_not_specialize=["first", "count"])
def matrix_size(
    parameters, first, count, knobs, statistics, partial_norms, control,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """factored.matrix_factor times the rate, in float64: statistics[FACTOR] of one matrix.

    statistics[MOVED] holds ||X||^2 where `square_update` measured it, else 0; afterwards the update's squared norm.
    """
    position = (first + tl.program_id(0)).to(tl.int64)
    parameter = parameters + position * COLUMNS
    if (tl.load(control + BAD) == 0) & (tl.load(statistics + SQUARES * count + position) > 0):
        start, chunks = tl.load(parameter + CHUNK), tl.load(parameter + CHUNKS)
        lane = tl.arange(0, BLOCK)
        r_sums, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        for i in range(0, chunks, BLOCK):
            there = i + lane < chunks
            r_sums += tl.load(partial_norms + 2 * (start + i + lane), there, other=0).to(tl.float64)
            squares += tl.load(partial_norms + 2 * (start + i + lane) + 1, there, other=0).to(tl.float64)
        moved = statistics + MOVED * count + position
        x_squares = tl.sum(squares, 0) + tl.load(moved).to(tl.float64)
        knob = knobs + tl.load(parameter + GROUP) * KNOBS
        rows, cols = tl.load(parameter + ROWS).to(tl.float64), tl.load(parameter + COLS).to(tl.float64)
        steps = steps_of(parameter)
        root = tl.sqrt(tl.sum(r_sums, 0) / rows / correction(knob, steps))
        count_own(parameter, steps)
        size = tl.load(knob + RATE) * root / tl.maximum(1.0, root * tl.sqrt(x_squares / (rows * cols)))
        tl.store(statistics + FACTOR * count + position, size.to(tl.float32))
        tl.store(moved, (size * size * x_squares).to(tl.float32))
        tl.store(statistics + WRITTEN * count + position, 1.0)
