"""What a worker tells of itself: hooks that do nothing, and the ones that log.

Must not know: Redis, RQ, torch.
Invariants: a hook sees ids, numbers and reasons, never a transcript's text; a hook that raises is logged and ignored.
"""

import logging
from typing import Any

logger = logging.getLogger("tandem.worker")


class Hooks:
    """Subclass and override what you need; every method does nothing. Called in the worker's main thread."""

    def on_start(self) -> None:
        """The worker holds its lock and is about to take jobs."""

    def on_version(self, line: dict[str, Any]) -> None:
        """A version is committed. line: version, lineage, jobs, tokens, loss, linger_s, tokenize_s, step_s, pause_s,
        commit_s (seconds), as far as known."""

    def on_rejected(self, job_id: str, reason: str) -> None:
        """A job failed alone, or was sent back for a retry."""

    def on_already_trained(self, job_id: str, version: int) -> None:
        """A job was finished with the version its transcript went into earlier."""

    def on_split(self, jobs: int, error: str) -> None:
        """A batch of `jobs` failed with no weight touched and is tried again in halves."""

    def on_notice(self, sentence: str) -> None:
        """Anything else a person watching would want to know."""

    def on_stop(self) -> None:
        """The worker takes no more jobs."""


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

    def on_notice(self, sentence: str) -> None:
        logger.warning(sentence)

    def on_stop(self) -> None:
        logger.info("worker stopped")


def version_line(line: dict[str, Any]) -> str:
    """version 12 · 8 jobs · 3,214 tokens · loss 1.2345 · step 1.20 s · pause 61 ms · commit 3 ms"""
    parts = [f"version {line['version']}", f"{line['jobs']} job{'' if line['jobs'] == 1 else 's'}"]
    if line.get("tokens") is not None:
        parts.append(f"{line['tokens']:,} tokens")
    if line.get("loss") is not None:
        parts.append(f"loss {line['loss']:.4f}")
    for name in ("linger", "tokenize", "step", "pause", "commit"):
        seconds = line.get(f"{name}_s")
        if seconds is not None:
            parts.append(f"{name} {seconds:.2f} s" if seconds >= 1 else f"{name} {seconds * 1000:.0f} ms")
    return " · ".join(parts)
