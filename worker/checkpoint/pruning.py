"""Which checkpoints stay: a pure rule.

    the newest `keep`; the base, from which the versions of the history are rebuilt; the one that becomes the base next

With a checkpoint at least every E versions and a history of H, a version of the history is at most H + E batches after
a checkpoint that stays, and the base at most 2 * H + E versions old; so much of the journal stays, too.

"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """base: nothing before it is needed (0: the source model). checkpoints: all that stay."""

    base: int
    checkpoints: frozenset[int]


def kept(versions: Sequence[int], *, keep: int, history: int) -> Kept:
    """What stays of the checkpoints `versions` (ascending, at least one)."""
    recent = versions[-keep:]
    # Not after the oldest of the newest ones: when a later one is damaged, the journal leads on from there.
    floor = min(recent[0], versions[-1] - history)
    base = max((version for version in versions if version <= floor), default=0)
    following = min((version for version in versions if version > base), default=base)
    return Kept(base, frozenset({base, following, *recent} - {0}))
