"""Triton kernels of a step: formulas.py and philox.py, mirrored, over all logical matrices in a handful of launches.

A launch covers a range of *tiles*; the tile table says which parameter a tile belongs to, the parameter table where its
weight, gradient and state are. Parameters are numbered by position, an order that cuda.py chooses.

Invariants: a tile's shape depends on its parameter alone, every sum runs in a fixed order and nothing is atomic, so a
result does not depend on what else is in the launch. Every element offset is 64-bit. Nothing is written to a weight or
a state when `control[BAD]` says that some gradient of this step is not finite.

Bytes moved for a bf16 matrix: 2 an element in `project_*` (the gradient), 6 in `apply` (gradient and weight in, weight
out); the rest is a few numbers a row or a column.
"""

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl

# Columns of the parameter table, int64 [parameters, COLUMNS].
ROWS = tl.constexpr(0)
COLS = tl.constexpr(1)
M = tl.constexpr(2)  # addresses of the moments
V = tl.constexpr(3)
PROJECTION = tl.constexpr(4)  # offset into all projections
SCRATCH = tl.constexpr(5)  # offset into the partial projections R
PARTS = tl.constexpr(6)  # how many partial rows R comes in: 1 for a tall matrix, row blocks for a wide one
TILE = tl.constexpr(7)  # first tile and number of tiles of pass 1
TILES = tl.constexpr(8)
CHUNK = tl.constexpr(9)  # first chunk and number of chunks of R
CHUNKS = tl.constexpr(10)
ID = tl.constexpr(11)
FIRST = tl.constexpr(12)  # element number of the first element in the unsharded matrix, and that matrix's row length
FULL_COLS = tl.constexpr(13)
GROUP = tl.constexpr(14)
INDEX = tl.constexpr(15)  # the parameter's place in the state area
OUT_TILE = tl.constexpr(16)  # first tile and number of tiles of pass 2
OUT_TILES = tl.constexpr(17)
COLUMNS = tl.constexpr(18)

# Columns of the binding table, int64 [parameters, BINDINGS]: what may differ from step to step.
WEIGHT = tl.constexpr(0)
WEIGHT_STRIDE = tl.constexpr(1)
GRADIENT = tl.constexpr(2)
GRADIENT_STRIDE = tl.constexpr(3)
BINDINGS = tl.constexpr(4)

# Columns of the hyper-parameter table, float64 [groups, KNOBS].
RATE = tl.constexpr(0)  # formulas.learning_rate
BETA1 = tl.constexpr(1)
BETA2 = tl.constexpr(2)
EPS = tl.constexpr(3)
DECAY = tl.constexpr(4)
FRONT = tl.constexpr(5)
GAMMA = tl.constexpr(6)
KNOBS = tl.constexpr(7)

# control, int64: 1 + index of the first bad parameter of this step; the same of the first step nobody was told about.
BAD = tl.constexpr(0)
UNTOLD = tl.constexpr(1)
CONTROLS = tl.constexpr(2)

# statistics, float32 [STATISTICS, parameters]
SQUARES = tl.constexpr(0)  # ||G||^2
FACTOR = tl.constexpr(1)  # what G is multiplied with before it is subtracted
MOVED = tl.constexpr(2)  # squared norm of the update
WRITTEN = tl.constexpr(3)  # 1 if this step has written the parameter
STATISTICS = tl.constexpr(4)

NORM_EPS = tl.constexpr(1e-8)
LIMITER_FLOOR = tl.constexpr(1e-3)


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _fold(x, ROWS_: tl.constexpr, COLS_: tl.constexpr):
    """Sums of 8 neighbours, which one thread holds: [ROWS_, COLS_] -> [ROWS_, COLS_ // 8]."""
    return tl.sum(tl.reshape(x, [ROWS_, COLS_ // 8, 8]), 2)


# -- pass 1: the gradient, once ---------------------------------------------------------------------------------------


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
    g = _pointer(tl.load(binding + GRADIENT), G_TYPE, ALIGNED)
    p = projections + tl.load(parameter + PROJECTION)

    row = block * BR + tl.arange(0, BR)
    r = tl.zeros([BR, BC // 8], tl.float32)
    squares = tl.zeros([BR, BC // 8], tl.float32)
    for start in range(0, cols, BC):
        col = start + tl.arange(0, BC)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(g + row[:, None] * stride + col[None, :], mask, other=0).to(tl.float32)
        along = tl.load(p + col, col < cols, other=0)
        r += _fold(x * along[None, :], BR, BC)
        squares += _fold(x * x, BR, BC)
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
    g = _pointer(tl.load(binding + GRADIENT), G_TYPE, ALIGNED)
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
        squares += _fold(x * x, BR, BC)
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
    g = _pointer(tl.load(binding + GRADIENT), G_TYPE, False)
    offset = element // cols * tl.load(binding + GRADIENT_STRIDE) + element % cols
    x = tl.load(g + offset, element < tl.load(parameter + ROWS) * cols, other=0).to(tl.float32)
    tl.store(partial_squares + tile, tl.sum(x * x, 0))


# -- between the passes: a few numbers a matrix -----------------------------------------------------------------------


@triton.jit(do_not_specialize=["first"])
def total(parameters, first, partials, totals, START: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """totals[position] = the sum of a parameter's tiles' partial sums."""
    position = first + tl.program_id(0)
    parameter = parameters + position.to(tl.int64) * COLUMNS
    start, count = tl.load(parameter + START), tl.load(parameter + COUNT)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for i in range(0, count, BLOCK):
        sums += tl.load(partials + start + i + lane, i + lane < count, other=0)
    tl.store(totals + position, tl.sum(sums, 0))


@triton.jit(do_not_specialize=["first", "count"])
def judge(parameters, first, count, statistics, control, BLOCK: tl.constexpr):
    """Note the first parameter, in the state area's order, whose ||G||^2 is not finite."""
    lane = tl.arange(0, BLOCK)
    worst = tl.full([BLOCK], 1 << 40, tl.int64)
    for i in range(0, count, BLOCK):
        there = i + lane < count
        squares = tl.load(statistics + first + i + lane, there, other=0)  # SQUARES is row 0
        index = tl.load(parameters + (first + i + lane).to(tl.int64) * COLUMNS + INDEX, there, other=0)
        finite = squares < float("inf")  # false for NaN as well
        worst = tl.where(finite, worst, tl.minimum(worst, index + 1))
    found = tl.min(worst, 0)
    known = tl.load(control + BAD)
    if (known == 0) & (found < (1 << 40)):
        tl.store(control + BAD, found)


@triton.jit(do_not_specialize=["first"])
def update_moments(
    parameters, chunks, first, knobs, scratch, statistics, partial_norms, control,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """R of BLOCK rows or columns from its parts; m, v; the chunk's shares of ||N||^2 and ||R||^2."""
    chunk = first + tl.program_id(0)
    position = tl.load(chunks + 2 * chunk).to(tl.int64)
    parameter = parameters + position * COLUMNS
    if (tl.load(control + BAD) == 0) & (tl.load(statistics + position) > 0):
        rows, cols = tl.load(parameter + ROWS), tl.load(parameter + COLS)
        length = tl.maximum(rows, cols)
        k = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there = k < length
        source = scratch + tl.load(parameter + SCRATCH) + k
        r = tl.zeros([BLOCK], tl.float32)
        for part in range(0, tl.load(parameter + PARTS)):
            r += tl.load(source + part * length, there, other=0)
        knob = knobs + tl.load(parameter + GROUP) * KNOBS
        m_at = tl.load(parameter + M).to(tl.pointer_type(tl.float32)) + k
        v_at = tl.load(parameter + V).to(tl.pointer_type(tl.float32)) + k
        m, v, n = _moments(tl.load(m_at, there, other=0), tl.load(v_at, there, other=0), r, knob)
        tl.store(m_at, m, there)
        tl.store(v_at, v, there)
        tl.store(partial_norms + 2 * chunk, tl.sum(n * n, 0))
        tl.store(partial_norms + 2 * chunk + 1, tl.sum(r * r, 0))


@triton.jit
def _moments(m, v, r, knob):
    """formulas.update_moments and formulas.normalised."""
    beta1, beta2 = tl.load(knob + BETA1), tl.load(knob + BETA2)
    m = beta1.to(tl.float32) * m + (1 - beta1).to(tl.float32) * r
    v = beta2.to(tl.float32) * v + (1 - beta2).to(tl.float32) * (r * r)
    return m, v, tl.div_rn(m, tl.sqrt_rn(v) + tl.load(knob + EPS).to(tl.float32))


@triton.jit
def _step_size(knob, t):
    """formulas.step_size: rate * sqrt(1 - b2^t) / (1 - b1^t), in float64."""
    beta1, beta2 = tl.load(knob + BETA1), tl.load(knob + BETA2)
    power1, power2 = beta1 * 0 + 1, beta2 * 0 + 1
    while t > 0:
        power1 *= tl.where(t & 1 == 1, beta1, 1.0)
        power2 *= tl.where(t & 1 == 1, beta2, 1.0)
        beta1 *= beta1
        beta2 *= beta2
        t = t >> 1
    return tl.load(knob + RATE) * tl.sqrt(1 - power2) / (1 - power1)


@triton.jit(do_not_specialize=["first", "count"])
def matrix_factor(
    parameters, first, count, knobs, roots, steps, previous, statistics, partial_norms, control,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """formulas.matrix_factor, in float64: statistics[FACTOR] and the limiter's memory, for one matrix."""
    position = (first + tl.program_id(0)).to(tl.int64)
    parameter = parameters + position * COLUMNS
    squares = tl.load(statistics + SQUARES * count + position).to(tl.float64)
    if (tl.load(control + BAD) == 0) & (squares > 0):
        start, chunks = tl.load(parameter + CHUNK), tl.load(parameter + CHUNKS)
        lane = tl.arange(0, BLOCK)
        n_squares, r_squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        for i in range(0, chunks, BLOCK):
            there = i + lane < chunks
            n_squares += tl.load(partial_norms + 2 * (start + i + lane), there, other=0).to(tl.float64)
            r_squares += tl.load(partial_norms + 2 * (start + i + lane) + 1, there, other=0).to(tl.float64)
        n_norm, r_norm, g_norm = tl.sqrt(tl.sum(n_squares, 0)), tl.sqrt(tl.sum(r_squares, 0)), tl.sqrt(squares)

        knob = knobs + tl.load(parameter + GROUP) * KNOBS
        root, front, gamma = tl.load(roots + position), tl.load(knob + FRONT), tl.load(knob + GAMMA)
        memory = previous + tl.load(parameter + INDEX)
        before = tl.load(memory).to(tl.float64)
        factor = n_norm / (r_norm + NORM_EPS) * tl.where(front != 0, root, 1.0)
        growth = factor * g_norm / (before + NORM_EPS)
        factor = tl.where((before != 0) & (growth > gamma), factor / (growth / gamma), factor)
        length = tl.maximum(tl.load(parameter + ROWS), tl.load(parameter + COLS))
        floor = LIMITER_FLOOR * tl.sqrt(length.to(tl.float64))
        tl.store(memory, tl.maximum(factor * g_norm, floor).to(tl.float32))

        factor *= tl.where(front != 0, 1.0, root) * _step_size(knob, tl.load(steps) + 1)
        tl.store(statistics + FACTOR * count + position, factor.to(tl.float32))
        tl.store(statistics + MOVED * count + position, (factor * factor * squares).to(tl.float32))
        tl.store(statistics + WRITTEN * count + position, 1.0)


# -- pass 2: the weights ----------------------------------------------------------------------------------------------


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
def _bits_of_blocks(block, step, id, key0, key1, ROWS_: tl.constexpr, COLS_: tl.constexpr):
    """Rounding bits of whole Philox blocks [ROWS_, COLS_ // 8] (int64): uint32 [ROWS_, COLS_], each below 65536."""
    w0, w1, w2, w3 = _philox(block.to(tl.uint32), (block >> 32).to(tl.uint32), step, id, key0, key1)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [.., 2, 2]: word 2 i + j at [i, j]
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS_, COLS_])


@triton.jit
def _bits_of_elements(element, step, id, key0, key1):
    """Rounding bits of elements (int64) that need not start a block: a Philox block each, of which one lane is used."""
    block = element >> 3
    w0, w1, w2, w3 = _philox(block.to(tl.uint32), (block >> 32).to(tl.uint32), step, id, key0, key1)
    lane = (element & 7).to(tl.uint32)
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    return tl.where(lane % 2 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def _rounded(value, bits):
    """philox.round_stochastic."""
    return ((value.to(tl.uint32, bitcast=True) + bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["first", "count", "key0", "key1"])
def apply(
    parameters, bindings, tiles, first, count, knobs, steps, statistics, partial_weights, key0, key1,
    G_TYPE: tl.constexpr, W_TYPE: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr,
    TR: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """W <- (W - factor * G) * (1 - decay) for a TR x BC tile of a matrix, and the tile's share of ||W||^2 before."""
    tile = first + tl.program_id(0)
    position = tl.load(tiles + 2 * tile).to(tl.int64)
    block = tl.load(tiles + 2 * tile + 1)
    written = tl.load(statistics + WRITTEN * count + position)  # 0: a zero gradient, or a refused step
    if written != 0:
        parameter, binding = parameters + position * COLUMNS, bindings + position * BINDINGS
        rows = tl.load(parameter + ROWS).to(tl.int32)
        cols = tl.load(parameter + COLS).to(tl.int32)
        g_stride = tl.load(binding + GRADIENT_STRIDE)
        w_stride = tl.load(binding + WEIGHT_STRIDE)
        if ALIGNED:
            tl.multiple_of(cols, 8)
            tl.multiple_of(g_stride, 8)
            tl.multiple_of(w_stride, 8)
        g = _pointer(tl.load(binding + GRADIENT), G_TYPE, ALIGNED)
        w = _pointer(tl.load(binding + WEIGHT), W_TYPE, ALIGNED)
        factor = tl.load(statistics + FACTOR * count + position)
        decay = tl.load(knobs + tl.load(parameter + GROUP) * KNOBS + DECAY).to(tl.float32)
        id = tl.load(parameter + ID).to(tl.uint32)
        step = (tl.load(steps) + 1).to(tl.uint32)
        k0, k1 = key0.to(tl.uint32), key1.to(tl.uint32)
        numbered, full_cols = tl.load(parameter + FIRST), tl.load(parameter + FULL_COLS)

        across = tl.cdiv(cols, BC)
        top, left = (block // across) * TR, (block % across) * BC
        col = left + tl.arange(0, BC)
        squares = tl.zeros([BR, BC // 8], tl.float32)
        for start in range(top, min(top + TR, rows), BR):
            row = start + tl.arange(0, BR)
            mask = (row < rows)[:, None] & (col < cols)[None, :]
            row_ = row[:, None].to(tl.int64)
            at = w + row_ * w_stride + col[None, :]
            x = tl.load(g + row_ * g_stride + col[None, :], mask, other=0).to(tl.float32)
            value = tl.load(at, mask, other=0).to(tl.float32)
            squares += _fold(value * value, BR, BC)
            value -= factor * x
            value -= decay * value
            if STOCHASTIC:
                if ALIGNED:
                    eighth = left // 8 + tl.arange(0, BC // 8)
                    blocks = ((numbered + row_ * full_cols) >> 3) + eighth[None, :]
                    bits = _bits_of_blocks(blocks, step, id, k0, k1, BR, BC)
                else:
                    bits = _bits_of_elements(numbered + row_ * full_cols + col[None, :], step, id, k0, k1)
                tl.store(at, _rounded(value, bits), mask)
            else:
                tl.store(at, value.to(W_TYPE), mask)
        tl.store(partial_weights + tile, tl.sum(tl.sum(squares, 1), 0))


@triton.jit(do_not_specialize=["first", "count", "key0", "key1"])
def apply_adamw(
    parameters, bindings, tiles, first, count, knobs, steps, statistics, partial_weights, partial_moved, control,
    key0, key1, G_TYPE: tl.constexpr, W_TYPE: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW in the same terms, U = N with R = G, for BLOCK elements of a small parameter."""
    tile = first + tl.program_id(0)
    position = tl.load(tiles + 2 * tile).to(tl.int64)
    if tl.load(control + BAD) == 0:
        parameter, binding = parameters + position * COLUMNS, bindings + position * BINDINGS
        cols = tl.load(parameter + COLS)
        element = tl.load(tiles + 2 * tile + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there = element < tl.load(parameter + ROWS) * cols
        row, col = element // cols, element % cols
        g = _pointer(tl.load(binding + GRADIENT), G_TYPE, False) + row * tl.load(binding + GRADIENT_STRIDE) + col
        w = _pointer(tl.load(binding + WEIGHT), W_TYPE, False) + row * tl.load(binding + WEIGHT_STRIDE) + col
        m_at = tl.load(parameter + M).to(tl.pointer_type(tl.float32)) + element
        v_at = tl.load(parameter + V).to(tl.pointer_type(tl.float32)) + element
        knob = knobs + tl.load(parameter + GROUP) * KNOBS
        x = tl.load(g, there, other=0).to(tl.float32)
        value = tl.load(w, there, other=0).to(tl.float32)
        m, v, n = _moments(tl.load(m_at, there, other=0), tl.load(v_at, there, other=0), x, knob)
        tl.store(m_at, m, there)
        tl.store(v_at, v, there)
        update = _step_size(knob, tl.load(steps) + 1).to(tl.float32) * n
        tl.store(partial_weights + tile, tl.sum(value * value, 0))
        tl.store(partial_moved + tile, tl.sum(update * update, 0))
        tl.store(statistics + WRITTEN * count + position, 1.0)
        value -= update
        value -= tl.load(knob + DECAY).to(tl.float32) * value
        if STOCHASTIC:
            numbered = tl.load(parameter + FIRST) + row * tl.load(parameter + FULL_COLS) + col
            step, id = (tl.load(steps) + 1).to(tl.uint32), tl.load(parameter + ID).to(tl.uint32)
            bits = _bits_of_elements(numbered, step, id, key0.to(tl.uint32), key1.to(tl.uint32))
            tl.store(w, _rounded(value, bits), there)
        else:
            tl.store(w, value.to(W_TYPE), there)


@triton.jit
def finish(steps, control):
    """Count the step, or remember that it was refused."""
    bad = tl.load(control + BAD)
    tl.store(steps, tl.load(steps) + tl.where(bad == 0, 1, 0))
    untold = tl.load(control + UNTOLD)
    tl.store(control + UNTOLD, tl.where(untold == 0, bad, untold))
