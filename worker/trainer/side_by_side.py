"""Work for a GPU on several streams, so that kernels which leave most of it idle run beside each other.

    with SideBySide(streams) as beside:
        with beside.on(key, cost):       # what has one key runs on one stream, in the order in which it comes
            ...
    # what follows on the current stream sees all of it

Must not know: Redis, the server.
Invariant: nothing here waits for the device. Also while a graph is captured: the streams become branches of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class SideBySide:
    """streams: none of them the current one. Without any, all runs on the current one."""

    def __init__(self, streams: Sequence[torch.cuda.Stream]) -> None:
        self._streams = streams
        self._given = [0] * len(streams)
        self._of: dict[int, int] = {}

    def __enter__(self) -> "SideBySide":
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream())
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams:
            torch.cuda.current_stream().wait_stream(stream)

    @contextmanager
    def on(self, key: int, cost: int) -> Iterator[None]:
        """A new key goes where the least work is. cost: in any unit."""
        if not self._streams:
            yield
            return
        number = self._of.setdefault(key, self._given.index(min(self._given)))
        self._given[number] += cost
        with torch.cuda.stream(self._streams[number]):
            yield
