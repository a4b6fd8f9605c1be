"""What one dashboard looks at, and how its pages get it: status, history, marks; each may be away.

Must not know: torch, vLLM.
Invariants: a page never fails because a part is away: what cannot be read is empty, and `trouble` says why; every read
has a bound in time and in size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from flask import current_app

from producer.connection import redis_errors, safe_url
from producer.errors import TandemError
from worker.operations import history
from worker.operations.checkpoints import checkpoints, state_dir
from worker.operations.history import History
from worker.operations.status import gather
from worker.web.protection import Tokens
from worker.web.rollback_child import Rollbacks

ANSWER_SECONDS = 2.0
"""How long the server may take to say whose model it serves."""


@dataclass
class Site:
    """Of one application. given_state_dir: --state-dir; connection: to Redis, with short limits."""

    redis_url: str
    run_dir: Path
    given_state_dir: Path | None
    allow_actions: bool
    connection: redis.Redis
    rollback_options: Sequence[str] = ()
    tokens: Tokens = field(default_factory=Tokens)

    def __post_init__(self) -> None:
        self.rollbacks = Rollbacks(self.redis_url, self.run_dir, self.given_state_dir, self.rollback_options)
        self.where = safe_url(self.redis_url)

    def status(self) -> dict[str, Any]:
        """`worker.operations.status.gather`."""
        return gather(self.redis_url, self.run_dir)

    def history(self, count: int, newest: int | None = None) -> tuple[History, str | None]:
        """`worker.operations.history.read`, and what is in the way of it."""
        try:
            with redis_errors(self.where):
                return history.read(self.connection, count, newest), None
        except TandemError as error:
            return History(), str(error)

    def marks(self) -> tuple[dict[int, str], str | None]:
        """Version -> mark of its checkpoint, and why they are not known."""
        try:
            return checkpoints(state_dir(self.given_state_dir, self.run_dir, ANSWER_SECONDS) / "checkpoints"), None
        except (TandemError, OSError) as error:
            return {}, str(error)


def site() -> Site:
    """That of the application which answers now."""
    found: Site = current_app.extensions["tandem"]
    return found
