"""A closed loop of streaming completions over HTTP: clients that send their next request when their last has ended.

Runs in a thread with an event loop of its own, so that other things can be done meanwhile. What came when is kept, and
any stretch of time can be asked for. Must not know: weights, workers.
Invariants: every token is counted once, by the server's own count; a request that is answered by anything but 200,
breaks off or says an error is a failure, never dropped; so is one that has not ended when `stop` loses patience.
"""

import asyncio
import json
import random
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any, Self

import aiohttp
from serving_loads import Load


@dataclass(frozen=True)
class Served:
    """What a stretch of time brought. Times in seconds; gaps are between two chunks of one stream."""

    seconds: float
    requests: int
    failed: int
    tokens: int
    tokens_per_s: float
    itl_p50: float
    itl_p99: float
    itl_p999: float
    itl_max: float
    coalesced: float
    """The share of gaps under 50 us: chunks that were ready together. Where it is not near 0, somebody between engine
    and client had no CPU for a while, and the gaps say more about that than about the engine."""
    first_token_p50: float
    first_token_p99: float

    def plain(self) -> dict[str, float]:
        return asdict(self)


class ClosedLoop:
    """Starts on `with`; at its end no new request is sent, and those on their way may end within `patience` seconds.

    load: what they send, of token ids below `vocabulary`; every request asks for `max_tokens`, more or less by up to
    `spread` of them: clients whose answers are equally long soon send their requests all at once, in waves, and what is
    counted in some seconds then says where the waves were. turn: of `Load.prompts`. ramp: seconds within which the
    clients begin, one after another, for the same reason.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        load: Load,
        max_tokens: int = 128,
        spread: float = 0.0,
        vocabulary: int = 900,
        patience: float = 60.0,
        turn: int = 0,
        ramp: float = 0.0,
    ) -> None:
        self.url, self.model, self.load, self.patience, self.turn = url, model, load, patience, turn
        self.max_tokens, self.spread, self.vocabulary, self.ramp = max_tokens, spread, vocabulary, ramp
        self.failures: list[tuple[float, str]] = []
        self._chunks: list[tuple[float, float | None, int]] = []  # (when, gap to the chunk before, tokens)
        self._first: list[tuple[float, float]] = []
        self._ended: list[float] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.patience = 1.0
        self.stop()

    def stop(self) -> None:
        """Idempotent."""
        self._stopping.set()
        self._thread.join()

    def between(self, start: float, end: float) -> Served:
        """What came from `start` to `end`, both of time.monotonic()."""
        chunks = [chunk for chunk in list(self._chunks) if start <= chunk[0] < end]
        gaps = sorted(gap for _, gap, _ in chunks if gap is not None)
        first = sorted(seconds for when, seconds in list(self._first) if start <= when < end)
        tokens = sum(count for _, _, count in chunks)
        return Served(
            seconds=end - start,
            requests=sum(start <= when < end for when in list(self._ended)),
            failed=sum(start <= when < end for when, _ in list(self.failures)),
            tokens=tokens,
            tokens_per_s=tokens / (end - start),
            itl_p50=quantile(gaps, 0.5),
            itl_p99=quantile(gaps, 0.99),
            itl_p999=quantile(gaps, 0.999),
            itl_max=gaps[-1] if gaps else float("nan"),
            coalesced=sum(gap < 50e-6 for gap in gaps) / len(gaps) if gaps else float("nan"),
            first_token_p50=quantile(first, 0.5),
            first_token_p99=quantile(first, 0.99),
        )

    async def _all(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            tasks = [asyncio.create_task(self._client(session, number)) for number in range(self.load.clients)]
            while not self._stopping.is_set():
                await asyncio.sleep(0.05)
            _, late = await asyncio.wait(tasks, timeout=self.patience)
            for task in late:
                task.cancel()
                self.failures.append((time.monotonic(), f"not answered within {self.patience:g} s of the end"))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        prompts, draw = self.load.prompts(number, self.vocabulary, self.turn), random.Random(number)
        prompt = next(prompts)
        await asyncio.sleep(self.ramp * number / self.load.clients)
        while not self._stopping.is_set():
            try:
                length = round(self.max_tokens * draw.uniform(1 - self.spread, 1 + self.spread))
                answer = await self._request(session, prompt, length)
                self._ended.append(time.monotonic())
                prompt = prompts.send(answer)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                self.failures.append((time.monotonic(), f"{type(error).__name__}: {error}"))
                await asyncio.sleep(0.2)  # a server that refuses is not to be flooded

    async def _request(self, session: aiohttp.ClientSession, prompt: list[int], length: int) -> list[int]:
        """One request for `length` tokens; their ids."""
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": length, "stream": True}
        body |= {"temperature": 1.0, "ignore_eos": True, "return_token_ids": True}
        body |= {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        sent, last, counted, tokens = time.monotonic(), None, 0, []
        async with session.post(f"{self.url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise ValueError(f"status {answer.status}: {(await answer.text())[:300]}")
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                event, now = json.loads(line[6:]), time.monotonic()
                if "error" in event:
                    raise ValueError(f"the stream says: {event['error']}")
                done = int((event.get("usage") or {}).get("completion_tokens", counted))
                tokens += [token for choice in event.get("choices", ()) for token in choice.get("token_ids") or ()]
                if done == counted:
                    continue
                if last is None:
                    self._first.append((now, now - sent))
                self._chunks.append((now, None if last is None else now - last, done - counted))
                last, counted = now, done
        if counted != length:
            raise ValueError(f"the stream ended after {counted} of {length} tokens")
        return tokens


def quantile(ascending: list[float], q: float) -> float:
    """The nearest-rank quantile; nan of nothing."""
    return ascending[min(len(ascending) - 1, int(q * len(ascending)))] if ascending else float("nan")
