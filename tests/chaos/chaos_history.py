"""What ought to be, by the manifests alone: who is in which version, who was trained when, who was dropped.

A model of a few lines, beside the product's own: it knows neither journal nor checkpoints.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "rehearsed:"
"""Of the id of a transcript that is trained again to keep it in mind."""

Batch = tuple[str, ...]

DIVIDED = "/"
"""A batch that was divided among n replicas ends with "/n": it decides the order of sums."""


def ids_of(batch: Batch) -> Batch:
    """The transcripts of a batch."""
    return tuple(id for id in batch if not id.startswith(DIVIDED))


def parts_of(batch: Batch) -> int:
    """Among how many replicas it was divided."""
    return int(batch[-1].removeprefix(DIVIDED)) if batch and batch[-1].startswith(DIVIDED) else 1


@dataclass
class Model:
    """Of the versions 1 to N, `manifests`. problems: what no sequence of events may lead to."""

    manifests: Mapping[int, Mapping[str, Any]]
    problems: list[str] = field(default_factory=list)
    ledger: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    batches: dict[int, list[Batch]] = field(default_factory=lambda: {0: []})
    """Version -> the batches in its weights, oldest first, without who had been dropped by then. An empty one is a step
    of the optimizer that changed nothing."""

    def __post_init__(self) -> None:
        for version in range(1, len(self.manifests) + 1):
            manifest = self.manifests[version]
            if manifest["kind"] == "rollback":
                self._roll_back(version, manifest)
            else:
                self._train(version, manifest)

    def _train(self, version: int, manifest: Mapping[str, Any]) -> None:
        jobs, again = manifest["jobs"], manifest["rehearsed"]
        if out := self.dropped.keys() & {*jobs, *again}:
            self.problems.append(f"version {version} has {sorted(out)}, dropped before")
        if twice := self.ledger.keys() & set(jobs):
            self.problems.append(f"version {version} trains {sorted(twice)} again")
        if strange := set(again) - {id for batch in self.batches[version - 1] for id in batch}:
            self.problems.append(f"version {version} rehearses {sorted(strange)}, who are not in its weights")
        self.ledger.update(dict.fromkeys(jobs, version))
        parts = int(manifest.get("replicas", 1))
        batch = (*jobs, *(PREFIX + id for id in again), *([f"{DIVIDED}{parts}"] if parts > 1 else []))
        self.batches[version] = [*self.batches[version - 1], batch]

    def _roll_back(self, version: int, manifest: Mapping[str, Any]) -> None:
        self.dropped.update(dict.fromkeys(manifest["dropped"], version))
        target = int(manifest["target"])
        self.batches[version] = [
            tuple(id for id in batch if id.removeprefix(PREFIX) not in self.dropped) for batch in self.batches[target]
        ]
        inside = {id for batch in self.batches[version] for id in ids_of(batch)}
        if both := set(manifest["requeued"]) & (inside | self.dropped.keys()):
            self.problems.append(f"version {version} queues {sorted(both)} again, in its weights or dropped")
        for id in manifest["requeued"]:
            self.ledger.pop(id, None)
        self.ledger.update(dict.fromkeys(manifest["retaken"], version))
        if lost := {id for id in inside if not id.startswith(PREFIX)} - self.ledger.keys():
            self.problems.append(f"version {version} has {sorted(lost)}, whom no ledger knows")

    @property
    def live(self) -> list[Batch]:
        """The batches in the newest weights."""
        return self.batches[len(self.manifests)]

    @property
    def rollbacks(self) -> list[int]:
        """The versions that are one."""
        return [version for version, manifest in self.manifests.items() if manifest["kind"] == "rollback"]
