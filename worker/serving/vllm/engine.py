"""The few things that Tandem asks of vLLM's engine: stand still, go on, drop all requests. Each call has a bound.

Must not know: the header, trainers, HTTP. Uses of vLLM's EngineClient are its public methods.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any

from worker.serving.protocol import ENGINE_SECONDS, ControlError


class Engine:
    """vLLM's engine behind `client` (an EngineClient)."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @property
    def ended(self) -> bool:
        """Whether the engine is gone for good."""
        return bool(self._client.errored)

    async def pause(self) -> None:
        """Freeze the running requests to be recomputed, drop what was cached of the old weights, idle the device."""
        await self._bounded("pause", self._pause())

    async def _pause(self) -> None:
        await self._client.pause_generation(mode="keep", clear_cache=True)
        if not await self._client.is_paused():
            raise ControlError("vLLM reports that it is running")
        # 0.26 ignores a failed reset inside pause; with nothing running, resetting again shows it.
        if await self._client.reset_prefix_cache() is False:
            raise ControlError("vLLM's prefix cache could not be reset and holds states of the old weights")
        await self._client.collective_rpc("tandem_synchronize")

    async def resume(self) -> None:
        """Let the frozen requests go on."""
        await self._bounded("resume", self._client.resume_generation())

    async def abort_all(self) -> None:
        """End every request that the engine has; those that arrive later wait for `resume`."""
        await self._bounded("end its requests", self._client.pause_generation(mode="abort", clear_cache=False))

    async def _bounded(self, what: str, call: Awaitable[None]) -> None:
        try:
            await asyncio.wait_for(call, ENGINE_SECONDS)
        except TimeoutError:
            raise ControlError(f"vLLM did not {what} within {ENGINE_SECONDS:g} s") from None
