"""A replica that follows: it does on its own server what replica 0 tells, and knows neither queue nor Redis.

    Follower(session, meeting).run()

It asks to be let in, is brought to replica 0's weights, and waits for commands. When the group is lost it puts back
what was not written, and asks again: for as long as it takes, since replica 0 may be started again.

Invariants: nothing is written before replica 0 says so; a version is journaled here before our server is paused for it;
what was begun and not written is forgotten, and its journal entry voided, before anything else is done.
"""

import logging
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from worker.checkpoint.batch_codec import Ready, ready_of
from worker.checkpoint.journal import JournalError
from worker.config.protocol import JobResult, TornWeightsError, UnavailableError, Update
from worker.distributed.errors import GroupLostError
from worker.distributed.group import Group
from worker.distributed.rendezvous import Rendezvous
from worker.orchestrator.applying import NOBODY, Others, apply_update
from worker.orchestrator.catching_up import be_brought_up, hello_of, standing
from worker.orchestrator.fleet import PAUSED_SECONDS, SHARED
from worker.orchestrator.reports import Tell, log_report
from worker.orchestrator.session import Session
from worker.shared_weights.header import CLEAN
from worker.trainer.outliers import ToldLimit
from worker.trainer.sharing import Ranks
from worker.utils.signals import deferred

log = logging.getLogger("tandem")

CHECK_SECONDS = 2.0
"""Between two looks at our own server while nothing is to do."""


@dataclass
class InHand:
    """What was begun: the batch, and how far it is."""

    batch: list[Ready] = field(default_factory=list)
    trained: list[Ready] = field(default_factory=list)
    update: Update | None = None


class Follower:
    """Of one session. at_stop: write a checkpoint at the end."""

    def __init__(self, session: Session, meeting: Rendezvous, *, at_stop: bool = True, tell: Tell = log_report) -> None:
        self.session, self.meeting, self.tell, self.at_stop = session, meeting, tell, at_stop
        self.stopping = self.ended = False
        self.hand = InHand()
        self._checked = 0.0

    def run(self) -> None:
        """Until SIGTERM or SIGINT, or until replica 0 ends as it should. Raises `TornWeightsError`, `UnavailableError`
        when this replica cannot go on, and `RendezvousError` when it is refused."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        while not self._is_over():
            log.info("replica %d asks replica 0 to be let in", self.meeting.number)
            group = self.meeting.join(hello_of(self.session), self._is_over)
            if group is None:
                break
            try:
                with deferred():
                    be_brought_up(group, self.session, self.tell)
                at = self.session.weights.header.version
                log.info("replica %d is one of %s, at version %d", self.meeting.number, group.members, at)
                self._follow(group)
            except GroupLostError as error:
                log.warning("replica %d: %s", self.meeting.number, error)
                self._put_back()
            finally:
                group.close("this replica left")
        self._drop()
        if self.at_stop and (report := self.session.manager.checkpoints.try_write()):
            self.tell(report)

    def _stop(self, signum: int, frame: Any) -> None:
        log.info("replica %d ends after what it is doing", self.meeting.number)
        self.stopping = True

    def _is_over(self) -> bool:
        """Asked between two things to do; looks after our server, too. Raises `UnavailableError`."""
        if time.monotonic() - self._checked > CHECK_SECONDS:
            self.session.check()
            self._checked = time.monotonic()
        return self.stopping or self.ended

    def _follow(self, group: Group) -> None:
        """Commands, until there are no more."""
        while True:
            for _ in group.called():
                if self._is_over():
                    return
            command = group.tell()
            if command["op"] in ("regroup", "end"):
                self.ended = command["op"] == "end"
                return
            try:
                getattr(self, f"_{command['op']}")(group, command)
            except SHARED as error:
                log.info("replica %d: replica 0 decides what becomes of this: %s", self.meeting.number, error)
                self._forget(group, {})

    # -- commands: each ends at all replicas, or is a `GroupLostError` at all ------------------------------------------

    def _begin(self, group: Group, command: dict[str, Any]) -> None:
        trainer = self.session.trainer
        trainer.forget()
        trainer.sharing = Ranks(group)
        torch.set_num_threads(int(command["threads"]))
        self.hand = InHand([ready_of(item) for item in command["batch"]])
        told = command["limit"]
        limit = ToldLimit(float(told["most"]), float(told["k"])) if told is not None else None
        try:
            found = trainer.begin([ready.example for ready in self.hand.batch], limit)
            if trainer.begun == "factors" and found.nll:
                trainer.gradient_norm()  # refuses what is not finite, at every replica
            trainer.prepare()
        except (GroupLostError, *SHARED):
            raise
        except Exception as error:  # ours alone: the others must not wait for us
            raise GroupLostError(f"replica {self.meeting.number} failed: {type(error).__name__}: {error}") from error
        self.hand.trained = [ready for ready in self.hand.batch if ready.id in found.nll]
        group.gather({})

    def _forget(self, group: Group, command: dict[str, Any]) -> None:
        """What is journaled here and was not applied will not be: voided where replica 0 failed on its own."""
        self._drop()

    def _journal(self, group: Group, command: dict[str, Any]) -> None:
        plain = command["update"]
        results = {id: _result(result) for id, result in plain["results"].items()}
        update = Update(plain["version"], plain["lineage"], plain["manifest"], results, command["rejected"])
        trainer, manager = self.session.trainer, self.session.manager
        try:
            manager.before(update, self.hand.trained, self.session.h, trainer.optimizer.step_count, group.size)
        except JournalError as error:
            raise UnavailableError(str(error)) from error
        self.hand.update = update
        group.gather({})

    def _apply(self, group: Group, command: dict[str, Any]) -> None:
        self._write(_Following(group))

    def _roll(self, group: Group, command: dict[str, Any]) -> None:
        """It is our turn. Replica 0 has the version: who is lost from here on gets it when it is back."""
        self._write(NOBODY)
        group.gather({"serving": True})

    def _write(self, others: Others) -> None:
        update = self.hand.update
        assert update is not None and update.version is not None
        try:
            with deferred():
                update.manifest |= apply_update(self.session, update, others)
        finally:
            self.session.trainer.forget()
        self.hand = InHand()

    def _after(self, group: Group, command: dict[str, Any]) -> None:
        self.session.manager.after(self.session.weights.header.version, dict(command["manifest"]))
        group.gather(standing(self.session))

    def _checkpoint(self, group: Group, command: dict[str, Any]) -> None:
        if report := self.session.manager.checkpoints.try_write():
            self.tell(report)

    def _ping(self, group: Group, command: dict[str, Any]) -> None:
        group.gather({"version": self.session.weights.header.version})

    def _put_back(self) -> None:
        """Nothing of what was begun stays. Raises `TornWeightsError`."""
        header = self.session.weights.header
        if header.state != CLEAN:
            raise TornWeightsError(
                f"replica {self.meeting.number}'s weights are torn: start it again, and it gets those of replica 0"
            )
        self._drop()

    def _drop(self) -> None:
        """What is in hand is forgotten, and its journal entry, if there is one, voided."""
        update, self.hand = self.hand.update, InHand()
        self.session.trainer.forget()
        manager, coming = self.session.manager, self.session.weights.header.version + 1
        if update is not None and update.version == coming and coming in manager.journal.entries:
            manager.void(coming)


class _Following(Others):
    """At the borders of an update."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def standing_still(self) -> None:
        self.group.gather({"paused": True}, PAUSED_SECONDS)
        self.group.tell(seconds=2 * PAUSED_SECONDS)  # go

    def written(self) -> None:
        try:
            self.group.gather({"clean": True}, PAUSED_SECONDS)
            self.group.tell(seconds=2 * PAUSED_SECONDS)  # resume
        except GroupLostError as error:
            log.warning("%s while a version was written: it is written here, and our server goes on", error)


def _result(plain: dict[str, Any]) -> JobResult:
    """As `JobResult.as_map` made it."""
    report = {name: value for name, value in plain.items() if name not in ("version", "loss", "already_trained")}
    return JobResult(plain["version"], plain.get("loss"), report, bool(plain.get("already_trained", False)))
