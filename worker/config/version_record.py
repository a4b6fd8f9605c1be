"""The record of a version: what lies beside the weights while it is written, and what the ledger commits.

Must not know: torch, Redis.
Invariant: `VersionRecord.from_plain(record.plain()) == record`; the plain map is msgpack's and JSON's own types.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from producer.errors import TandemError

KINDS: dict[str, type] = {"version": int, "lineage": str, "jobs": list, "manifest": dict, "results": dict}
"""The fields of the plain map."""


class NoVersionRecordError(TandemError):
    """A map that is no record of a version: another program, or another Tandem, wrote it."""


@dataclass(frozen=True)
class VersionRecord:
    """One version: its number, whose weights it is of, and what went into it.

    jobs: ids of the transcripts. manifest: what `weights:manifest:<version>` will say beside these fields, a plain map
    of measurements that each room adds its own to. results: per job id, the job's result as it is stored.
    """

    version: int
    lineage: str
    jobs: list[str] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def base(self) -> int:
        """The version Redis must be at for this one to follow: the one before, unless a run without Redis (`tandem
        train` on a server) made several versions and says in its manifest which one it started from."""
        return int(self.manifest.get("base", self.version - 1))

    def plain(self) -> dict[str, Any]:
        """The map that is stored."""
        return {name: getattr(self, name) for name in KINDS}

    @classmethod
    def from_plain(cls, stored: Mapping[str, Any]) -> "VersionRecord":
        """Raises `NoVersionRecordError`."""
        wrong = [name for name, kind in KINDS.items() if not isinstance(stored.get(name), kind)]
        if wrong:
            raise NoVersionRecordError(
                f"the batch record beside the weights has no usable {', '.join(wrong)}: another version of Tandem wrote"
                " it; restart the server (tandem serve ...)"
            )
        return cls(**{name: stored[name] for name in KINDS})
