"""How often one user may give feedback: a bucket of calls for each, filled at a steady rate.

Must not know: vLLM, Redis.
Invariants: the memory is bounded; whoever was forgotten begins anew; nothing here keeps more of a user than a hash.
"""

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable

MOST_USERS = 100_000


class RateLimit:
    """At most `per_minute` calls in a row by one user, and as many a minute after that."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._left: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def take(self, user: str | None) -> int:
        """0 where the call may go on; else the seconds after which the next may. None: all that name nobody."""
        name = b"" if user is None else hashlib.sha256(user.encode(errors="surrogatepass")).digest()
        now = self._clock()
        left, since = self._left.pop(name, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - since) * self._per_minute / 60)
        allowed = left >= 1
        self._left[name] = (left - allowed, now)
        if len(self._left) > MOST_USERS:
            self._left.popitem(last=False)
        return 0 if allowed else max(1, math.ceil((1 - left) * 60 / self._per_minute))
