"""What rank 0 leaves in its run directory while it waits for other ranks' processes, for `tandem status` to read.

    tell(run_dir, others, since)        # nobody: the file goes
    read(run_dir)                       # [Waited(rank=1, pid=4711, seconds=42.0, doing="is stopped")]

Must not know: torch, Redis, vLLM.
Invariant: what a rank 0 that died left behind, or says of processes that are gone, is not read.
"""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.distributed.rank_watch import Other
from worker.utils.process_state import doing, state_of

NAME = "waiting.json"
MOST_BYTES = 65_536


@dataclass(frozen=True)
class Waited:
    """A rank's process that rank 0 waits for. doing: what it does now, as a verb."""

    rank: int
    pid: int
    seconds: float
    doing: str


def tell(run_dir: Path, others: Sequence[Other], since: float) -> None:
    """Say who is waited for, since when (seconds since 1970). Where it cannot be written, it is not said."""
    path = run_dir / NAME
    with contextlib.suppress(OSError):
        if not others:
            path.unlink(missing_ok=True)
            return
        found = {"by": os.getpid(), "since": since, "ranks": [[other.rank, other.process.pid] for other in others]}
        new = path.with_suffix(".new")
        new.write_text(json.dumps(found))
        new.rename(path)


def read(run_dir: Path) -> list[Waited]:
    """Who is waited for now, by the processes of this machine."""
    try:
        with (run_dir / NAME).open("rb") as file:
            found = json.loads(file.read(MOST_BYTES))
        by, seconds = int(found["by"]), max(0.0, time.time() - float(found["since"]))
        ranks = [(int(rank), int(pid)) for rank, pid in found["ranks"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if state_of(by) is None:
        return []
    return [Waited(rank, pid, seconds, doing(pid)) for rank, pid in ranks if state_of(pid) is not None]
