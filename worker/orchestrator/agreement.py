"""Redis, the weights and the state directory tell one story: made so at a start, and confirmed before each version.

Invariant: the weights are the truth; Redis is told, nothing that it has is taken back.
"""

import logging
import time
from functools import partial

import redis

from worker.checkpoint.snapshots import Trained
from worker.config.protocol import UnavailableError
from worker.consumer.redis_errors import own_words, retryable
from worker.consumer.settlement import settle_with_rq
from worker.orchestrator.recovery import mend_redis, take_note, take_over
from worker.orchestrator.reports import Tell, log_report
from worker.orchestrator.session import Session
from worker.versions import ledger
from worker.versions.reconcile import reconcile

log = logging.getLogger("tandem")

REDIS_SECONDS = 60.0
"""How long a step waits for a Redis that is away. Then its jobs are put back, and the worker waits without a limit."""


class RedisBehindError(UnavailableError):
    """Redis does not know a version that is in the weights."""


def agree(connection: redis.Redis, session: Session, *, new_lineage: bool = False, tell: Tell = log_report) -> None:
    """Redis, weights and state directory tell one story afterwards; `tell` and the log hear it. Call it with the worker
    lock held."""
    manager, header = session.manager, session.weights.header
    for report in mend_redis(connection, manager, header.fields()):
        tell(report)
    for line in reconcile(
        connection,
        header.fields(),
        session.weights.record.read(),
        new_lineage=new_lineage,
        adopt=partial(take_over, manager, session.control),
        settle=settle_with_rq(connection),
    ):
        log.info(line)
    if written := take_note(manager, partial(_everybody, connection)):
        tell(written)


def confirm(connection: redis.Redis, session: Session) -> None:
    """Before a step: Redis stands where the weights do. It may have come back from an old copy with jobs that are
    trained already. Raises `RedisBehindError`. A Redis that is away is waited for; after `REDIS_SECONDS` redis' own
    error is raised where it may pass, else `UnavailableError`."""
    deadline = time.monotonic() + REDIS_SECONDS
    while True:
        try:
            known = ledger.state(connection)
            break
        except redis.RedisError as error:
            if time.monotonic() > deadline:
                if retryable(error):
                    raise
                raise UnavailableError(f"Redis refuses to say at which version it is ({own_words(error)})") from error
            time.sleep(0.2)
    header = session.weights.header.fields()
    if (known.version, known.lineage) != (header["version"], header["lineage"]):
        raise RedisBehindError(f"Redis is at version {known.version}, the weights are at {header['version']}")


def _everybody(connection: redis.Redis) -> Trained:
    return Trained(ledger.everyone(connection), ledger.dropped(connection))
