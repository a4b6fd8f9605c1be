"""The few things that Tandem asks of vLLM's engine: stand still, go on, drop all requests. Each call has a bound.

Must not know: the header. Uses of vLLM's EngineClient are its public methods; what is private of it is handed in.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from worker.serving.cache_policy import CachePolicy
from worker.serving.protocol import ENGINE_SECONDS, HELD_BACK_SECONDS, ControlError
from worker.serving.vllm.recomputation import Recomputation

logger = logging.getLogger("vllm.tandem")

OUTPUT_SECONDS = 0.02
"""From the engine's last step to when what it made there has reached those who ask: as vLLM's own pause allows for."""


class Engine:
    """vLLM's engine behind `client` (an EngineClient).

    freeze: has running requests stand still with all that they have computed, at once: the client's own pause sleeps
    then. policy: what an update does to running requests. progress: the tokens that each request inside the engine
    has made.
    """

    def __init__(
        self,
        client: Any,
        freeze: Callable[[], Awaitable[None]],
        policy: CachePolicy,
        progress: Callable[[], dict[str, int]],
    ) -> None:
        self._client = client
        self._policy = policy
        self._progress = progress
        self._freeze = freeze
        self._handed_over = 0.0
        """When what was made before the last pause has reached those who ask; of time.monotonic()."""
        self._recomputation = Recomputation(progress)

    @property
    def ended(self) -> bool:
        """Whether the engine is gone for good."""
        return bool(self._client.errored)

    @property
    def running(self) -> int:
        """How many requests are inside the engine, of those that wait only as many as could run."""
        return len(self._progress())

    @property
    def recomputed_s(self) -> float:
        """Seconds in which requests that an update threw back were being computed again; since the start."""
        return self._recomputation.seconds

    async def pause(self, *, recompute: bool = False) -> None:
        """Freeze the running requests and idle the device. recompute, or by policy: they lose what they have computed,
        as do all cached prefixes."""
        await _bounded("pause", self._pause(recompute or self._policy.recompute))

    async def _pause(self, recompute: bool) -> None:
        if recompute:
            await self._client.pause_generation(mode="keep", clear_cache=True)
        else:
            await self._freeze()
            self._handed_over = time.monotonic() + OUTPUT_SECONDS
        if not await self._client.is_paused():
            raise ControlError("vLLM reports that it is running")
        # 0.26 ignores a failed reset inside pause; with nothing running, resetting again shows it.
        if recompute and await self._client.reset_prefix_cache() is False:
            raise ControlError("vLLM's prefix cache could not be reset and holds states of the old weights")
        await self._client.collective_rpc("tandem_synchronize")

    async def handed_over(self) -> None:
        """Return when all that was made before the last `pause` has had the time to reach those who ask. An update
        takes longer, but for the smallest models'."""
        await asyncio.sleep(max(0.0, self._handed_over - time.monotonic()))

    async def resume(self, *, updated: bool = False) -> None:
        """Let the frozen requests go on; updated: under other weights."""
        if updated and self._policy.recompute:
            self._recomputation.begin()
        await _bounded("resume", self._client.resume_generation())

    async def abort_all(self) -> None:
        """End every request that the engine has; those that arrive later wait for `resume`."""
        await _bounded("end its requests", self._client.pause_generation(mode="abort", clear_cache=False))

    async def hold_back(self) -> None:
        """Wait until the requests that the last version threw back have been computed again (`--running recompute`)."""
        if not self._policy.recompute:
            return
        try:
            seconds = await self._recomputation.over(HELD_BACK_SECONDS)
        except TimeoutError:
            raise ControlError(
                f"held back: {self._recomputation.left} running requests have not been computed again "
                f"{HELD_BACK_SECONDS:g} s after the last version. Serve with --running keep, or send fewer or shorter "
                "prompts at a time"
            ) from None
        if seconds > 0.1:
            logger.info(
                "tandem: a version was held back %.1f s: running requests were still being computed again after the "
                "last one (--running recompute)",
                seconds,
            )


async def _bounded(what: str, call: Awaitable[None]) -> None:
    try:
        await asyncio.wait_for(call, ENGINE_SECONDS)
    except TimeoutError:
        raise ControlError(f"vLLM did not {what} within {ENGINE_SECONDS:g} s") from None
