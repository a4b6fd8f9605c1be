"""What `tandem worker` does as one of several replicas: see orchestrator/fleet.py and orchestrator/follower.py."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from producer.errors import TandemError
from worker.config.replica_options import SECRET, ReplicaSettings
from worker.config.retention import Policy
from worker.config.update_options import ApplySettings
from worker.distributed.rendezvous import Address, Rendezvous
from worker.orchestrator.follower import Follower
from worker.orchestrator.session import Session

log = logging.getLogger("tandem")


def check_together(replica: ReplicaSettings | None, settings: ApplySettings) -> None:
    """Raises `TandemError` for flags that do not go with replicas."""
    if replica is not None and settings.hogwild:
        raise TandemError("--hogwild does not go with --replica: use --apply streaming without it, or burst")


def meeting_of(replica: ReplicaSettings) -> Rendezvous:
    """Where they meet; says who can reach it."""
    address = Address.parse(replica.rendezvous)
    if not replica.follows and not address.is_loopback:
        log.warning(
            "replicas meet at %s:%d: whoever reaches it, or the ports of their connections, can stop training or change"
            " gradients; keep it on a private network%s",
            address.host, address.port, "" if replica.secret else f", and set {SECRET} for all of them",
        )  # fmt: skip
    return Rendezvous(
        address, replica.number, replica.count, seconds=replica.timeout, secret=replica.secret, kept=replica.kept
    )


def follow(replica: ReplicaSettings, opening: Callable[..., AbstractContextManager[Session]], policy: Policy) -> None:
    """As replica 1 or more, to the end. opening: makes the session."""
    meeting = meeting_of(replica)
    with opening(replica=replica.number) as session:
        Follower(session, meeting, at_stop=policy.at_stop).run()
