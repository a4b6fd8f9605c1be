"""What can go wrong between replicas.

Must not know: Redis, vLLM, versions.
"""

from producer.errors import TandemError


class RendezvousError(TandemError):
    """Replicas cannot meet: the address, the numbers, or what each was started with do not agree."""


class GroupLostError(TandemError):
    """A member of the group ended, hangs, or left: the group is closed, and those who are there form another."""


class SharedFailureError(RuntimeError):
    """One member's part of a computation failed, and every member was told so at the same point: the group goes on."""
