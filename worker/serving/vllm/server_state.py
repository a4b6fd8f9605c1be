"""What the API process knows of the weights: their version, and whether requests may run.

One event loop touches it (vLLM's), so there are no locks. Must not know: vLLM, sockets.
Invariants: serving <-> paused -> torn -> serving, the last once the weights are whole again, and never when the engine
has ended; serving -> torn when the weights were being written under the requests (hogwild) and their writer was lost;
the version only moves while paused or torn, before requests run again; `running` is set exactly when a request may
start or must be told that it cannot.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from worker.serving.protocol import PAUSED, SERVING, TORN
from worker.serving.vllm.lost_prefixes import LostPrefixes
from worker.serving.vllm.prefixes import PrefixEpochs


class ServerState:
    """Version and condition of the served weights, and the number of requests that are being answered."""

    def __init__(self, lineage: str, version: int, prefix_max_age: int = 0) -> None:
        self.lineage = lineage
        self.version = version
        self.prefixes = PrefixEpochs(version, prefix_max_age)
        self.lost_prefixes = LostPrefixes()
        """Replaced as soon as vLLM's cache is known."""
        self.condition = SERVING
        self.reason: str | None = None
        self.ended = False
        """The engine is gone: torn for good."""
        self.mending = False
        """A trainer holds the pause of a torn server, to write whole weights."""
        self.written = False
        """Hogwild: a trainer may be writing the next version while requests run."""
        self.in_flight = 0
        """Requests that came in whole and are not answered yet: more than the engine holds, never fewer."""
        self.tears = 0
        """How often the weights tore. A request that began before a tear has no answer."""
        self.last_tear = ""
        """The reason of the last tear, also once the weights are whole again."""
        self.overdue = 0
        """How many leases their holders did not give back in time."""
        self.has_trainer = False
        """Whether one is connected."""
        self.changed: Callable[[], None] = lambda: None
        """Is called after each change but those of `in_flight`; must not raise."""
        self.running = asyncio.Event()
        self.running.set()

    @property
    def torn(self) -> bool:
        """Whether no answer can be made: the weights are half-written, or the engine has ended."""
        return self.condition == TORN

    @property
    def newest(self) -> int:
        """The highest version that the weights may hold parts of."""
        return self.version + self.written

    @property
    def oldest(self) -> int:
        """The lowest version that an answer to a request of now may have parts of: its prefix may be that old."""
        return min(self.version, self.prefixes.oldest)

    def salt(self, own: str | None, ids: Sequence[int]) -> str:
        """The cache salt of a request of `ids` that is handed to the engine now; own: the user's, if any."""
        self.lost_prefixes.asked(own, ids, self.prefixes.number)
        return self.prefixes.salt(own)

    def begin_hogwild(self) -> None:
        """The next version is written while requests run. What is computed meanwhile is for nobody else."""
        self.written = True
        self.prefixes.separate(self.version)

    def pause(self) -> None:
        """Requests that arrive from now on wait."""
        if self.written:
            self.prefixes.separate(self.version + 1)
        else:
            self.prefixes.before(self.version)
        self.condition = PAUSED
        self.running.clear()
        self.changed()

    def go_on(self) -> None:
        """The pause came to nothing: the waiting requests go on as they would have before it."""
        self.lost_prefixes.excuse(self.prefixes.number)
        self._go_on()

    def _go_on(self) -> None:
        self.condition = SERVING
        self.running.set()
        self.changed()

    def resume(self, version: int, rebuilt: bool = False) -> None:
        """The weights are whole again and are `version`; the waiting requests go on. rebuilt: see `PrefixEpochs`."""
        self.take(version, rebuilt)
        self.reason = None
        self.mending = self.written = False
        self._go_on()

    def take(self, version: int, rebuilt: bool = False) -> None:
        """The weights are `version`, and the engine is about to go on with them."""
        again = rebuilt or self.mending
        self.version = version
        self.prefixes.after(version, again)
        if again:
            self.lost_prefixes.excuse(self.prefixes.number)

    def tear(self, reason: str) -> None:
        """No answer can be made any more. Waiting requests wake up to be told `reason`."""
        self.tears += self.condition != TORN
        self.condition = TORN
        self.reason = self.last_tear = reason
        self.written = False
        self.running.set()
        self.changed()

    def trainer(self, connected: bool) -> None:
        """The trainer came, or went."""
        self.has_trainer = connected
        self.changed()

    def lease_overdue(self) -> None:
        """A trainer did not give its lease back in time."""
        self.overdue += 1
        self.changed()

    def plain(self) -> dict[str, Any]:
        """The state in msgpack and JSON types."""
        state: dict[str, Any] = {"version": self.version, "lineage": self.lineage, "state": self.condition}
        state |= {"written": self.newest} if self.written else {}
        return state | {"reason": self.reason} if self.reason else state
