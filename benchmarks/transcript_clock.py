"""Transcripts that arrive by a clock, whatever the worker does, and how long each takes until it is live.

Must not know: what is served meanwhile. Invariant: transcripts come every `every` seconds, the first with `with`; none
is sent after the block, and those on their way are waited for, `patience` seconds at most.
"""

import os
import random
import threading
import time
from itertools import count
from typing import Any

from rig import Rig
from texts import conversation

from producer import keys
from worker.data.examples import ExampleBuilder


class TranscriptClock:
    """lengths: (least, most) tokens of a transcript. kinds: how many different texts there are, which take turns: one
    text again and again is soon known by heart. `latencies`: seconds from enqueue to published, in order."""

    _names = count()

    def __init__(
        self,
        rig: Rig,
        builder: ExampleBuilder,
        every: float,
        lengths: tuple[int, int],
        patience: float = 60.0,
        kinds: int = 32,
    ) -> None:
        self.latencies: list[float] = []
        self.sent = 0
        self._rig, self._every, self._patience = rig, every, patience
        self._name = f"clock-{os.getpid()}-{next(self._names)}"
        draw = random.Random(1)
        sizes = [draw.randint(*lengths) for _ in range(kinds)]
        self._texts = [conversation(builder, f"{self._name}-{number}", size) for number, size in enumerate(sizes)]
        self._waiting: dict[str, float] = {}
        self._over, self._all_sent = threading.Event(), threading.Event()
        self._sender, self._watcher = (threading.Thread(target=work, daemon=True) for work in (self._send, self._watch))

    def __enter__(self) -> "TranscriptClock":
        self._sender.start()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._sender.join()
        self._all_sent.set()
        self._watcher.join()

    def plain(self) -> dict[str, float]:
        """Sent, live, and the latencies of those that are: median and worst."""
        ascending = sorted(self.latencies)
        found = {"sent": float(self.sent), "live": float(len(ascending))}
        if ascending:
            found |= {"latency_p50": ascending[len(ascending) // 2], "latency_max": ascending[-1]}
        return found

    def _send(self) -> None:
        due = time.monotonic()
        while True:
            text: dict[str, Any] = self._texts[self.sent % len(self._texts)]
            id = f"{self._name}-{self.sent}-sent"
            self._waiting[id] = time.monotonic()
            self._rig.producer.enqueue_many([text | {"id": id}])
            self.sent += 1
            due += self._every
            if self._over.wait(max(0.0, due - time.monotonic())):
                return

    def _watch(self) -> None:
        end = float("inf")
        while not (self._all_sent.is_set() and not self._waiting) and time.monotonic() < end:
            if self._all_sent.is_set() and end == float("inf"):
                end = time.monotonic() + self._patience
            for id in list(self._waiting):
                if self._rig.redis.hexists(keys.LEDGER, id):
                    self.latencies.append(time.monotonic() - self._waiting.pop(id))
            time.sleep(0.01)
