"""Traffic for hours: people who chat, and say of some answers what they think; an application that queues feedback.

Must not know: processes, memory. Invariants: all is drawn from one seed; every transcript's id is kept as soon as Redis
or the server has taken it; a call that fails is counted by what it said and, where it queues something, made again
until it is taken.
"""

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from typing import Any

from producer import Producer
from producer.errors import TandemError

WORDS = ("red", "green", "blue", "one", "two", "three", "night", "day", "sun", "moon", "up", "down")
SAID: tuple[dict[str, Any], ...] = ({"rating": 1}, {"rating": -1}, {"correction": "two moons"}, {"comment": "shorter"})
"""What is said of an answer over HTTP."""
QUEUED = ("plain", "plain", "liked", "disliked", "rejected", "comment", "distill")
PAUSE = 2.0
"""Mean seconds that a person thinks before the next question."""
IDLE = (240.0, 30.0)
"""In each stretch of so many seconds, nobody does anything for the last so many."""


def words(dice: random.Random, count: int) -> str:
    return " ".join(dice.choices(WORDS, k=count))


def message(dice: random.Random, role: str) -> dict[str, str]:
    return {"role": role, "content": words(dice, min(200, int(dice.lognormvariate(2.3, 0.9)) + 1))}


def transcript(seed: int, number: int) -> dict[str, Any]:
    """Transcript `number`, of any kind: one to three turns of 1 to 200 words."""
    dice = random.Random(f"soak/{seed}/{number}")
    turns = [message(dice, role) for _ in range(dice.randint(1, 3)) for role in ("user", "assistant")]
    said: dict[str, dict[str, Any]] = {
        "plain": {"weight": dice.choice((1.0, 0.5))},
        "liked": {"rating": 1},
        "disliked": {"rating": -1},
        "rejected": {"rejected": message(dice, "assistant")},
        "comment": {"comment": words(dice, 3)},
        "distill": {"method": "distill"},
    }
    return {"id": f"soak-{seed}-{number}", "messages": turns, "meta": {"user": f"u{number % 40}"}} | said[
        dice.choice(QUEUED)
    ]


def resting(started: float) -> bool:
    return (time.monotonic() - started) % IDLE[0] > IDLE[0] - IDLE[1]


class Traffic:
    """`people` who chat with the server at `url()`, and one application that queues `transcripts` in `seconds`.

    key: of feedback. model: its name for the server. share: of the answers of which something is said.
    """

    def __init__(
        self,
        url: Callable[[], str],
        model: str,
        key: str,
        redis_url: str,
        *,
        seed: int,
        seconds: float,
        transcripts: int,
        people: int = 2,
        longest: int = 400,
        share: float = 0.3,
    ) -> None:
        self._url, self._model, self._key, self._redis_url = url, model, key, redis_url
        self._seed, self._seconds, self._count, self._longest, self._share = seed, seconds, transcripts, longest, share
        self.queued: list[str] = []
        self.said: list[str] = []
        self.answers: Counter[str] = Counter()
        """What came of the calls: "chat 200", "feedback 202", "enqueue refused", ..."""
        self._over = threading.Event()
        self._started = time.monotonic()
        self._threads = [threading.Thread(target=self._queue, daemon=True)]
        self._threads += [threading.Thread(target=self._chat, args=(one,), daemon=True) for one in range(people)]

    def __enter__(self) -> "Traffic":
        self._started = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def sent(self) -> int:
        return len(self.queued) + len(self.said)

    def _queue(self) -> None:
        """By a clock with chance gaps; what is late is sent at once, as after a pause of Redis."""
        dice, due = random.Random(f"clock/{self._seed}"), 0.0
        busy = self._seconds * (1 - IDLE[1] / IDLE[0])
        with Producer(self._redis_url) as producer:
            for number in range(self._count):
                due += dice.expovariate(self._count / busy)
                while not self._over.is_set() and (time.monotonic() - self._started < due or resting(self._started)):
                    self._over.wait(0.05)
                while not self._over.is_set():
                    try:
                        [sent] = producer.enqueue_many([transcript(self._seed, number)])
                    except TandemError as error:
                        self.answers[f"enqueue: {type(error).__name__}"] += 1
                        self._over.wait(0.5)
                        continue
                    self.queued.append(sent.id)
                    self.answers[f"enqueue: {sent.outcome}"] += 1
                    break

    def _chat(self, person: int) -> None:
        dice, asked = random.Random(f"person/{self._seed}/{person}"), 0
        while not self._over.wait(dice.expovariate(1 / PAUSE)):
            if resting(self._started):
                continue
            asked += 1
            prompt = words(dice, min(self._longest, int(dice.lognormvariate(3, 1.2)) + 1))
            body = {"model": self._model, "messages": [{"role": "user", "content": prompt}]}
            body |= {"max_tokens": dice.randint(1, 60), "stream": dice.random() < 0.5}
            status, _, headers = self._post("/v1/chat/completions", body)
            self.answers[f"chat {status}"] += 1
            record = headers.get("X-Tandem-Completion")
            if status == "200" and record and dice.random() < self._share:
                self._say(record, dice.choice(SAID) | {"user": f"p{person}-{asked % 10}"})

    def _say(self, record: str, said: dict[str, Any]) -> None:
        status, answer, _ = self._post("/v1/feedback", {"id": record} | said)
        self.answers[f"feedback {status}"] += 1
        if status == "202":
            self.said.append(json.loads(answer)["id"])

    def _post(self, path: str, body: dict[str, Any]) -> tuple[str, bytes, Any]:
        """(status or what broke, body, headers)."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self._url() + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return str(reply.status), reply.read(), reply.headers
        except urllib.error.HTTPError as error:
            return str(error.code), error.read(), error.headers
        except (OSError, ValueError, http.client.HTTPException) as error:  # it is away, or went away in mid-answer
            return type(error).__name__, b"", {}
