"""Pass 2: the weights are read, moved and written, each once."""

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl

from worker.apollo.kernels.columns import (
    BAD,
    BINDINGS,
    COLS,
    COLUMNS,
    DECAY,
    FACTOR,
    FIRST,
    FULL_COLS,
    GRADIENT,
    GRADIENT_STRIDE,
    GROUP,
    ID,
    KNOBS,
    ROWS,
    SIDES,
    WEIGHT,
    WEIGHT_STRIDE,
    WRITTEN,
    M,
    V,
)
from worker.apollo.kernels.common import fold, moments, numbered_rows, pieces_of, pointer, step_size
from worker.apollo.kernels.rounding import bits_of_blocks, bits_of_elements, rounded


@triton.jit(do_not_specialize=["first", "count", "key0", "key1"])
def apply(
    parameters, bindings, tiles, first, count, knobs, steps, statistics, partial_weights, key0, key1, sides,
    G_TYPE: tl.constexpr, W_TYPE: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, SCALED: tl.constexpr,
    TR: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """W <- (W - factor * G) * (1 - decay) for a TR x BC tile of a matrix, and the tile's share of ||W||^2 before.

    SCALED: G is first multiplied with what kernels/factored.py made of its row and of its column.
    """
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
        g = pointer(tl.load(binding + GRADIENT), G_TYPE, ALIGNED)
        w = pointer(tl.load(binding + WEIGHT), W_TYPE, ALIGNED)
        factor = tl.load(statistics + FACTOR * count + position)
        decay = tl.load(knobs + tl.load(parameter + GROUP) * KNOBS + DECAY).to(tl.float32)
        id = tl.load(parameter + ID).to(tl.uint32)
        step = (tl.load(steps) + 1).to(tl.uint32)
        k0, k1 = key0.to(tl.uint32), key1.to(tl.uint32)
        numbered, full_cols = tl.load(parameter + FIRST), tl.load(parameter + FULL_COLS)
        pieces = pieces_of(parameter)

        across = tl.cdiv(cols, BC)
        top, left = (block // across) * TR, (block % across) * BC
        col = left + tl.arange(0, BC)
        squares = tl.zeros([BR, BC // 8], tl.float32)
        if SCALED:
            by_rows = sides + tl.load(parameter + SIDES)
            by_col = tl.load(by_rows + rows + col, col < cols, other=0)
        for start in range(top, min(top + TR, rows), BR):
            row = start + tl.arange(0, BR)
            mask = (row < rows)[:, None] & (col < cols)[None, :]
            row_ = row[:, None].to(tl.int64)
            at = w + row_ * w_stride + col[None, :]
            x = tl.load(g + row_ * g_stride + col[None, :], mask, other=0).to(tl.float32)
            if SCALED:
                x = x * tl.load(by_rows + row, row < rows, other=0)[:, None] * by_col[None, :]
            value = tl.load(at, mask, other=0).to(tl.float32)
            squares += fold(value * value, BR, BC)
            value -= factor * x
            value -= decay * value
            if STOCHASTIC:
                number = numbered + numbered_rows(row_, pieces) * full_cols
                if ALIGNED:
                    eighth = left // 8 + tl.arange(0, BC // 8)
                    blocks = (number >> 3) + eighth[None, :]
                    bits = bits_of_blocks(blocks, step, id, k0, k1, BR, BC)
                else:
                    bits = bits_of_elements(number + col[None, :], step, id, k0, k1)
                tl.store(at, rounded(value, bits), mask)
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
        g = pointer(tl.load(binding + GRADIENT), G_TYPE, False) + row * tl.load(binding + GRADIENT_STRIDE) + col
        w = pointer(tl.load(binding + WEIGHT), W_TYPE, False) + row * tl.load(binding + WEIGHT_STRIDE) + col
        m_at = tl.load(parameter + M).to(tl.pointer_type(tl.float32)) + element
        v_at = tl.load(parameter + V).to(tl.pointer_type(tl.float32)) + element
        knob = knobs + tl.load(parameter + GROUP) * KNOBS
        x = tl.load(g, there, other=0).to(tl.float32)
        value = tl.load(w, there, other=0).to(tl.float32)
        m, v, n = moments(tl.load(m_at, there, other=0), tl.load(v_at, there, other=0), x, knob)
        tl.store(m_at, m, there)
        tl.store(v_at, v, there)
        update = step_size(knob, tl.load(steps) + 1).to(tl.float32) * n
        tl.store(partial_weights + tile, tl.sum(value * value, 0))
        tl.store(partial_moved + tile, tl.sum(update * update, 0))
        tl.store(statistics + WRITTEN * count + position, 1.0)
        value -= update
        value -= tl.load(knob + DECAY).to(tl.float32) * value
        if STOCHASTIC:
            numbered = numbered_rows(row, pieces_of(parameter)) * tl.load(parameter + FULL_COLS)
            numbered += tl.load(parameter + FIRST) + col
            step, id = (tl.load(steps) + 1).to(tl.uint32), tl.load(parameter + ID).to(tl.uint32)
            bits = bits_of_elements(numbered, step, id, key0.to(tl.uint32), key1.to(tl.uint32))
            tl.store(w, rounded(value, bits), there)
        else:
            tl.store(w, value.to(W_TYPE), there)
