"""What `tandem worker` does as one of several replicas: see orchestrator/fleet.py and orchestrator/follower.py."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from producer.errors import TandemError
from worker.config.replica_options import SECRET, ReplicaSettings
from worker.config.retention import Policy
from worker.config.update_options import ApplySettings
from worker.distributed.rendezvous import Address, Rendezvous
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


def check_rolling(replica: ReplicaSettings | None, way: str) -> None:
    """Raises `TandemError` where servers cannot be paused in turn. way: of applying."""
    if replica is not None and replica.rolling and way == "streaming":
        raise TandemError(
            "--rolling does not go with streaming: there the replicas add up gradients while they write, so all servers"
            " stand still together; use --apply burst or factors, with fewer --max-tokens where memory is short"
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
    check_rolling(replica, session.trainer.way)
    return Fleet(session, meeting_of(replica), replica.wait, rolling=replica.rolling)


def follow(replica: ReplicaSettings, opening: Callable[..., AbstractContextManager[Session]], policy: Policy) -> None:
    """As replica 1 or more, to the end. opening: makes the session."""
    meeting = meeting_of(replica)
    with opening(replica=replica.number) as session:
        Follower(session, meeting, at_stop=policy.at_stop).run()
