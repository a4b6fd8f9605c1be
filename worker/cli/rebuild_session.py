"""The flags of the commands that make the live weights again (`tandem rollback`, `tandem forget`), and their session.

Invariant: the caller holds the worker's lock.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import redis

from producer.cli import redis_option
from worker.cli.places import run_dir_option, state_dir_option
from worker.config.hyperparameters import Hyperparameters
from worker.config.update_options import Apply, ApplySettings, apply_option, max_tokens_option, memory_option
from worker.orchestrator.session import Session, open_session
from worker.utils.unix_socket import default_run_dir
from worker.versions import ledger

F = TypeVar("F", bound=Callable[..., Any])


def rebuild_options(command: F) -> F:
    """Click decorator: --redis as `redis_url`, and the keyword arguments of `rebuild_session`."""
    options = (apply_option, max_tokens_option, memory_option, redis_option, run_dir_option, state_dir_option)
    for option in reversed(options):
        command = option(command)
    return command


def rebuild_session(
    connection: redis.Redis,
    name: str,
    *,
    apply: Apply,
    max_tokens: int,
    memory: float | None,
    run_dir: Path | None,
    state_dir: Path | None,
) -> AbstractContextManager[Session]:
    """A session in which nothing new is trained. name: who the server says holds it. Raises as `open_session` does."""
    return open_session(
        run_dir or default_run_dir(),
        name,
        Hyperparameters(),
        state_dir=state_dir,
        known=ledger.state(connection),
        settings=ApplySettings(apply, memory=memory),
        max_tokens=max_tokens,
    )
