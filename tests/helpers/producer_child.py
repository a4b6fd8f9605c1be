"""An application, run by an interpreter that has the producer's own dependencies and nothing else:

python -S tests/helpers/producer_child.py REDIS_URL

Says "queued" once its transcripts are, waits until they are trained, and prints what it saw as JSON.
"""

import asyncio
import json
import sys
from typing import Any

import redis
import rq

from producer import AsyncProducer, Producer, TranscriptFailedError


def talk(says: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": says}]


def reason(wait: Any) -> str:
    try:
        return str(wait())
    except TranscriptFailedError as error:
        return str(error)


async def queue_and_wait(url: str, id: str, queued: Any) -> Any:
    async with AsyncProducer(url) as producer:
        sent = await producer.enqueue(talk("good"), id=id)
        outcomes = [sent.outcome, (await producer.enqueue(talk("good"), id=id)).outcome]
        queued()
        return {
            "outcomes": outcomes,
            "version": await sent.wait(timeout=600),
            "state": (await producer.status(id)).state,
        }


def main(url: str) -> None:
    with Producer(url) as producer:
        first = producer.enqueue(talk("good"), id="a", meta={"rating": 5}, train_on=[1], weight=0.5)
        many = producer.enqueue_many(
            [{"id": "a", "messages": talk("good")}, {"id": "bad", "messages": talk("unpreparable")}, {"messages": []}]
        )
        job = first.job
        awaited = asyncio.run(queue_and_wait(url, "b", lambda: print("queued", flush=True)))
        seen = {
            "rq": rq.VERSION,
            "redis": redis.__version__,
            "first": [first.outcome, job and job.meta, first.wait(timeout=600)],
            "many": [sent.outcome for sent in many],
            "failed": reason(lambda: many[1].wait(timeout=600)),
            "again": producer.enqueue(talk("good"), id="a").version,
            "version": producer.version(),
            "async": awaited,
            "torch": "torch" in sys.modules,
        }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
