"""What the optimizer takes: its state, in the server's memory, and its scratch, in the trainer's.

Must not know: torch. Invariant: `state_bytes` is what worker.apollo.state_bytes says of the same shapes.
"""

import math

from worker.memory.traced_sizes import Sizes
from worker.utils.stacks import is_stack

SCRATCH = 0.006
"""The optimizer's scratch, in bytes a parameter: about 150 MB at 27B (worker/apollo/cuda.py)."""
WINDOW_BYTES = 1 << 27
STRIP = 128
"""Of the factored rule: most partial sums at a time, and the rows that have one pair of them a column
(worker.apollo.launch_tables.Tiling)."""
PART, TILE_BYTES, ENTRY_BYTES = 512, 0.0025, 400
"""Of an expert, a small matrix of which there are many: rows that have one partial projection, what tables of tiles
take in bytes a parameter, and the rest of its tables."""


def state_bytes(config: Sizes, optimizer: str = "apollo-mini") -> int:
    """Bytes of the state, without importing torch: 68 MB at 27B, 52 MB with "factored"."""
    shapes = list(config.parameters().values())
    stacked = [shape for shape in shapes if is_stack(shape)]
    counts = sum(shape[0] for shape in stacked)
    entries = [(1, shape) for shape in shapes if not is_stack(shape)] + [(shape[0], shape[1:]) for shape in stacked]
    moments = sum(
        times * _align(4 * length) for times, shape in entries for length in _lengths(shape, optimizer)
    )  # fmt: skip
    return _align(64 + 4 * (len(shapes) - len(stacked) + counts)) + _align(8 * counts) + moments


def scratch_bytes(config: Sizes, optimizer: str) -> float:
    """Bytes of the scratch."""
    shapes = list(config.parameters().values())
    plain = SCRATCH * (config.count() - config.stacks())
    plain += sum(shape[0] * _of_an_expert(*shape[1:]) for shape in shapes if is_stack(shape))
    if optimizer != "factored":
        return plain
    largest = max(math.prod(shape[1:] if is_stack(shape) else shape) for shape in shapes)
    window = max(WINDOW_BYTES, 8 * largest / STRIP)
    return plain + min(window, 1.1 * 8 * config.count() / STRIP)


def _of_an_expert(rows: int, cols: int) -> float:
    """Its projection, its partial projections, and its part of the tables."""
    parts = 1 if rows >= cols else -(-rows // PART)
    return 4 * (min(rows, cols) + parts * max(rows, cols)) + TILE_BYTES * rows * cols + ENTRY_BYTES


def _lengths(shape: tuple[int, ...], optimizer: str) -> tuple[int, int]:
    if len(shape) == 2:
        return shape if optimizer == "factored" else (max(shape), max(shape))
    return math.prod(shape), math.prod(shape)


def _align(offset: int) -> int:
    return -(-offset // 64) * 64
