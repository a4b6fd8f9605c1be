"""Takes the texts and tokens of transcripts that were dropped out of the journal.

Must not know: torch, Redis.
Invariants: the journal keeps every version, id and step; a batch that lost somebody is trained again as it was before,
without them, since whoever was dropped is left out anyway. Closed files are rewritten whole or not at all.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from worker.checkpoint.journal import Journal
from worker.checkpoint.records import UpdateRecord
from worker.data.replay_buffer import PREFIX


def redact(journal: Journal, ids: Collection[str]) -> int:
    """Empty the places of `ids` in all batches, also in those of versions that were never applied; returns in how many.

    All of `ids` must have been dropped. Raises `JournalError`.
    """
    wanted = frozenset(ids)

    def without(path: Path, at: int, record: dict[str, Any]) -> dict[str, Any]:
        batch = record.get("batch") if record["kind"] == UpdateRecord.kind else None
        if not batch or not any(_is_of(item, wanted) for item in batch):
            return record
        return record | {"batch": [_emptied(item) if _is_of(item, wanted) else item for item in batch]}

    if not wanted:
        return 0
    journal.rotate()
    return journal.rewrite(without)


def _is_of(item: dict[str, Any], ids: frozenset[str]) -> bool:
    """Whether an item of a batch is one of these transcripts, also where it was rehearsed, and is not empty yet."""
    return str(item["id"]).removeprefix(PREFIX) in ids and bool(item["sequences"] or item["transcript"])


def _emptied(item: dict[str, Any]) -> dict[str, Any]:
    """The place stays, so that a batch is still known to have had more in it."""
    return {"id": item["id"], "transcript": {}, "weight": item["weight"], "sequences": []}
