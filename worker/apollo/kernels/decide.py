"""Between the passes: is every gradient finite, and by what is each multiplied; at the end the step is counted."""

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl

from worker.apollo.kernels.columns import (
    BAD,
    CHUNK,
    CHUNKS,
    COLUMNS,
    FACTOR,
    FRONT,
    GAMMA,
    GROUP,
    INDEX,
    KEPT,
    KNOBS,
    LIMITER_FLOOR,
    LONGEST,
    MOVED,
    NORM_EPS,
    PARTS,
    SCRATCH,
    SQUARES,
    UNTOLD,
    WRITTEN,
    M,
    V,
)
from worker.apollo.kernels.common import count_own, moments, step_size, steps_of


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
        length = tl.load(parameter + KEPT)
        k = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there = k < length
        source = scratch + tl.load(parameter + SCRATCH) + k
        r = tl.zeros([BLOCK], tl.float32)
        for part in range(0, tl.load(parameter + PARTS)):
            r += tl.load(source + part * length, there, other=0)
        knob = knobs + tl.load(parameter + GROUP) * KNOBS
        m_at = tl.load(parameter + M).to(tl.pointer_type(tl.float32)) + k
        v_at = tl.load(parameter + V).to(tl.pointer_type(tl.float32)) + k
        m, v, n = moments(tl.load(m_at, there, other=0), tl.load(v_at, there, other=0), r, knob)
        tl.store(m_at, m, there)
        tl.store(v_at, v, there)
        tl.store(partial_norms + 2 * chunk, tl.sum(n * n, 0))
        tl.store(partial_norms + 2 * chunk + 1, tl.sum(r * r, 0))


@triton.jit(do_not_specialize=["first", "count"])
def matrix_factor(
    parameters, first, count, knobs, roots, previous, statistics, partial_norms, control,
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
        length = tl.load(parameter + LONGEST)
        floor = LIMITER_FLOOR * tl.sqrt(length.to(tl.float64))
        tl.store(memory, tl.maximum(factor * g_norm, floor).to(tl.float32))

        steps = steps_of(parameter)
        factor *= tl.where(front != 0, 1.0, root) * step_size(knob, steps + 1)
        count_own(parameter, steps)
        tl.store(statistics + FACTOR * count + position, factor.to(tl.float32))
        tl.store(statistics + MOVED * count + position, (factor * factor * squares).to(tl.float32))
        tl.store(statistics + WRITTEN * count + position, 1.0)


@triton.jit
def finish(steps, control):
    """Count the step, or remember that it was refused."""
    bad = tl.load(control + BAD)
    tl.store(steps, tl.load(steps) + tl.where(bad == 0, 1, 0))
    untold = tl.load(control + UNTOLD)
    tl.store(control + UNTOLD, tl.where(untold == 0, bad, untold))
