"""How many tokens of prompts are computed again only because an update made their cached prefix too old.

    lost = LostPrefixes(block=784, tokens=157_925)     # of vLLM's prefix cache
    lost.asked(salt, ids, epoch)                       # at every request
    lost.tokens                                        # since the start

It remembers which beginnings of prompts were asked for, and in which epoch of the weights last: as many as the cache
has room for. An estimate: what the cache gave up for other reasons counts as lost, what requests made themselves does
not count until it is sent back.

Must not know: vLLM.
Invariants: only digests are kept, no text; a beginning that was asked for in the present epoch is not lost again.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

LEAST_BLOCK = 128
"""Tokens: a smaller block would be hashed more often for no better estimate."""


class LostPrefixes:
    """block: tokens of a block of the cache, which holds `tokens`; 0: there is none, and nothing is lost."""

    def __init__(self, block: int = LEAST_BLOCK, tokens: int = 0) -> None:
        self._block = max(block, LEAST_BLOCK)
        self._most = tokens // self._block
        self._epochs: dict[bytes, int] = {}
        """By the digest of a beginning of whole blocks, the one that was asked for longest ago first."""
        self.tokens = 0
        """Lost, since the start."""

    def asked(self, own: str | None, ids: Sequence[int], epoch: int) -> None:
        """A request of `ids` is handed to the engine in `epoch`, which only grows; own: the user's cache salt."""
        if not self._most:
            return
        words, known, digest = array("q", ids), True, (own or "").encode()
        # The last token is always computed.
        for end in range(self._block, len(words), self._block):
            digest = blake2b(digest + words[end - self._block : end].tobytes(), digest_size=16).digest()
            before = self._epochs.pop(digest, None)
            known = known and before is not None
            self.tokens += self._block * (known and before != epoch)
            self._epochs[digest] = epoch
        while len(self._epochs) > self._most:
            del self._epochs[next(iter(self._epochs))]
