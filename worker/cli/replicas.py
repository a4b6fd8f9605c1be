"""What `tandem worker` does as one of several replicas: see orchestrator/fleet.py and orchestrator/follower.py."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from producer.errors import TandemError
from worker.config.replica_options import SECRET, ReplicaSettings
from worker.config.retention import Policy
from worker.config.update_options import ApplySettings
from worker.data.batch_capacity import BatchCapacity
from worker.distributed.rendezvous import Address, Rendezvous
from worker.memory.planner import SERVER_MEMORY
from worker.orchestrator.fleet import Fleet
from worker.orchestrator.follower import Follower
from worker.orchestrator.session import Session

log = logging.getLogger("tandem")


def check_together(replica: ReplicaSettings | None, settings: ApplySettings) -> None:
    """Raises `TandemError` for flags that do not go with replicas, and for a meeting that could not be."""
    if replica is None:
        return
    if settings.hogwild:
        raise TandemError("--hogwild does not go with --replica: use --apply streaming without it, or burst")
    check_rolling(replica, settings.apply)
    _rendezvous_of(replica)


def check_rolling(replica: ReplicaSettings | None, way: str, room: BatchCapacity | None = None) -> None:
    """Raises `TandemError` where servers cannot be paused in turn. way: of applying. room: where the memory plan came
    to it."""
    if replica is None or not replica.rolling or way != "streaming":
        return
    why = "there the replicas add up gradients while they write, so all servers stand still together"
    if room is None:
        raise TandemError(
            f"--rolling does not go with streaming: {why}; use --apply burst or factors, with fewer --max-tokens where"
            " memory is short"
        )
    if not room.by_factors:
        raise TandemError(
            f"--rolling: of {room.longest:,} tokens a pass only streaming fits into the memory that is free, and {why};"
            f" by factors not even the shortest pass fits. Leave --rolling out, or train beside {SERVER_MEMORY}"
        )
    n = room.by_factors
    raise TandemError(
        f"--rolling: of {room.longest:,} tokens a pass only streaming fits into the memory that is free, and {why}."
        f" Passes of up to {n:,} tokens go by factors, but a longer one would break the promise that half of the"
        f" servers serve. Start every replica with --apply factors --max-tokens {n} --max-length {n}, leave --rolling"
        f" out, or train beside {SERVER_MEMORY}"
    )


def meeting_of(replica: ReplicaSettings) -> Rendezvous:
    """Where they meet; says who can reach it."""
    meeting = _rendezvous_of(replica)
    address = meeting.address
    if not replica.follows and not address.is_loopback:
        log.warning(
            "replicas meet at %s:%d: whoever reaches it, or the ports of their connections, can stop training or change"
            " gradients; keep it on a private network%s",
            address.host, address.port, "" if replica.secret else f", and set {SECRET} for all of them",
        )  # fmt: skip
    return meeting


def _rendezvous_of(replica: ReplicaSettings) -> Rendezvous:
    """Raises `RendezvousError` for an address, or a number of replicas, that cannot be."""
    address = Address.parse(replica.rendezvous)
    return Rendezvous(
        address, replica.number, replica.count, seconds=replica.timeout, secret=replica.secret, kept=replica.kept
    )


def lead(replica: ReplicaSettings, session: Session) -> Fleet:
    """As replica 0, whose session is open: the others. Raises `TandemError` where the memory plan came to a way that
    the flags do not go with."""
    check_rolling(replica, session.trainer.way, session.trainer.room)
    return Fleet(session, meeting_of(replica), replica.wait, rolling=replica.rolling)


def follow(replica: ReplicaSettings, opening: Callable[..., AbstractContextManager[Session]], policy: Policy) -> None:
    """As replica 1 or more, to the end. opening: makes the session."""
    meeting = meeting_of(replica)
    with opening(replica=replica.number) as session:
        Follower(session, meeting, at_stop=policy.at_stop).run()
