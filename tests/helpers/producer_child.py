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
from producer.completions import Completion, save


def talk(says: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": says}]


def reason(wait: Any) -> str:
    try:
        return str(wait())
    except TranscriptFailedError as error:
        return str(error)


def recorded(url: str) -> str:
    """The key of an answer that a server kept."""
    one = Completion(id="c", created=1, model="m", messages=talk("")[:1], answer=talk("an answer")[1])
    save(redis.Redis.from_url(url), one, 3600, 1 << 20)
    return one.key


async def queue_and_wait(url: str, id: str, key: str, queued: Any) -> Any:
    async with AsyncProducer(url) as producer:
        said = [(await producer.rate(key, value, user="b")).outcome for value in (1, 1, 0.5, 0)]
        sent = await producer.enqueue(talk("good"), id=id)
        outcomes = [sent.outcome, (await producer.enqueue(talk("good"), id=id)).outcome]
        queued()
        return {
            "said": said,
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
        job, key = first.job, recorded(url)
        said = [producer.rate(key, value, user="a") for value in (1, -1, 0)] + [producer.correct(key, "good")]
        awaited = asyncio.run(queue_and_wait(url, "b", key, lambda: print("queued", flush=True)))
        seen = {
            "rq": rq.VERSION,
            "redis": redis.__version__,
            "first": [first.outcome, job and job.meta, first.wait(timeout=600)],
            "said": [[sent.outcome for sent in said], said[-1].wait(timeout=600)],
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
