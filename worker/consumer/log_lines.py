"""A worker's events as lines of its log, in English.

Must not know: Redis, RQ, torch.
"""

import logging
from typing import Any

from worker.consumer import events
from worker.consumer.events import Hooks, Notice

logger = logging.getLogger("tandem.worker")


class LogHooks(Hooks):
    """One log line a version, one a failure, and the notices; logger `tandem.worker`."""

    def on_start(self) -> None:
        logger.info("worker ready")

    def on_version(self, line: dict[str, Any]) -> None:
        logger.info(version_line(line))

    def on_rejected(self, job_id: str, reason: str) -> None:
        logger.warning("job %s failed: %s", job_id, reason.strip().splitlines()[-1] if reason.strip() else "?")

    def on_already_trained(self, job_id: str, version: int) -> None:
        logger.info("job %s was trained before, in version %s", job_id, version)

    def on_split(self, jobs: int, error: str) -> None:
        logger.warning("a batch of %d failed (%s); trying its halves", jobs, error)

    def on_notice(self, notice: Notice) -> None:
        logger.warning(sentence(notice))

    def on_stop(self) -> None:
        logger.info("worker stopped")


def sentence(notice: Notice) -> str:
    """`notice` in English, one line."""
    match notice:
        case events.TookOver(said):
            return said
        case events.JobsRecovered(jobs):
            return f"put back {jobs} jobs that a dead worker held"
        case events.IdDropped(id, why):
            return f"dropped {id} from the queue: {why}"
        case events.EntryDropped(entry):
            return f"dropped {entry} from the started jobs: no such job"
        case events.ResultNotWritten(job_id, key):
            return f"job {job_id} could not be given its result: Redis key {key} is of a wrong type"
        case events.CommitWaits(version, problem):
            return f"Redis has not taken version {version} ({problem}); trying on"
        case events.NotesNotWritten(version, problem):
            return f"version {version} is committed, but weights:state does not say how long it took ({problem})"
        case events.RedisAway(problem):
            return f"Redis does not serve this worker ({problem}); waiting until it does"
        case events.RedisBack(seconds, jobs):
            return f"Redis serves this worker again after {seconds:.1f} s; {jobs} jobs were put back"
        case events.MayEvict(problem):
            return problem
        case events.Stopping(signal, again):
            return f"{signal}: ending after the batch in hand{' (a step is never cut short)' if again else ''}"
        case events.EndNotTold(problem):
            return f"Redis could not be told that this worker ends ({problem}); the next worker tidies up"
        case events.MaintenanceFailed(kind):
            return f"maintenance of RQ's registries broke off ({kind}): a key of this queue is of a wrong type"
    return repr(notice)


def version_line(line: dict[str, Any]) -> str:
    """version 12 · 8 jobs · 3,214 tokens · loss 1.2345 · update/weight 2.1e-05 · step 1.20 s · pause 61 ms"""
    parts = [f"version {line['version']}", f"{line['jobs']} job{'' if line['jobs'] == 1 else 's'}"]
    if line.get("tokens") is not None:
        parts.append(f"{line['tokens']:,} tokens")
    if line.get("loss") is not None:
        parts.append(f"loss {line['loss']:.4f}")
    if line.get("update_ratio") is not None:
        parts.append(f"update/weight {line['update_ratio']:.1e}")
    for name in ("linger", "tokenize", "step", "pause", "commit"):
        seconds = line.get(f"{name}_s")
        if seconds is not None:
            parts.append(f"{name} {seconds:.2f} s" if seconds >= 1 else f"{name} {seconds * 1000:.0f} ms")
    return " · ".join(parts)
