"""Losses of the canary sets as a worker writes them to Redis (worker/orchestrator/canary.py), as plain values.

Must not know: torch, RQ.
Invariants: whatever lies there, nothing is raised; only names that a set can have, since they are labels of a metric,
finite losses, and no more than `MOST`.
"""

import json
import math

from worker.config.guard_options import CANARY, NAME

MOST = 50
"""Sets that are told of."""


def read(losses: str | None, alone: str | None) -> dict[str, float]:
    """Loss by name, in nats a trained token. losses: JSON of all sets, name -> loss; None from an older worker, which
    wrote `alone`, the loss of the one set that it had."""
    try:
        said = json.loads(losses) if losses is not None else {CANARY: alone} if alone is not None else {}
        found = {name: float(loss) for name, loss in said.items() if loss is not None and NAME.fullmatch(name)}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    finite = [(name, loss) for name, loss in found.items() if math.isfinite(loss)]
    return dict(finite[:MOST])
