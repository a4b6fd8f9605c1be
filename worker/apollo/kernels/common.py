"""What the kernels share: typed pointers, sums that one thread holds, the moments and the step's size."""

# mypy: disable-error-code=no-untyped-def
import torch
import triton
import triton.language as tl

from worker.apollo.kernels.columns import (
    BETA1,
    BETA2,
    EPS,
    OWN_STEPS,
    RATE,
    SECOND,
    SECOND_BY,
    STEPS,
    THIRD,
    THIRD_BY,
)

TRITON = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    typed = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        typed = tl.multiple_of(typed, 16)
    return typed


@triton.jit
def fold(x, ROWS_: tl.constexpr, COLS_: tl.constexpr):
    """Sums of 8 neighbours, which one thread holds: [ROWS_, COLS_] -> [ROWS_, COLS_ // 8]."""
    return tl.sum(tl.reshape(x, [ROWS_, COLS_ // 8, 8]), 2)


@triton.jit
def moments(m, v, r, knob):
    """formulas.update_moments and formulas.normalised."""
    beta1, beta2 = tl.load(knob + BETA1), tl.load(knob + BETA2)
    m = beta1.to(tl.float32) * m + (1 - beta1).to(tl.float32) * r
    v = beta2.to(tl.float32) * v + (1 - beta2).to(tl.float32) * (r * r)
    return m, v, tl.div_rn(m, tl.sqrt_rn(v) + tl.load(knob + EPS).to(tl.float32))


@triton.jit
def pieces_of(parameter):
    """What `numbered_rows` needs to know of a parameter."""
    second, by_second = tl.load(parameter + SECOND), tl.load(parameter + SECOND_BY)
    return second, by_second, tl.load(parameter + THIRD), tl.load(parameter + THIRD_BY)


@triton.jit
def numbered_rows(row, pieces):
    """`row` (int64) as the whole matrix numbers it, less its first row here, which FIRST counts."""
    second, by_second, third, by_third = pieces
    return row + tl.where(row >= second, by_second, 0) + tl.where(row >= third, by_third, 0)


@triton.jit
def steps_of(parameter):
    """How many steps this parameter has taken before this one."""
    return tl.load(tl.load(parameter + STEPS).to(tl.pointer_type(tl.int64)))


@triton.jit
def count_own(parameter, steps):
    """A matrix of a stack has taken one step more than `steps`: the last that one of its kernels does with it."""
    at = tl.load(parameter + STEPS).to(tl.pointer_type(tl.int64))
    tl.store(at, steps + 1, tl.load(parameter + OWN_STEPS) != 0)


@triton.jit
def power(base, t):
    """base^t in float64, t at least 1."""
    result = base * 0 + 1
    while t > 0:
        result *= tl.where(t & 1 == 1, base, 1.0)
        base *= base
        t = t >> 1
    return result


@triton.jit
def step_size(knob, t):
    """formulas.step_size: rate * sqrt(1 - b2^t) / (1 - b1^t), in float64."""
    powers = power(tl.load(knob + BETA1), t), power(tl.load(knob + BETA2), t)
    return tl.load(knob + RATE) * tl.sqrt(1 - powers[1]) / (1 - powers[0])
