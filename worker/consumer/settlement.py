"""How the jobs of a batch are finished that a worker trained and did not live to settle.

Must not know: torch, what a version is.
"""

from collections.abc import Callable
from typing import Any

import redis
from redis.client import Pipeline

from worker.consumer import jobs, transitions


def settle_with_rq(connection: redis.Redis) -> Callable[[dict[str, Any]], Callable[[Pipeline], None]]:
    """How a batch is settled that a dead worker trained: results -> what finishes its jobs on a pipeline."""
    queue = jobs.open_queue(connection)
    return lambda results: transitions.settle_recorded(queue, results)
