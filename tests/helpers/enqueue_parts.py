"""`tandem enqueue` as a process, and what it left on the queue."""

import os
import subprocess
import sys

import redis
from rq import Queue

from producer import keys
from producer.serializer import MsgpackSerializer

TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody you know."}]
TANDEM = [sys.executable, "-m", "worker.cli"]


def queued(store: redis.Redis) -> list[str]:
    """Ids on the queue, in order."""
    return Queue(keys.QUEUE, connection=store, serializer=MsgpackSerializer).job_ids


def tandem(*args: str, url: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    """`tandem ARGS` with the Redis at `url`."""
    done = subprocess.run([*TANDEM, *args], input=stdin, capture_output=True, env={**os.environ, "REDIS_URL": url})
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())
