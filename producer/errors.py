"""Every error that a producer raises on purpose, and the one base of all errors of Tandem.

`str(error)` is one clear sentence for a user: it names the field, the file or the flag, and says what to do.
Anything else that escapes is a bug and keeps its traceback.
The names without `Error` at their end are older; they mean the same classes and stay importable.
"""

from typing import Any


class TandemError(Exception):
    """Base class of Tandem's own errors; the command line prints it as `error: ...` and exits 1."""


class InvalidTranscriptError(TandemError, ValueError):
    """`field` says where (`messages[3].content`), `problem` what is wrong and what to do."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class RedisUrlError(TandemError, ValueError):
    """A URL that names no Redis, or an option in it that a producer or a worker cannot work with."""


class QueueUnavailableError(TandemError, ConnectionError):
    """Redis is away, full or refuses us. `queued`: what `enqueue_many` had done, up to the pipeline that failed."""

    queued: "list[Any]" = []  # noqa: RUF012 - replaced, never changed


class UnknownTranscriptError(TandemError, LookupError):
    """Neither the queue nor the ledger knows this id."""


class UnknownCompletionError(TandemError, LookupError):
    """No completion is recorded under this key: never, no more, or not in a form that can be read."""


class TranscriptFailedError(TandemError):
    """The worker refused the transcript, or somebody cancelled it: it is in no version."""


class WaitTimeoutError(TandemError, TimeoutError):
    """The transcript is in no version yet."""


InvalidTranscript = InvalidTranscriptError
QueueUnavailable = QueueUnavailableError
UnknownTranscript = UnknownTranscriptError
TranscriptFailed = TranscriptFailedError
WaitTimeout = WaitTimeoutError
