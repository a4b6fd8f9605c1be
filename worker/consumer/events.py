"""What a worker tells of itself: hooks that do nothing, and the ones that log.

Must not know: Redis, RQ, torch.
Invariants: a hook sees ids, numbers and reasons, never a transcript's text; a hook that raises is logged and ignored.
"""

import logging
import traceback
from typing import Any

from producer.errors import TandemError

logger = logging.getLogger("tandem.worker")


class Hooks:
    """Subclass and override what you need; every method does nothing. Called in the worker's main thread."""

    def on_start(self) -> None:
        """The worker holds its lock and is about to take jobs."""

    def on_version(self, line: dict[str, Any]) -> None:
        """A version is committed. line: version, lineage, jobs, tokens, loss, update_ratio (RMS of the update over RMS
        of the weights), linger_s, tokenize_s, step_s, pause_s, commit_s (seconds), as far as known."""

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


def told(error: BaseException) -> str:
    """An error as it may be kept and logged. Ours: the sentence. Any other: its frames and type, and its causes', but
    never the message, which may quote a transcript (a KeyError, a UnicodeEncodeError)."""
    if isinstance(error, TandemError):
        return f"{type(error).__name__}: {error}"
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    parts = ["Traceback (most recent call last):"]
    for one in reversed(chain):
        parts += ["".join(traceback.format_tb(one.__traceback__)).rstrip(), type(one).__qualname__]
    return "\n".join(filter(None, parts)) + " (message withheld: it may quote the transcript)"


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
