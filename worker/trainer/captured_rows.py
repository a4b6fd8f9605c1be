"""The rows of a model that are replayed as CUDA graphs: made in the warm-up, found by what is trained.

    rows = rows_of(model)
    rows.capture(model.model, sweep, 512, by_factors=True)    # in the warm-up, longest first, and never in traffic
    row = rows.of(batch, by_factors=True)                     # None: launch its kernels

Belongs to the model, as its graphs do to the weights' addresses: every trainer of the model finds them.
Must not know: Redis, vLLM, the header, versions.
Invariants: the graphs share one pool of memory, which is theirs alone, so that all rows together hold what the longest
holds. A capture that fails changes nothing: kernels are launched as before, random numbers and allocator go on.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch

from worker.data.packing import Batch
from worker.trainer.captured_row import CapturedRow
from worker.trainer.factor_sweep import FactorSweep

log = logging.getLogger("tandem")


class CapturedRows:
    """By size in tokens, and by whether they leave factors."""

    def __init__(self) -> None:
        self.held_bytes = 0
        """What torch's allocator took for the graphs; it counts as free there, and is not."""
        self._rows: dict[tuple[int, bool], CapturedRow] = {}
        self._pool: Any = None
        self._stream: Any = None
        self._failed = False

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, tokens: int, *, by_factors: bool) -> CapturedRow | None:
        """The graphs of rows of `tokens` tokens."""
        return self._rows.get((tokens, by_factors))

    def of(self, batch: Batch, *, by_factors: bool) -> CapturedRow | None:
        """What stands in for the layers over `batch`, a packed row; None where no graphs were made of its kind, or it
        has more sequences than they have places."""
        row = self.get(batch.input_ids.numel(), by_factors=by_factors)
        return row if row is not None and len(batch.lengths) <= row.places else None

    def capture(self, body: Any, sweep: FactorSweep, tokens: int, *, by_factors: bool) -> bool:
        """Make graphs of a row of `tokens` tokens; the longest row comes first. False where that fails: why is
        logged, and the row stays launched."""
        if self._failed and self._rows:
            log.warning(
                "rows of %s tokens are launched: after a failed capture they would need more memory", f"{tokens:,}"
            )
            return False
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        try:
            with _undone_if_it_fails(self._pool), sweep.factors.recording() if by_factors else nullcontext():
                self._rows[tokens, by_factors] = CapturedRow(body, sweep, tokens, self._pool, self._stream)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            log.warning("rows of %s tokens are not replayed as CUDA graphs, but launched: %s", f"{tokens:,}", reason)
            log.debug("where the capture failed", exc_info=error)
            self._failed, self._pool = True, torch.cuda.graph_pool_handle()  # to torch the old one is being filled
            return False
        torch.cuda.empty_cache()
        self.held_bytes += max(0, torch.cuda.memory_reserved() - before)
        return True


def rows_of(model: Any) -> CapturedRows:
    """Those of `model`, however many trainers it has."""
    if not isinstance(known := getattr(model, "_captured_rows", None), CapturedRows):
        known = model._captured_rows = CapturedRows()
    return known


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
