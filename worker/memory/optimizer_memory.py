"""What the optimizer takes: its state, in the server's memory, and its scratch, in the trainer's.

Must not know: torch. Invariant: `state_bytes` is what worker.apollo.state_bytes says of the same shapes.
"""

import math

from worker.memory.traced_sizes import Sizes

SCRATCH = 0.006
"""The optimizer's scratch, in bytes a parameter: about 150 MB at 27B (worker/apollo/cuda.py)."""
WINDOW_BYTES = 1 << 27
STRIP = 128
"""Of the factored rule: most partial sums at a time, and the rows that have one pair of them a column
(worker.apollo.launch_tables.Tiling)."""


def state_bytes(config: Sizes, optimizer: str = "apollo-mini") -> int:
    """Bytes of the state, without importing torch: 68 MB at 27B, 52 MB with "factored"."""
    shapes = config.parameters().values()
    return _align(64 + 4 * len(shapes)) + sum(
        _align(4 * length) for shape in shapes for length in _lengths(shape, optimizer)
    )


def scratch_bytes(config: Sizes, optimizer: str) -> float:
    """Bytes of the scratch."""
    if optimizer != "factored":
        return SCRATCH * config.count()
    largest = max(math.prod(shape) for shape in config.parameters().values())
    window = max(WINDOW_BYTES, 8 * largest / STRIP)
    return SCRATCH * config.count() + min(window, 1.1 * 8 * config.count() / STRIP)


def _lengths(shape: tuple[int, ...], optimizer: str) -> tuple[int, int]:
    if len(shape) == 2:
        return shape if optimizer == "factored" else (max(shape), max(shape))
    return math.prod(shape), math.prod(shape)


def _align(offset: int) -> int:
    return -(-offset // 64) * 64
