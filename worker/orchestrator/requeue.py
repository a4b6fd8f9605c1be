"""Transcripts that were trained and are no longer in the weights go back to the queue, from the journal's own copy.

Must not know: torch.
Invariant: in one transaction an id leaves the ledger and is queued, so that it is never in neither.
"""

from collections.abc import Callable
from typing import Any

import redis
from redis.client import Pipeline
from rq.registry import FinishedJobRegistry

from producer import keys
from producer.errors import TandemError
from producer.jobs import results_key, submission
from producer.transcript import Transcript
from worker.checkpoint.journal import Journal
from worker.checkpoint.records import UpdateRecord
from worker.consumer.jobs import open_queue


class TextExpiredError(TandemError):
    """The journal no longer has the text of a transcript."""


def requeue(connection: redis.Redis, journal: Journal, ids: list[str]) -> Callable[[Pipeline], None]:
    """What queues `ids` anew, in this order, on a pipeline. Raises `TextExpiredError`, before anything is queued."""
    texts = _texts(journal, set(ids))
    finished = FinishedJobRegistry(queue=open_queue(connection)).key

    def settle(pipe: Pipeline) -> None:
        for id in ids:
            sent = submission(Transcript.from_dict(texts[id] | {"id": id}))
            pipe.hdel(keys.LEDGER, id)
            pipe.delete(sent.job.key, results_key(id))
            pipe.zrem(finished, id)
            sent.write(pipe)

    return settle


def _texts(journal: Journal, ids: set[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in journal.entries.values():
        if ids & set(entry.ids):
            record = journal.read(entry.version)
            batch = (record.batch if isinstance(record, UpdateRecord) else None) or []
            found |= {item["id"]: item["transcript"] for item in batch}
    if missing := ids - found.keys():
        raise TextExpiredError(f"--requeue: the journal no longer has the text of {min(missing)} (--keep-transcripts)")
    return found
