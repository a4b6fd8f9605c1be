"""Takes completions to Redis behind the answers' back: a bounded queue in memory, and one task that empties it.

Must not know: vLLM.
Invariants: `keep` never waits; what the queue has no place for, and what Redis would not take for a while, is dropped,
counted, and said once a minute without a text; a record that was not kept for its content is no error.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable

import redis

from producer.completions import Completion, Kept
from producer.errors import InvalidTranscriptError
from worker.serving.vllm.feedback import answers
from worker.serving.vllm.feedback.recorder import Seen

logger = logging.getLogger("vllm.tandem")

MOST_WAITING = 1024
MOST_BYTES = 128 * 1024 * 1024
"""Of requests and answers that wait in memory."""
PATIENCE = 30.0
"""Seconds that a completion waits for a Redis that takes none."""
PAUSE = 0.5
"""Seconds between two tries."""
LOG_SECONDS = 60.0

Count = Callable[[str, int], None]
Save = Callable[[Completion], Awaitable[Kept]]


def completions(seen: Seen) -> list[Completion]:
    """The records of one request, one for each choice that said something. Those that cannot be kept are left out."""
    body = b"".join(seen.body)
    name, messages = answers.read(seen.asked.api, body, seen.streamed)
    versions = answers.span(seen.version, body if seen.streamed else b"", seen.newest)
    made = []
    for index, (key, answer) in enumerate(zip(seen.keys, messages, strict=False)):
        if answer is None:
            continue
        tokens, logprobs = seen.samples.of(index)
        asked = seen.asked
        try:
            made.append(
                Completion(
                    key=key,
                    id=name,
                    created=seen.created,
                    model=asked.model,
                    user=asked.user,
                    messages=asked.messages,
                    tools=asked.tools,
                    chat_template_kwargs=asked.kwargs,
                    answer=answer,
                    token_ids=tokens,
                    logprobs=logprobs,
                    versions=versions,
                )
            )
        except InvalidTranscriptError:
            continue
    return made


class Keeper:
    """The queue and its task. save: takes one record to Redis. logprobs: see `Samples`. count: is told how
    many records were kept, skipped (for what they are) or dropped."""

    def __init__(self, save: Save, logprobs: bool = True, count: Count = lambda outcome, count: None) -> None:
        self.logprobs = logprobs
        self.dropped = 0
        self._save, self._count = save, count
        self._waiting: deque[tuple[float, Seen]] = deque()
        self._bytes = 0
        self._pending: dict[str, asyncio.Event] = {}
        self._came = asyncio.Event()
        self._said = -LOG_SECONDS
        self._unsaid = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to empty the queue, on the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """What waits is lost."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def keep(self, seen: Seen) -> None:
        """Put it into the queue, or drop it where that is full."""
        if len(self._waiting) >= MOST_WAITING or self._bytes + seen.size > MOST_BYTES:
            return self._drop(len(seen.keys))
        self._waiting.append((time.monotonic(), seen))
        self._bytes += seen.size
        done = asyncio.Event()
        self._pending.update(dict.fromkeys(seen.keys, done))
        self._came.set()

    async def settled(self, key: str, timeout: float) -> bool:
        """Wait until the record of `key` is no longer on its way to Redis; False after `timeout` seconds."""
        done = self._pending.get(key)
        if done is None:
            return True
        try:
            await asyncio.wait_for(done.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def _run(self) -> None:
        while True:
            await self._came.wait()
            while self._waiting:
                since, seen = self._waiting[0]
                await self._take(since, seen)
                self._waiting.popleft()
                self._bytes -= seen.size
                self._say()
                for key in seen.keys:
                    if done := self._pending.pop(key, None):
                        done.set()
            self._came.clear()

    async def _take(self, since: float, seen: Seen) -> None:
        try:
            records = await asyncio.to_thread(completions, seen)
        except Exception as error:  # a bug of ours may cost a record, but no other record and no answer
            logger.warning("tandem: a completion could not be read to be kept (%s)", type(error).__name__)
            return self._drop(len(seen.keys))
        for record in records:
            while True:
                try:
                    kept = await self._save(record)
                    self._count("skipped" if kept is Kept.TOO_LARGE else "kept", 1)
                    break
                except (redis.RedisError, OSError):
                    if time.monotonic() - since > PATIENCE:
                        self._drop(1)
                        break
                    await asyncio.sleep(PAUSE)
                except Exception as error:  # likewise, of ours or of redis-py: the task must outlive it
                    logger.warning("tandem: a completion could not be saved (%s)", type(error).__name__)
                    self._drop(1)
                    break

    def _drop(self, count: int) -> None:
        self.dropped += count
        self._count("dropped", count)
        self._unsaid += count
        self._say()

    def _say(self) -> None:
        now = time.monotonic()
        if self._unsaid and now - self._said >= LOG_SECONDS:
            logger.warning("tandem: %d completions were not kept: Redis is away, full or too slow", self._unsaid)
            self._said, self._unsaid = now, 0
