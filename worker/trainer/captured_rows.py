"""The rows of a model that are replayed as CUDA graphs: made in the warm-up, found by what is trained.

    rows = rows_of(model)
    rows.capture(model.model, sweep, {512: True})             # in the warm-up, by factors, and never in traffic
    row = rows.of(batch, by_factors=True)                     # None: launch its kernels
    rows.lend(model, size)                                    # long rows may use so many bytes of theirs meanwhile

Belongs to the model, as its graphs do to the weights' addresses: every trainer of the model finds them.
Must not know: Redis, vLLM, the header, versions.
Invariants: the graphs share one pool of memory, so that all rows together hold what the longest holds. It is theirs
alone, or lent to the inputs of long rows' layers: while one of these may still be read, no row is replayed. A capture
that fails changes nothing: kernels are launched as before, random numbers and allocator go on.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch

from worker.data.packing import Batch
from worker.memory.plan import gigabytes
from worker.model.lent_memory import LentMemory, lend
from worker.trainer.captured_row import CapturedRow, alias, no_collector
from worker.trainer.factor_sweep import FactorSweep

log = logging.getLogger("tandem")
BESIDE = 4
"""Streams for norms: each of their products is too small for all multiprocessors."""


class CapturedRows:
    """By size in tokens, and by whether they leave factors."""

    def __init__(self) -> None:
        self.held_bytes = 0
        """What torch's allocator took for the graphs; it counts as free there, and is not."""
        self._rows: dict[tuple[int, bool], CapturedRow] = {}
        self._pool: Any = None
        self._streams: list[torch.cuda.Stream] = []
        self._failed = False
        self.capturing = False
        """Whether a row is being captured, or run for the last time before it."""
        self._lent: LentMemory | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, tokens: int, *, by_factors: bool) -> CapturedRow | None:
        """The graphs of rows of `tokens` tokens."""
        return self._rows.get((tokens, by_factors))

    def of(self, batch: Batch, *, by_factors: bool) -> CapturedRow | None:
        """What stands in for the layers over `batch`, a packed row; None where no graphs were made of its kind, or it
        has more sequences than they have places, or their memory is in use."""
        if self._lent is not None and self._lent.is_used:
            return None
        row = self.get(batch.input_ids.numel(), by_factors=by_factors)
        return row if row is not None and len(batch.lengths) <= row.places else None

    def capture(self, body: Any, sweep: FactorSweep, by_factors: Mapping[int, bool]) -> bool:
        """Make graphs of rows: tokens of each, and whether it leaves factors. All run once before the first graph takes
        memory for good. False where one fails: why is logged, and its row stays launched."""
        if not self._streams:
            self._streams = [torch.cuda.Stream() for _ in range(1 + BESIDE)]
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.capturing = True
        try:
            ready = {}
            for tokens in sorted(by_factors, reverse=True):
                with self._saying(tokens), _recording(sweep, by_factors[tokens]):
                    ready[tokens] = CapturedRow(body, sweep, tokens, self._streams)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            for tokens, row in ready.items():
                with self._saying(tokens):
                    self._capture(row, sweep, by_factors[tokens])
        finally:
            self.capturing = False
        torch.cuda.empty_cache()
        self.held_bytes += max(0, torch.cuda.memory_reserved() - before)
        self._failed |= len(ready) < len(by_factors)
        return all(self.get(tokens, by_factors=factors) for tokens, factors in by_factors.items())

    def _capture(self, row: CapturedRow, sweep: FactorSweep, by_factors: bool) -> None:
        if self._failed and self._rows:
            raise RuntimeError("after a failed capture it would need more memory")
        try:
            with _undone_if_it_fails(self._pool), _recording(sweep, by_factors):
                row.capture(sweep, self._pool)
        except Exception:
            self._failed, self._pool = True, torch.cuda.graph_pool_handle()  # to torch the old one is being filled
            raise
        self._rows[row.tokens, by_factors] = row

    @contextmanager
    def _saying(self, tokens: int) -> Iterator[None]:
        """What goes wrong is logged, and no more."""
        try:
            yield
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            log.warning("rows of %s tokens are not replayed as CUDA graphs, but launched: %s", f"{tokens:,}", reason)
            log.debug("where the capture failed", exc_info=error)

    def lend(self, model: Any, size: int) -> None:
        """Have `model` keep inputs of layers that it computes again in `size` bytes of the graphs' memory, which holds
        as much: after the last capture, once. Whatever a replay left there is lost in a long row's forward pass. Where
        a capture has failed, all graphs are given up: without the loan they would not fit beside a long row."""
        if not self._rows or self._lent is not None:
            return
        if self._failed:
            log.warning("every row is launched: a capture has failed, and graphs lend nothing then")
            self._rows.clear()
            self.held_bytes = 0
            torch.cuda.empty_cache()
            return
        torch.cuda.empty_cache()  # as the capture would: what it frees hides what it takes
        before = torch.cuda.memory_reserved()
        with no_collector(), torch.cuda.graph(torch.cuda.CUDAGraph(), pool=self._pool, stream=self._streams[0]):
            region = torch.empty(size, dtype=torch.uint8, device=next(model.parameters()).device)
            region[:1].zero_()  # torch warns of a capture without a kernel
        grown = torch.cuda.memory_reserved() - before
        self.held_bytes += max(0, grown)
        if grown > 0:
            log.warning(
                "the graphs' memory has no %s in one piece: %s more were taken", gigabytes(size), gigabytes(grown)
            )
        self._lent = lend(model, alias(region))

    def watched(self) -> AbstractContextManager[None]:
        """Around a long row's passes: raises `LentMemoryError` where what it keeps in lent memory does not stay."""
        return nullcontext() if self._lent is None else self._lent.watched()


def rows_of(model: Any) -> CapturedRows:
    """Those of `model`, however many trainers it has."""
    if not isinstance(known := getattr(model, "_captured_rows", None), CapturedRows):
        known = model._captured_rows = CapturedRows()
    return known


def _recording(sweep: FactorSweep, by_factors: bool) -> AbstractContextManager[None]:
    return sweep.factors.recording() if by_factors else nullcontext()


@contextmanager
def _undone_if_it_fails(pool: Any) -> Iterator[None]:
    """A capture that torch breaks off leaves its stream current, the allocator filling `pool`, and the generator of
    random numbers waiting for the end of the capture. Seen with torch 2.11."""
    stream, device = torch.cuda.current_stream(), torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    state = generator.get_state()
    try:
        yield
    except Exception:
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):  # where it was ended after all
            torch._C._cuda_endAllocateToPool(device, pool)  # type: ignore[attr-defined]
            torch._C._cuda_releasePool(device, pool)  # type: ignore[attr-defined]
        fresh = torch.Generator(device=f"cuda:{device}")
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        raise
