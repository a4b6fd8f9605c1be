"""Replica 0's view of the others: one trainer in several processes, each on a server of its own.

    fleet.attempt(work)          a version, again with those who are there when somebody is lost before the first write
    fleet.begin, agreed          gradients of all parts; journal: a version on every disk; apply, after: live everywhere
    fleet.roll()                 with --rolling: it is live here, and the others apply it in turn
    fleet.look()                 between two versions: who is there, who wants to come back

Only replica 0 decides, and only its worker speaks to Redis. The others (`follower`) do what they are told, and every
command ends at all of them or at none: what fails at one member alone closes the group, and whoever is there forms the
next one and is brought to replica 0's weights (`catching_up`).

Invariants: nobody writes before replica 0 has said so. It says so when all have journaled the version and stand still;
with --rolling, when the version is live here, to at most half of the replicas at a time. `attempt` tries again only
while no weight of ours was touched.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch

from worker.apollo import NonFiniteGradientError
from worker.checkpoint.batch_codec import Ready, pack_batch
from worker.config.protocol import Update
from worker.data.packing import BatchError
from worker.distributed.errors import GroupLostError, SharedFailureError
from worker.distributed.group import Group
from worker.distributed.rendezvous import Rendezvous
from worker.orchestrator.applying import NOBODY, Others
from worker.orchestrator.catching_up import bring_up, hello_of, misfit, standing
from worker.orchestrator.lone import Lone
from worker.orchestrator.session import Session
from worker.trainer.outliers import Guards
from worker.trainer.sharing import Alone, Ranks
from worker.versions.replica_status import Members

log = logging.getLogger("tandem")
T = TypeVar("T")

REJOIN_SECONDS = 20.0
"""How long those who are left wait for each other after one of them was lost."""
PAUSED_SECONDS = 20.0
"""How long a server stands still for the others (less than the least lease), and the end for who hangs."""
LOOK_SECONDS = 10.0
"""Between two looks at replicas that have nothing to do."""
TRIES = 4
"""How often a batch is tried while replicas are lost over it: then it is tried in halves."""
SHARED = (SharedFailureError, NonFiniteGradientError, BatchError)
"""What every member raises at the same point: it follows from what all of them have."""


class Fleet(Lone):
    """wait: seconds that the first group is waited for until it is whole. rolling: servers are paused in turn."""

    def __init__(self, session: Session, meeting: Rendezvous, wait: float, *, rolling: bool = False) -> None:
        self.session, self.meeting, self.rolling = session, meeting, rolling
        self.members = Members(meeting.count)
        self.others = NOBODY if rolling else _Leading(self)
        self._hello = hello_of(session)
        self._group: Group | None = None
        self._begun = self._busy = False
        self._looked = 0.0
        self._wait, self._expected = wait, set(range(1, meeting.count))
        self._stopping: Callable[[], bool] = lambda: False
        meeting.open()

    @property
    def parts(self) -> int:  # type: ignore[override]
        return self._group.size if self._group is not None else 1

    @property
    def group(self) -> Group | None:
        """The one that is open."""
        return self._group if self._group is not None and self._group.closed is None else None

    def heed(self, stopping: Callable[[], bool]) -> None:
        self._stopping = stopping

    # -- a version ------------------------------------------------------------------------------------------------

    def attempt(self, work: Callable[[], T]) -> T:
        for left in reversed(range(TRIES)):
            self._ready()
            try:
                return work()
            except GroupLostError as error:
                self._lost(f"{error}; no weight was touched, and the version is tried again with those who are there")
                self.session.trainer.forget()
                if not left:
                    raise SharedFailureError(f"replicas were lost {TRIES} times over this batch: {error}") from error
            except BaseException as error:
                if self._busy and not isinstance(error, SHARED):
                    self._lost(f"replica 0 failed ({type(error).__name__})")
                raise
            finally:
                self._busy = False
                self._forget()
        raise AssertionError("the last try returns or raises")

    def begin(self, batch: Sequence[Ready], guards: Guards | None) -> None:
        self.session.trainer.sharing = Ranks(self._group) if self._group is not None else Alone()
        limit = {"most": guards.loss_limit(), "k": guards.k} if guards is not None else None
        self._begun = True
        self._tell({"op": "begin", "batch": pack_batch(batch), "limit": limit, "threads": torch.get_num_threads()})

    def agreed(self) -> None:
        if self._group is not None:
            self._group.gather({})
        self._busy = False

    def journal(self, update: Update) -> None:
        assert update.version is not None
        self._tell({"op": "journal", "update": update.record().plain(), "rejected": update.rejected})

    def apply(self) -> None:
        with suppress(GroupLostError):  # found again when all are to stand still, and there the journal is put right
            if not self.rolling:
                self._tell({"op": "apply"})

    def roll(self) -> None:
        try:
            if self.rolling and self._group is not None:
                self._group.call()
                self._group.in_turn({"op": "roll"})
        except GroupLostError as error:
            self._lost(f"{error}, while a version was rolled out: a lost replica gets it when it is back")

    def after(self, update: Update) -> None:
        self._begun = False
        try:
            self._tell({"op": "after", "manifest": update.manifest})
        except GroupLostError as error:
            self._lost(f"{error}; the version is live, and a lost replica gets it when it is back")

    def compared(self) -> None:
        if self.group is None:
            return
        try:
            ours = standing(self.session)
            every = self.group.gather(ours)
        except GroupLostError as error:
            self._lost(str(error))
            return
        finally:
            self._busy = False
        assert every is not None
        self.members.present = dict(zip(self.group.members, (one["version"] for one in every), strict=True))
        if odd := [member for member, one in zip(self.group.members, every, strict=True) if one != ours]:
            self.members.unequal += len(odd)
            log.error(
                "replica digest unequal: replica %s has other weights than replica 0 at version %d; it gets ours",
                ", ".join(map(str, odd)), ours["version"],
            )  # fmt: skip
            self.changed()

    # -- between two versions -------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        with suppress(GroupLostError):
            self._tell({"op": "checkpoint"})
        self._busy = False

    def look(self) -> None:
        if time.monotonic() - self._looked < LOOK_SECONDS and self.group is not None and not self.meeting.asking():
            return
        self._looked = time.monotonic()
        self._ready()
        if self.group is not None and not self._all_answer():
            self._ready()

    def changed(self) -> None:
        if self.group is not None:
            self._wait, self._expected = REJOIN_SECONDS, set(self.group.members[1:])
            with suppress(GroupLostError):
                self._tell({"op": "regroup"})
            self._close("replica 0 forms another group")

    def end(self) -> None:
        try:
            self._tell({"op": "end"}, PAUSED_SECONDS)  # they wait for nothing else: one that hangs is left behind
        except GroupLostError as error:
            log.warning("%s, when it was told to end: if it is there, it waits for the next replica 0", error)
        self._close("replica 0 ended")
        self.meeting.close()

    def _all_answer(self) -> bool:
        """Whether every member of the group does; if not, the group is given up."""
        assert self.group is not None
        try:
            self._tell({"op": "ping"})
            every = self.group.gather({"version": self.session.weights.header.version})
            assert every is not None
            self.members.present = dict(zip(self.group.members, (one["version"] for one in every), strict=True))
            return True
        except GroupLostError as error:
            self._lost(str(error))
            return False
        finally:
            self._busy = False

    def _asking(self) -> list[int]:
        """Who asks to be let in. Under the number of a member that answers it is another worker, which is refused: each
        of them would put the other out, for ever."""
        asking = self.meeting.asking()
        twins = [number for number in asking if self.group is not None and number in self.group.members]
        if not twins or not self._all_answer():
            return asking
        for number in twins:
            self.meeting.refuse(number, f"another worker is replica {number}: give each a number of its own")
        return [number for number in asking if number not in twins]

    def _ready(self) -> None:
        """The group is there: everybody who can take part, with our weights. Alone if there is nobody else."""
        asking = self._asking()
        if not asking and (self.group is not None or not self._wait):
            return
        self.changed()
        expected = {*self._expected, *asking}
        deadline, found = time.monotonic() + (self._wait or REJOIN_SECONDS), None
        self._wait, self._expected = 0.0, set()
        while True:
            try:
                left = max(0.0, deadline - time.monotonic())
                found = self.meeting.form(expected, left, lambda hello: misfit(self._hello, hello), self._stopping)
                if found is not None:
                    bring_up(found, self.session)
                break
            except GroupLostError as error:
                log.warning("%s, while replicas met: they meet again", error)
                deadline = time.monotonic() + REJOIN_SECONDS
        self._group = found
        self._say_who(found.members if found is not None else [0])

    def _say_who(self, members: Sequence[int]) -> None:
        at = self.session.weights.header.version
        self.members.present = dict.fromkeys(members, at)
        missing = [n for n in range(self.members.count) if n not in members]
        log.info(
            "replicas %s of %d train together from version %d on%s",
            ", ".join(map(str, members)), self.members.count, at,
            f"; not there: {', '.join(map(str, missing))}" if missing else "",
        )  # fmt: skip

    # -- what is said ---------------------------------------------------------------------------------------------

    def _tell(self, command: dict[str, Any], seconds: float | None = None) -> None:
        """seconds: how long each is waited for, where not as ever. Raises `GroupLostError`."""
        if self._group is not None:
            self._busy = True
            self._group.call()
            self._group.tell(command, seconds)

    def _forget(self) -> None:
        """The others need not keep what is not applied."""
        if self._begun:
            self._begun = False
            if self.group is not None:
                with suppress(GroupLostError):
                    self._tell({"op": "forget"})
                self._busy = False

    def _lost(self, reason: str) -> None:
        self.members.lost += 1
        log.warning(reason)
        if self._group is not None:
            self._wait, self._expected = REJOIN_SECONDS, set(self._group.members[1:]) - self._group.lost
        self._close(reason)

    def _close(self, reason: str) -> None:
        if self._group is not None:
            self._group.close(reason)
            self._group = None
        self.session.trainer.sharing = Alone()


class _Leading(Others):
    """At the borders of an update, as replica 0."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def standing_still(self) -> None:
        if self.fleet._group is not None:
            self.fleet._group.gather({"paused": True}, PAUSED_SECONDS)

    def begun(self) -> None:
        with suppress(GroupLostError):  # who was told writes, and so do we; in streaming the write breaks off
            if self.fleet._group is not None:
                self.fleet._group.tell({"go": True}, PAUSED_SECONDS)

    def written(self) -> None:
        if self.fleet.group is None:
            return
        try:
            self.fleet.group.gather({"clean": True}, PAUSED_SECONDS)
            self.fleet.group.tell({"resume": True}, PAUSED_SECONDS)
        except GroupLostError as error:
            self.fleet._lost(f"{error}, while a version was written: a lost replica gets it when it is back")
