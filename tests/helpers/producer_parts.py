"""What the producer's tests share: a conversation, what lies in the queue, and how a worker ends a job."""

import threading
import time
from collections.abc import Callable

import redis
from rq import Queue
from rq.job import Job, JobStatus

from producer import keys
from producer.serializer import MsgpackSerializer

TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody you know."}]


def queued(store: redis.Redis) -> list[str]:
    return Queue(keys.QUEUE, connection=store, serializer=MsgpackSerializer).job_ids


def train(store: redis.Redis, job_id: str, version: int) -> None:
    """What a worker's commit writes for one job: ledger, version and RQ's own end of a job, in one transaction."""
    job = Job.fetch(job_id, connection=store, serializer=MsgpackSerializer)
    with store.pipeline(transaction=True) as pipe:
        pipe.hset(keys.LEDGER, job_id, str(version))
        pipe.set(keys.VERSION, version)
        pipe.lrem("rq:queue:" + keys.QUEUE, 1, job_id)
        job._handle_success(result_ttl=keys.RESULT_TTL, pipeline=pipe, worker_name="test")
        pipe.execute()


def fail(store: redis.Redis, job_id: str, why: str) -> None:
    job = Job.fetch(job_id, connection=store, serializer=MsgpackSerializer)
    with store.pipeline(transaction=True) as pipe:
        job.set_status(JobStatus.FAILED, pipeline=pipe)
        job._handle_failure(f"Traceback ...\n{why}\n", pipeline=pipe, worker_name="test")
        pipe.execute()


def once_blocked(store: redis.Redis, act: Callable[[], None]) -> threading.Thread:
    """Runs `act` as soon as a client is blocked in a read."""

    def run() -> None:
        client = redis.Redis(connection_pool=store.connection_pool)
        while not client.info("clients")["blocked_clients"]:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
