"""What an application imports: redis, rq and msgpack, never torch.

from producer import Producer

producer = Producer("redis://127.0.0.1:6379/0")
sent = producer.enqueue([{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}])
version = producer.wait(sent.id, timeout=60)
"""

from producer.aclient import AsyncProducer
from producer.client import Producer
from producer.errors import TandemError
from producer.jobs import Enqueued, QueueUnavailable, Status, TranscriptFailed, UnknownTranscript, WaitTimeout
from producer.transcript import InvalidTranscript, Transcript

__all__ = [
    "AsyncProducer",
    "Enqueued",
    "InvalidTranscript",
    "Producer",
    "QueueUnavailable",
    "Status",
    "TandemError",
    "Transcript",
    "TranscriptFailed",
    "UnknownTranscript",
    "WaitTimeout",
]
