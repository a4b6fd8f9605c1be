"""What an application imports: redis, rq and msgpack, never torch.

from producer import Producer
producer = Producer("redis://127.0.0.1:6379/0")
job = producer.enqueue([{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}])
version = producer.wait(job.id, timeout=60)
"""

from producer.client import Producer
from producer.errors import TandemError
from producer.transcript import InvalidTranscript, Transcript

__all__ = ["InvalidTranscript", "Producer", "TandemError", "Transcript"]
