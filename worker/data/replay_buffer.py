"""Rehearsal: earlier transcripts mixed into new batches, against forgetting. Opt-in, and recorded in the manifest.

    batch = [*new, *rehearsal.pick(version, new)]     train these, and journal all of them
    manifest |= Rehearsal.record(batch)               {"rehearsed": [ids]}
    rehearsal.add(new ones that were trained)
    rehearsal.relearn(all that the weights know)      at start, and after a rollback

It holds whatever has an `id`: `batch_codec.Ready` in a worker, with `rename` saying how one gets another id.

A rehearsed example's id is "rehearsed:ID": RQ ids have no colon, so it never meets a job's id, the ledger or a result.
Exactly-once concerns the first training alone. Must not know: torch, Redis.
Invariants: what is picked follows from (seed, version, what was added, in order) alone; nobody of the batch is picked.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from producer.errors import TandemError

PREFIX = "rehearsed:"


class Named(Protocol):
    """Anything that can be trained, by its id."""

    @property
    def id(self) -> str:
        """A job's id, or PREFIX and one."""


T = TypeVar("T", bound=Named)


class ReplayBuffer(Generic[T]):
    """share: rehearsed examples for each new one, on average (0.25: one for four). capacity: how many are remembered;
    once full, each new one replaces a random one with the odds that keep the sample uniform (Vitter's algorithm R)."""

    def __init__(self, share: float, rename: Callable[[T, str], T], *, capacity: int = 4096, seed: int = 0) -> None:
        if not 0 <= share <= 4 or capacity < 1:
            raise TandemError("--rehearse must lie between 0 and 4 (earlier transcripts for each new one)")
        self.share, self.rename, self.capacity, self.seed = share, rename, capacity, seed
        self.known: list[T] = []
        self._seen = 0

    def add(self, examples: Iterable[T]) -> None:
        """These were trained for the first time. At start: those of the journal, oldest first."""
        for example in examples:
            if example.id.startswith(PREFIX):
                continue
            self._seen += 1
            if len(self.known) < self.capacity:
                self.known.append(example)
            elif (place := random.Random(f"{self.seed}/add/{self._seen}").randrange(self._seen)) < self.capacity:
                self.known[place] = example

    def relearn(self, examples: Iterable[T]) -> None:
        """`add` these, and forget everybody from before."""
        self.known.clear()
        self._seen = 0
        self.add(examples)

    def pick(self, version: int, batch: Sequence[T]) -> list[T]:
        """What to train beside `batch` as `version`; half an example too few or too many is drawn."""
        dice = random.Random(f"{self.seed}/pick/{version}")
        wanted = self.share * len(batch)
        count = int(wanted) + (dice.random() < wanted % 1)
        new = {example.id for example in batch}
        pool = [example for example in self.known if example.id not in new]
        return [self.rename(e, PREFIX + e.id) for e in dice.sample(pool, min(count, len(pool)))]

    @staticmethod
    def record(batch: Iterable[Named]) -> dict[str, Any]:
        """What the manifest says of it: {"rehearsed": [ids]}, or nothing."""
        ids = [example.id.removeprefix(PREFIX) for example in batch if example.id.startswith(PREFIX)]
        return {"rehearsed": ids} if ids else {}
