"""A step on a CPU: the formulas, in chunks of rows so that fp32 copies stay small.

Every sum, and so every decision, is torch's. The bf16 weights of a large model are written by compiled_write.py, all
else (small models, fp32 weights, rounding to nearest) by torch, in `_write`. Both give the same bits.

Of a matrix that is divided over processes, R and the norms are added up over them (`cpu_shards`): after the pass over
the gradients, after N is known, and for the totals. A matrix that a process holds as a whole is computed
as if there were no others.

Bitwise repeatable for a fixed number of threads.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from worker.apollo import compiled_write, cpu_factored, cpu_shards, formulas, philox
from worker.apollo.compiled_write import Write
from worker.apollo.cpu_factored import Sums
from worker.apollo.cpu_shards import Measured
from worker.apollo.errors import ApolloError, NonFiniteGradientError
from worker.apollo.parameters import Options, Slot, Totals
from worker.apollo.products import FromGradientsAlone
from worker.apollo.state_layout import APOLLO, FACTORED, StateArea

CHUNK = 1 << 20
"""Elements that are held in fp32 at a time (at least one row)."""

COMPILED_FROM = 1 << 24
"""Elements of bf16 weights from which on a model is written by compiled code. Below, torch takes 0.2 s for a sweep, and
loading the compiler takes half a second of every start."""


def _chunks(slot: Slot) -> Iterator[tuple[slice, int]]:
    """(rows, number of the first in the whole matrix) of one chunk after the other."""
    step = max(1, CHUNK // slot.cols)
    for rows, number in slot.runs:
        for start in range(rows.start, rows.stop, step):
            yield slice(start, min(start + step, rows.stop)), number + start - rows.start


class CpuBackend(FromGradientsAlone):
    """See `parameters.Backend`."""

    def __init__(self, slots: Sequence[Slot], area: StateArea, options: Options) -> None:
        self.slots, self.area, self.options = slots, area, options
        self._step_scale = 1.0
        self._drawn: int | None = None
        self._projections: dict[int, Tensor] = {}
        self._totals = Totals(0.0, 0.0, 0)
        self._update_squares = self._weight_squares = 0.0
        self._parts = torch.zeros(2, dtype=torch.float64)  # of the same two: what shards contribute
        self._elements = 0
        if any(slot.shard is not None for slot in slots) and options.sum_over_shards is None:
            raise ApolloError("parameters are shards, and no sum_over_shards says what the others hold")
        written = sum(s.rows * s.cols for s in slots if s.parameter.dtype == torch.bfloat16)
        wanted = options.stochastic and written >= COMPILED_FROM
        self._kernel = compiled_write.load() if wanted else None
        self._memory = torch.empty(0)

    def order(self) -> Sequence[Slot]:
        return self.slots

    def begin(self, draw: int, step_scale: float) -> None:
        self.prepare(draw, step_scale)

    def capture(self, pairs: Sequence[tuple[Slot, Tensor]]) -> Callable[[], None]:
        raise ApolloError("capture() records a CUDA graph: the parameters are on a CPU")

    def prepare(self, draw: int, step_scale: float = 1.0) -> None:
        self._step_scale = step_scale
        if draw != self._drawn:
            self._drawn, self._projections = draw, {}
        self._update_squares = self._weight_squares = 0.0
        self._parts.zero_()
        self._elements = 0

    def update(self, pairs: Sequence[tuple[Slot, Tensor]]) -> None:
        pairs = [(slot, slot.matrix(gradient, "the gradient")) for slot, gradient in pairs]
        ours = [self._measure(slot, gradient) for slot, gradient in pairs]
        measured = cpu_shards.gradients([slot for slot, _ in pairs], ours, self.options.sum_over_shards)
        for (slot, _), (_, g_norm) in zip(pairs, measured, strict=True):
            if not math.isfinite(g_norm):
                raise NonFiniteGradientError(slot.name)
        norms = self._follow(
            [(s, r) for (s, _), (r, g_norm) in zip(pairs, measured, strict=True) if isinstance(r, Tensor) and g_norm]
        )
        later: list[Write] = []
        for (slot, gradient), (found, g_norm) in zip(pairs, measured, strict=True):
            if found is None:
                self._adamw(slot, gradient)
            elif g_norm == 0:
                continue  # nothing changes
            elif isinstance(found, Sums):
                later += self._factored(slot, gradient, found)
            else:
                later += self._apollo(slot, gradient, *norms[slot.index], g_norm)
        if later:  # all at once: torch's threads still spin for a moment after each of its operations
            self._write_all(later)

    def finish(self) -> None:
        self.area.step_count.add_(1)
        if self.options.sum_over_shards is not None:
            self.options.sum_over_shards([self._parts])
        moved, weight = self._parts.tolist()
        self._totals = Totals(self._update_squares + moved, self._weight_squares + weight, self._elements)

    def check(self) -> None:
        pass  # update() has raised already

    def totals(self) -> Totals:
        return self._totals

    def _projection(self, slot: Slot) -> Tensor:
        if slot.index not in self._projections:
            assert self._drawn is not None
            self._projections[slot.index] = self.options.draw(slot, self._drawn)
        return self._projections[slot.index]

    def _widened(self, rows: Tensor, own: bool = False) -> Tensor:
        """`rows` in fp32, bf16 ones in memory that the next call uses again: new pages cost more than the sums. own:
        fp32 ones, too, so that the caller may write to it."""
        if rows.dtype == torch.float32 and not own:
            return rows
        if self._memory.numel() < rows.numel():
            self._memory = torch.empty(rows.numel())
        return self._memory[: rows.numel()].view(rows.shape).copy_(rows)

    def _measure(self, slot: Slot, gradient: Tensor) -> Measured:
        """One pass over the gradient."""
        own = slot.algorithm == FACTORED
        chunks = ((rows, self._widened(gradient[rows], own)) for rows, _ in _chunks(slot))
        if slot.algorithm == FACTORED:
            return cpu_factored.measure(slot, self.area.moments(slot.index), self._own_t(slot), chunks)
        squares = 0.0
        wanted = slot.algorithm == APOLLO
        tall = slot.tall
        r = torch.zeros((slot.rows if tall else slot.cols) if wanted else 0)
        for rows, g in chunks:
            squares += float(torch.linalg.vector_norm(g)) ** 2
            if wanted and tall:
                r[rows] = formulas.project(g, self._projection(slot), tall)
            elif wanted:
                r += formulas.project(g, self._projection(slot)[rows], tall)
        return r if wanted else None, math.sqrt(squares) if squares >= 0 else squares  # NaN stays NaN

    def _follow(self, found: Sequence[tuple[Slot, Tensor]]) -> dict[int, tuple[float, float]]:
        """Moments follow R; (||N||, ||R||) of the whole matrix by the slot's index."""
        norms = {}
        for slot, r in found:
            m, v = self.area.moments(slot.index)
            formulas.update_moments(m, v, r, *slot.group["betas"])
            n = formulas.normalised(m, v, slot.group["eps"])
            norms[slot.index] = float(torch.linalg.vector_norm(n)), float(torch.linalg.vector_norm(r))
        return cpu_shards.norms([slot for slot, _ in found], norms, self.options.sum_over_shards)

    def _apollo(self, slot: Slot, gradient: Tensor, n_norm: float, r_norm: float, g_norm: float) -> list[Write]:
        """What is left to be written by compiled code."""
        previous = self.area.previous[slot.index : slot.index + 1]
        factor, remembered = formulas.matrix_factor(
            n_norm,
            r_norm,
            g_norm,
            float(previous),
            slot.root,
            slot.group["scale_front"],
            slot.group["gamma"],
            formulas.limiter_floor(*slot.whole),
        )
        previous.fill_(remembered)
        step = self._step_size(slot) * factor
        self._count(slot)
        self._update_squares += (step * g_norm) ** 2
        self._elements += math.prod(slot.whole)
        if self._is_compiled(slot):
            return [self._later(slot, rows, number, gradient[rows], step) for rows, number in _chunks(slot)]
        for rows, number in _chunks(slot):
            self._write(slot, rows, number, gradient[rows].float(), step)
        return []

    def _factored(self, slot: Slot, gradient: Tensor, sums: Sums) -> list[Write]:
        """What is left to be written by compiled code."""
        scaling = cpu_factored.keep(slot, self.area.moments(slot.index), sums, self._own_t(slot))
        self._count(slot)
        step = self._rate(slot) * scaling.size
        self._update_squares += step**2 * scaling.x_squares
        self._elements += slot.rows * slot.cols
        later: list[Write] = []
        for rows, number in _chunks(slot):
            scales = scaling.rows[rows], scaling.cols
            if self._is_compiled(slot):
                later.append(self._later(slot, rows, number, gradient[rows], step, scales))
            else:
                self._write(slot, rows, number, gradient[rows].float() * scales[0][:, None] * scales[1], step)
        return later

    def _adamw(self, slot: Slot, gradient: Tensor) -> None:
        """AdamW in the same terms: U = N, with R = G."""
        m, v = (state.view(slot.rows, slot.cols) for state in self.area.moments(slot.index))
        step = self._step_size(slot)
        for rows, number in _chunks(slot):
            formulas.update_moments(m[rows], v[rows], gradient[rows].float(), *slot.group["betas"])
            n = formulas.normalised(m[rows], v[rows], slot.group["eps"])
            moved = (step * float(torch.linalg.vector_norm(n))) ** 2
            if slot.shard is None:
                self._update_squares += moved
            else:
                self._parts[0] += moved
            if self._is_compiled(slot):
                self._write_all([self._later(slot, rows, number, n, step)])
            else:
                self._write(slot, rows, number, n, step)
        self._elements += math.prod(slot.whole)

    def _step_size(self, slot: Slot) -> float:
        beta1, beta2 = slot.group["betas"]
        return formulas.step_size(self._rate(slot), beta1, beta2, self._own_t(slot))

    def _rate(self, slot: Slot) -> float:
        return formulas.learning_rate(slot.group["lr"], self._step_scale)

    @property
    def _t(self) -> int:
        return int(self.area.step_count) + 1

    def _own_t(self, slot: Slot) -> int:
        """The t of the bias correction: of a matrix of a stack, which may have missed steps, its own."""
        taken = self.area.taken(slot.index)
        return self._t if taken is None else int(taken) + 1

    def _count(self, slot: Slot) -> None:
        """A matrix of a stack has taken a step."""
        if (taken := self.area.taken(slot.index)) is not None:
            taken.add_(1)

    def _decay(self, slot: Slot) -> float:
        return self._rate(slot) * slot.group["weight_decay"]

    def _weigh(self, slot: Slot, value: Tensor) -> None:
        """Count some rows of a weight, fp32 and not yet written."""
        squares = float(torch.linalg.vector_norm(value)) ** 2
        if slot.shard is None:
            self._weight_squares += squares
        else:
            self._parts[1] += squares

    def _is_compiled(self, slot: Slot) -> bool:
        return self._kernel is not None and slot.parameter.dtype == torch.bfloat16

    def _later(
        self,
        slot: Slot,
        rows: slice,
        number: int,
        direction: Tensor,
        step: float,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> Write:
        """What `_write` does, but that the weights are still to be written."""
        weight, place = slot.matrix(slot.parameter, "the weight")[rows], slot.place
        self._weigh(slot, self._widened(weight))
        first = number * place.full_cols + place.col
        draw = (self.options.seed, self._t, slot.id)
        return Write(weight, direction, step, self._decay(slot), *draw, first, place.full_cols, scales)

    def _write_all(self, writes: Sequence[Write]) -> None:
        assert self._kernel is not None
        compiled_write.write_all(writes, self._kernel)

    def _write(self, slot: Slot, rows: slice, number: int, direction: Tensor, step: float) -> None:
        """W <- apply(W, direction), rounded as asked, for some rows, the first of which is the whole's row `number`."""
        weight = slot.matrix(slot.parameter, "the weight")[rows]
        value = weight.float() if weight.dtype != torch.float32 else weight
        self._weigh(slot, value)
        formulas.apply(value, direction, step, self._decay(slot))
        if weight.dtype == torch.float32:
            return
        if self.options.stochastic:
            value = philox.round_stochastic(value, self._bits(slot, rows.stop - rows.start, number))
        weight.copy_(value)  # rounds to nearest what is still fp32

    def _bits(self, slot: Slot, count: int, number: int) -> Tensor:
        """Rounding bits of `count` rows from the whole's row `number` on: int32 [count, cols]."""
        place = slot.place
        first = (number + torch.arange(count)) * place.full_cols + place.col
        if slot.cols == place.full_cols:  # consecutive rows are consecutive elements
            bits = philox.rounding_bits(self.options.seed, self._t, slot.id, first[:1], count * slot.cols)
        else:
            bits = philox.rounding_bits(self.options.seed, self._t, slot.id, first, slot.cols)
        return bits.view(count, slot.cols)
