"""How many tokens of prompts are computed again only because an update made their cached prefix too old.

    lost = LostPrefixes(block=784, tokens=203_840, beside=1_568)     # of vLLM's prefix cache
    lost.asked(salt, ids, epoch)                       # at every request
    lost.excuse(epoch)                                 # what ended the epoch before was no update
    lost.tokens                                        # since the start

It remembers which beginnings of prompts were asked for, and in which epoch of the weights last: as many as the cache
has room for, if nothing else stood in it. An estimate: what the cache gave up for other reasons counts as lost, what
requests made themselves does not count until it is sent back.

Must not know: vLLM.
Invariants: only digests are kept, no text; a beginning that was asked for in the present epoch is not lost again.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

LEAST_BLOCK = 128
"""Tokens: a smaller block would be hashed more often for no better estimate."""


class LostPrefixes:
    """block: tokens of a block of the cache, which holds `tokens`; 0: there is none, and nothing is lost. beside: as
    how many tokens counts what it keeps of each prompt besides (a delta net's states)."""

    def __init__(self, block: int = LEAST_BLOCK, tokens: int = 0, beside: int = 0) -> None:
        self._block, self._beside = max(block, LEAST_BLOCK), beside
        self._most, self._held = tokens if tokens >= self._block else 0, 0
        self._known: dict[bytes, tuple[int, int]] = {}
        """By the digest of a beginning of whole blocks: the epoch, and its room in tokens. The next to go comes
        first."""
        self._excused = 0
        self.tokens = 0
        """Lost, since the start."""

    def asked(self, own: str | None, ids: Sequence[int], epoch: int) -> None:
        """A request of `ids` is handed to the engine in `epoch`, which only grows; own: the user's cache salt."""
        if not self._most:
            return
        digests: list[bytes] = []
        words, whole, digest = array("q", ids), True, (own or "").encode()
        # The last token is always computed.
        for end in range(self._block, len(words), self._block):
            digest = blake2b(digest + words[end - self._block : end].tobytes(), digest_size=16).digest()
            before, room = self._known.pop(digest, (None, 0))
            self._held -= room
            whole = whole and before is not None
            self.tokens += self._block * (whole and before is not None and self._excused <= before < epoch)
            digests.append(digest)
        # The end of a prompt goes first, as vLLM gives up blocks: without their beginning others are of no use.
        for place, digest in enumerate(reversed(digests)):
            room = self._block + (0 if place else self._beside)
            self._known[digest] = epoch, room
            self._held += room
        while self._held > self._most:
            _, room = self._known.pop(next(iter(self._known)))
            self._held -= room

    def excuse(self, epoch: int) -> None:
        """What was asked for before `epoch` is not lost by an update: weights were made again, or a pause came to
        nothing."""
        self._excused = epoch
