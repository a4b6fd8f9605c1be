"""What the tests of feedback on recorded completions share: records, and a step that remembers what it was given."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis
from completion_parts import completion
from drain_parts import Ready, Weights
from producer_parts import queued

from producer.completions import Completion, save
from producer.transcript import Transcript
from worker.config.protocol import Update

__all__ = ["Remembering", "queued", "recorded"]

HOUR = 3600.0


def recorded(connection: redis.Redis, **changes: Any) -> Completion:
    """A completion that a server has kept; nobody is known to have asked for it unless `changes` name a user."""
    one = completion(**({"user": None} | changes))
    save(connection, one, HOUR, 1 << 26)
    return one


class Remembering(Weights):
    """`given`: every transcript that was trained, in order, as the worker read it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen: dict[str, Transcript] = {}
        self.given: list[tuple[str, Transcript]] = []

    def prepare(self, job_id: str, transcript: Transcript) -> Ready:
        self.seen[job_id] = transcript
        return super().prepare(job_id, transcript)

    def run(self, prepared: Sequence[Ready]) -> Update:
        update = super().run(prepared)
        self.given += [(job_id, self.seen[job_id]) for job_id in update.results]
        return update
