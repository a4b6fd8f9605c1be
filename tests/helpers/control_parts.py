"""A server's two sockets in this process, around an engine that only counts: where every moment can be chosen.

The header, weights.sock, control.sock and the middleware's state are the real ones.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from patience import PATIENCE

from worker.serving.cache_policy import CachePolicy
from worker.serving.control_client import server_state
from worker.serving.vllm.control_server import Control
from worker.serving.vllm.server_state import ServerState
from worker.serving.vllm.weight_service import WeightService
from worker.shared_weights.header import HEADER_BYTES, Header
from worker.utils import unix_socket

LINEAGE = "b" * 32


class CountingEngine:
    """What `Control` asks of vLLM's EngineClient; `calls` in order, and what goes wrong if `fail` names a call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.paused = False
        self.errored = False
        self.fail: dict[str, Any] = {}
        """Call -> what it raises, returns, or waits for."""
        self.on: dict[str, Callable[[], Any]] = {}
        """Call -> what is looked at while it is made."""

    async def _called(self, name: str) -> Any:
        self.calls.append(name)
        if name in self.on:
            self.on[name]()
        outcome = self.fail.get(name)
        if isinstance(outcome, Exception):
            raise outcome
        return await outcome if asyncio.iscoroutine(outcome) else outcome

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        await self._called(f"pause {mode} {'clear' if clear_cache else 'keep'}")
        self.paused = True

    async def freeze(self) -> None:
        """What `private_api.freezer_of` finds behind `pause_generation`."""
        await self._called("freeze")
        self.paused = True

    async def resume_generation(self) -> None:
        await self._called("resume")
        self.paused = False

    async def is_paused(self) -> bool:
        return await self._called("is_paused") is None and self.paused

    async def reset_prefix_cache(self) -> bool:
        return await self._called("reset_prefix_cache") is not False

    async def collective_rpc(self, name: str) -> list[None]:
        await self._called(name)
        return [None]


class LocalServer:
    """`with LocalServer(folder) as server`: the sockets lie in `run_dir`; `header` is the one beside the weights."""

    def __init__(self, run_dir: Path, policy: CachePolicy = CachePolicy()) -> None:  # noqa: B008  (frozen)
        self.policy = policy
        self.run_dir = unix_socket.prepare_run_dir(run_dir)
        self.header = Header(torch.zeros(HEADER_BYTES, dtype=torch.uint8))
        self.header.adopt(LINEAGE, 0)
        self.before_header: Callable[[], None] = lambda: None
        """Called before the header is read for the API process."""
        self.engine = CountingEngine()
        self.progress: dict[str, int] = {}
        """Tokens that each running request has made."""
        self.state = ServerState(LINEAGE, 0)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)

    def __enter__(self) -> Self:
        answers = {"describe": self.header.fields, "header": self._read_header, "revoke": self.header.revoke}
        self.service = WeightService(self.run_dir, answers)
        self._thread.start()
        self.run(self._start())
        return self

    def _read_header(self) -> dict[str, Any]:
        self.before_header()
        return self.header.fields()

    async def _score(self, ids: list[int]) -> list[float]:
        found = await self.engine._called(f"score {ids}")
        return [-float(i) for i in ids[1:]] if found is None else found

    async def _start(self) -> None:
        rendering = {"chat_template": None, "template_kwargs": {}}
        progress, freeze = lambda: dict(self.progress), self.engine.freeze
        self.control = Control(
            self.engine, self.state, self.run_dir, rendering, freeze, self.policy, progress, self._score
        )
        await self.control.start()

    def run(self, work: Any) -> Any:
        """The result of a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The server's state, once `condition` holds of it."""
        deadline = time.monotonic() + PATIENCE
        while not condition(state := server_state(self.run_dir)):
            if time.monotonic() > deadline:
                raise AssertionError(f"never came true; the state is {state}")
            self.run(asyncio.sleep(0.02))
        return state

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.until(lambda state: state["trainer"] is None)
        finally:
            self._end()

    def _end(self) -> None:
        self.run(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.service.close()

    async def _stop(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
