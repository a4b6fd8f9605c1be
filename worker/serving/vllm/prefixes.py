"""Which cached prefixes a request may read: only those that were computed since its epoch of the weights began.

vLLM finds a cached block by a hash over the tokens up to it and the request's cache salt. Every request gets a salt
that names the epoch in which it was handed to the engine. An update starts a new epoch, so that requests that come
later find nothing of before, while running ones keep all they have. What those still compute is filed under their own,
old epoch. Why not forget the hashes of cached blocks instead: a running request would file the states that it computes
later, from old keys, under hashes that a new request asks for.

Must not know: vLLM.
Invariants: an epoch never spans more than `max_age` versions; no two epochs, also of two servers that share an outer
cache, have the same salt; a user's own salt stays in force within an epoch.
"""

import uuid


class PrefixEpochs:
    """The epochs of one server, from `version` on."""

    def __init__(self, version: int, max_age: int = 0) -> None:
        self._server = uuid.uuid4().hex[:16]
        self._max_age = max_age
        self.number = 0
        """Of the present epoch: how many came before it."""
        self.oldest = version
        """The version with which the present epoch began, or will begin."""

    def salt(self, own: str | None) -> str:
        """The cache salt of a request that is handed to the engine now; own: the user's, if any."""
        epoch = f"tandem-{self._server}-{self.number}"
        return epoch if own is None else f"{epoch} {own}"

    def before(self, version: int) -> None:
        """The weights are about to become version + 1. What was computed so far may be too old for it."""
        if version + 1 - self.oldest > self._max_age:
            self.separate(version + 1)

    def after(self, version: int, rebuilt: bool) -> None:
        """The weights are `version`. rebuilt: they were made again, and the version's number says nothing of how far
        they are from the one before it."""
        if rebuilt or not self.oldest <= version <= self.oldest + self._max_age:
            self.separate(version)

    def separate(self, version: int) -> None:
        """Start an epoch at `version`: requests from now on read nothing that was cached before."""
        self.number += 1
        self.oldest = version
