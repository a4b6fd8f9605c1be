"""A CPU's write of bf16 weights, stochastically rounded, as one compiled pass: `formulas.apply`, `philox.rounding_bits`
and `philox.round_stochastic` in registers, where torch takes some eighty passes over int64 copies.

    kernel = load()            # once a process, at a start: compiles, or reads what an earlier process compiled
    write_all(writes, kernel)  # with as many threads as torch has now

Compiled by numba, which vLLM brings and which needs no compiler on the machine. None of numba's thread pools is used:
the kernel releases the GIL, and plain threads live for one call. So nothing spins or waits beside the server between
two versions, and a fork finds no pool.

Must not know: the model.
Invariants: every weight gets the bits that torch would write, NaN, infinities and denormals included. So a + alpha * b
is fused where torch fuses it, and fast-math is off. `load` compares on this very machine. A weight is written once, and
its bits depend on its place alone: threads and pieces change nothing. Memory is little-endian, as all that vLLM and
numba run on.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker.apollo import formulas, philox
from worker.apollo.errors import ApolloError

log = logging.getLogger("tandem")

Kernel = Callable[..., None]
"""`cpu_kernel._write_rows`, compiled."""

_NONE = np.empty(0, np.float32)

PIECE = 1 << 18
"""Elements that a thread takes at a time (at least one row): about a millisecond."""


@dataclass(frozen=True)
class Write:
    """W <- apply(W, direction), rounded with the bits of (seed, t, id, element number), still to be done.

    scales: where given, fp32 [rows] and [cols]: element (i, j) of `direction` is first multiplied with i's number and
    then with j's, rounded each time.

    weight: bf16 [rows, cols]; direction: bf16 or fp32 [rows, cols]; both with unit column stride and any row stride.
    step, decay: as `formulas.apply`. first: element number of weight[0, 0]; pitch: how far apart those of two rows are.
    """

    weight: Tensor
    direction: Tensor
    step: float
    decay: float
    seed: int
    t: int
    id: int
    first: int
    pitch: int
    scales: tuple[Tensor, Tensor] | None = None

    def calls(self) -> Iterator[tuple[Any, ...]]:
        """The arguments of `_write_rows` for one piece after the other."""
        rows, cols = self.weight.shape
        weight, direction = _flat(self.weight), _flat(self.direction)
        w_stride, d_stride = self.weight.stride(0), self.direction.stride(0)
        numbers = (
            _fp32(-self.step),
            bool(self.decay),
            _fp32(-self.decay),
            *(np.uint64(word) for word in philox.seed_words(self.seed)),
            np.uint64(self.t & 0xFFFFFFFF),
            np.uint64(self.id & 0xFFFFFFFF),
        )
        by_rows, by_cols = (one.numpy() for one in self.scales) if self.scales else (_NONE, _NONE)
        # rows that lie end to end are one long row
        whole = w_stride == d_stride == self.pitch == cols and self.scales is None
        step = max(1, PIECE // cols)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            shape = (1, count * cols) if whole else (count, cols)
            matrices = (weight[row * w_stride :], w_stride, direction[row * d_stride :], d_stride)
            scales = (by_rows[row : row + count], by_cols)
            yield (*matrices, *shape, self.first + row * self.pitch, self.pitch, *numbers, *scales)


def _fp32(number: float) -> np.float32:
    """As torch converts the `alpha` of add(). Raises `ApolloError` where torch does not convert it."""
    if math.isfinite(number) and abs(number) > torch.finfo(torch.float32).max:
        raise ApolloError(f"a step or a decay of {abs(number):.3g} is beyond fp32: use a smaller lr or weight_decay")
    return np.float32(number)


def _flat(matrix: Tensor) -> np.ndarray:
    """All memory between the first and the last element of [rows, cols], one dimension: uint16 (bf16) or float32."""
    rows, cols = matrix.shape
    flat = matrix.as_strided(((rows - 1) * matrix.stride(0) + cols,), (1,))
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy().view(np.uint16)
    return flat.numpy()


def write_all(writes: Sequence[Write], kernel: Kernel) -> None:
    """Do all of them, with as many threads as torch has now, this one among them; back when the last has ended."""
    pieces = [call for write in writes for call in write.calls()]
    pieces.reverse()  # taken from the end

    def work() -> None:
        while True:
            try:
                call = pieces.pop()  # one step of the interpreter: no two threads get the same piece
            except IndexError:
                return
            kernel(*call)

    others = min(torch.get_num_threads(), len(pieces)) - 1
    with ThreadPoolExecutor(max(1, others), "sweep") as pool:  # starts a thread for each submit, and none before
        ends = [pool.submit(work) for _ in range(others)]
        work()
    for end in ends:
        end.result()


@functools.cache
def load() -> Kernel | None:
    """The compiled kernel, once a process. None where it does not give torch's bits; the log says so.

    Raises `ApolloError` where numba cannot be imported or compiles nothing.
    """
    started = time.monotonic()
    try:
        from worker.apollo.cpu_kernel import compiled

        kernel = compiled()
    except ImportError as error:
        raise ApolloError(
            f"numba, which compiles the CPU's sweep, cannot be imported ({error}): pip install 'tandem-worker[worker]' "
            "installs it"
        ) from error
    if not _gives_torchs_bits(kernel):
        log.warning(
            "the CPU's sweep is torch's, about ten times slower: compiled, it does not give the same bits on this CPU"
        )
        return None
    log.info("the CPU's sweep is compiled: %.1f s", time.monotonic() - started)
    return kernel


def _gives_torchs_bits(kernel: Kernel) -> bool:
    """On a few thousand weights of all sizes. Some are brought to nearly nothing, where it shows how often the
    arithmetic was rounded: torch rounds once on a CPU with fused arithmetic, else twice."""
    step, decay, seed, t, id, first = 0.3, 0.01, 5, 6, 7, 11
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(7, 301, generator=generator) for _ in range(2))
    weight = weight.mul_(torch.logspace(-40, 38, 301)).bfloat16()
    gradient[4:] = weight[4:].float() / step
    by_rows, by_cols = torch.rand(7, generator=generator) + 0.5, torch.rand(301, generator=generator) + 0.5
    cases = [(given, scales) for given in (gradient, gradient.bfloat16()) for scales in (None, (by_rows, by_cols))]
    for direction, scales in cases:
        scaled = direction.float() if scales is None else direction.float() * by_rows[:, None] * by_cols
        value = formulas.apply(weight.float(), scaled, step, decay)
        bits = philox.rounding_bits(seed, t, id, torch.tensor([first]), weight.numel()).view(weight.shape)
        wanted = philox.round_stochastic(value, bits)
        got = weight.clone()
        for call in Write(got, direction, step, decay, seed, t, id, first, weight.shape[1], scales).calls():
            kernel(*call)
        if not torch.equal(got.view(torch.int16), wanted.view(torch.int16)):
            return False
    return True
