"""What a worker does besides training where its trainer is divided over ranks: new ones are started where one was lost.

Invariant: a batch is tried again only while no weight was touched; what is lost in a write ends the worker, and the
next start makes the weights again.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

from producer.errors import TandemError
from worker.config.protocol import UnavailableError
from worker.distributed.errors import GroupLostError, SharedFailureError
from worker.orchestrator.lone import Lone
from worker.orchestrator.rank_trainers import RankTrainers

log = logging.getLogger("tandem")
T = TypeVar("T")

TRIES = 2
"""How often a batch is tried while ranks are lost over it: then it is tried in halves."""


class RankFleet(Lone):
    """Of `ranks`, which the trainer tells what to compute."""

    def __init__(self, ranks: RankTrainers) -> None:
        self.ranks = ranks

    def attempt(self, work: Callable[[], T]) -> T:
        for left in reversed(range(TRIES)):
            self.look()
            try:
                return work()
            except GroupLostError as error:
                if not left:
                    raise SharedFailureError(f"ranks were lost {TRIES} times over this batch: {error}") from error
                log.warning("%s; no weight was touched, and the version is tried again", error)
        raise AssertionError("the last try returns or raises")

    def look(self) -> None:
        """Raises `UnavailableError` where new processes cannot be had: no transcript is to blame."""
        if (reason := self.ranks.processes.ended()) is None:
            return
        log.warning("%s: every rank but 0 is started again", reason)
        try:
            self.ranks.renew()
        except TandemError as error:
            raise UnavailableError(f"{reason}, and the ranks could not be started again: {error}") from error
