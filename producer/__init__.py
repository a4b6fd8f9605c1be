"""What an application imports: redis, rq and msgpack, never torch. Also importable as `tandem_producer`.

from producer import Producer

producer = Producer("redis://127.0.0.1:6379/0")
sent = producer.enqueue([{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}])
version = sent.wait(timeout=60)
"""

from .aclient import AsyncProducer
from .client import Producer
from .errors import (
    InvalidTranscript,
    InvalidTranscriptError,
    QueueUnavailable,
    QueueUnavailableError,
    RedisUrlError,
    TandemError,
    TranscriptFailed,
    TranscriptFailedError,
    UnknownCompletionError,
    UnknownTranscript,
    UnknownTranscriptError,
    WaitTimeout,
    WaitTimeoutError,
)
from .eviction import Eviction
from .outcomes import AsyncEnqueued, Enqueued, Outcome, State, Status
from .transcript import Transcript

__all__ = [
    "AsyncEnqueued",
    "AsyncProducer",
    "Enqueued",
    "Eviction",
    "InvalidTranscript",
    "InvalidTranscriptError",
    "Outcome",
    "Producer",
    "QueueUnavailable",
    "QueueUnavailableError",
    "RedisUrlError",
    "State",
    "Status",
    "TandemError",
    "Transcript",
    "TranscriptFailed",
    "TranscriptFailedError",
    "UnknownCompletionError",
    "UnknownTranscript",
    "UnknownTranscriptError",
    "WaitTimeout",
    "WaitTimeoutError",
]
