"""What `weights:state` says of the replicas that train as one: who is there, at which version.

Must not know: torch, RQ.
Invariant: a worker alone says nothing, and takes away what an earlier one said.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import redis

from producer import keys

FIELD = "replicas"
"""Of `weights:state`: JSON of `Members`."""
MOST = 64
"""Replicas of a fleet: `worker.distributed.rendezvous` takes no more."""


@dataclass
class Members:
    """What replica 0 knows of all."""

    count: int = 1
    present: dict[int, int] = field(default_factory=dict)
    """Replica -> the version that it said last."""
    unequal: int = 0
    """How often a replica's weights were not those of replica 0, since replica 0 was started."""
    lost: int = 0
    """How often one was lost."""

    def plain(self) -> str:
        """The JSON that is stored."""
        present = {str(number): version for number, version in self.present.items()}
        return json.dumps({"count": self.count, "present": present, "unequal": self.unequal, "lost": self.lost})


def tell(connection: redis.Redis, members: Members) -> None:
    """Say who is there."""
    if members.count == 1:
        connection.hdel(keys.STATE, FIELD)
    else:
        connection.hset(keys.STATE, FIELD, members.plain())


def read(said: Mapping[str, str]) -> Members | None:
    """From the fields of `weights:state`; None where there are no replicas, or it is nothing that we wrote."""
    try:
        found: Any = json.loads(said[FIELD])
        count = int(found["count"])
        if not 1 < count <= MOST:
            return None
        present = {int(number): int(version) for number, version in found["present"].items()}
        there = {number: version for number, version in sorted(present.items()) if 0 <= number < count}
        return Members(count, there, int(found["unequal"]), int(found["lost"]))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
