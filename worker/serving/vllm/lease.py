"""The lease on the weights: who may write them, until when, and what becomes of a lease that is not given back.

A pause (or, in hogwild, the leave to write while requests run) is a lease. It ends with a resume, with its holder's
connection, or, if the holder neither resumes nor renews in time, by its deadline. In the last two cases the header
beside the weights says what the holder left:
- CLEAN: the server takes the header's version and goes on. At a deadline it moves the header's fence first (see
  `shared_weights/header.py`), so that the holder, should it wake up, finds that it may not begin, and ends.
- APPLYING: the weights are torn. Every request is answered 503 with the reason, also those in flight, until the weights
  are whole: either their holder wakes up, finishes and resumes, or it ends, and the next trainer restores them.

While a holder that was too late is still connected, no other trainer is let in: two would have the weights open.

Invariant: requests run only under a CLEAN header, unless the trainer asked for hogwild.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from producer.errors import TandemError
from worker.serving.protocol import PAUSED, SERVING, ControlError
from worker.serving.vllm.engine import Engine
from worker.serving.vllm.server_state import ServerState
from worker.shared_weights.weights_client import read_header, revoke
from worker.utils import unix_socket

logger = logging.getLogger("vllm.tandem")

SETTLED_SECONDS = 0.05
"""From moving the fence to reading the state: longer than any processor keeps a write to itself."""
Reply = dict[str, Any]


@dataclass(eq=False)
class Lease:
    """One holder's leave to write the weights, for `seconds`. overdue: it was not given back in that time."""

    holder: str
    seconds: float
    overdue: bool = False


class Leases:
    """Gives at most one lease at a time on the weights that `engine` serves."""

    def __init__(self, engine: Engine, state: ServerState, run_dir: Path) -> None:
        self._engine = engine
        self._state = state
        self._run_dir = run_dir
        self._lease: Lease | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._lost: str | None = None
        self._background: set[asyncio.Task[None]] = set()
        self.turn = asyncio.Lock()
        """Held for one request of the trainer, one lost connection or one deadline at a time."""

    def start(self) -> None:
        """Watch the engine from now on."""
        self._spawn(self._watch_engine())

    def load(self) -> Reply:
        """What of the engine's load a trainer is told: see `ServerControl.state`."""
        return {
            "running": self._engine.running,
            "recomputed_s": self._engine.recomputed_s,
            "lost_prefix_tokens": self._state.lost_prefixes.tokens,
        }

    @property
    def overdue(self) -> bool:
        """Whether the trainer that is connected did not give its lease back in time."""
        return self._lost is not None or (self._lease is not None and self._lease.overdue)

    def check_not_lost(self) -> None:
        """ControlError when the connected trainer's lease was taken back: it has to start again."""
        if self._lost is not None:
            raise ControlError(self._lost)

    # What the trainer asks for

    async def pause(self, holder: str, seconds: float) -> Reply:
        """A lease of `seconds` for `holder`, the engine standing still: {"seconds": how long that took,
        "running": requests that stand still, "fence"}."""
        if self._state.condition == PAUSED or self._state.mending:
            raise ControlError("the server is paused already")
        started = time.perf_counter()
        fence = (await self._read_header())["fence"]
        if self._state.torn:  # requests go on being refused
            await self._empty_and_pause()
            self._state.mending = True
        else:
            await self._engine.hold_back()
            await self._pause_serving()
        self._grant(holder, seconds)
        return {"seconds": time.perf_counter() - started, "running": self._engine.running, "fence": fence}

    async def begin_hogwild(self, holder: str, seconds: float) -> Reply:
        """A lease of `seconds` for `holder` to write while requests run: {"fence"}."""
        if self._state.condition != SERVING or self._state.written:
            raise ControlError("begin_hogwild: the server is not serving whole weights")
        fence = (await self._read_header())["fence"]
        self._state.begin_hogwild()
        self._grant(holder, seconds)
        return {"fence": fence}

    def renew(self, seconds: float) -> None:
        """The lease lasts for `seconds` from now on."""
        if self._lease is None:
            raise ControlError("renew: there is no lease; pause first")
        self._grant(self._lease.holder, seconds)

    async def resume(self, version: int, rebuilt: bool) -> None:
        """The weights are whole and are `version`: the lease ends, the server goes on. rebuilt: see `PrefixEpochs`."""
        if self._state.condition != PAUSED and not self._state.mending:
            raise ControlError("the server is not paused")
        header = await self._read_header()
        if (header["state"], header["version"]) != ("CLEAN", version):
            raise ControlError(
                f"resume with version {version} refused: the header beside the weights says "
                f"{header['state']}, version {header['version']}"
            )
        await self._go_on(header, rebuilt)

    def _grant(self, holder: str, seconds: float) -> None:
        self._end()
        self._lease = Lease(holder, seconds)
        expired = self._expired(self._lease)
        self._timer = asyncio.get_running_loop().call_later(seconds, lambda: self._spawn(expired()))

    def _end(self) -> None:
        """There is no lease any more, and nothing to wait for."""
        if self._timer is not None:
            self._timer.cancel()
        self._lease = self._timer = None

    # A lease that is not given back

    async def holder_gone(self, holder: str) -> None:
        """The trainer's connection has ended: find out what it left, and go on or say why not. Call it with `turn`."""
        self._end()
        self._lost = None
        state = self._state
        held = state.condition == PAUSED or state.mending or state.written
        if state.ended or not (held or state.torn):
            return
        torn = f"{holder} ended while it wrote version {{next}}; start `tandem worker` again: it restores them"
        # Torn weights that it did not hold are an earlier trainer's, and so is the reason.
        await self._settle(f"{holder} was lost in an update", f"the weights are torn: {torn}" if held else None)

    def _expired(self, lease: Lease) -> Callable[[], Coroutine[Any, Any, None]]:
        """What is done when `lease` was not given back in time."""

        async def take_back() -> None:
            async with self.turn:
                if self._lease is not lease or self._state.ended:
                    return
                lease.overdue = True
                self._state.lease_overdue()
                silent = f"{lease.holder} was silent for longer than its lease of {lease.seconds:g} s"
                torn = (
                    f"the weights are half written: {silent} while it wrote version {{next}}. The server goes on when"
                    " it finishes; if it hangs for good, end it with kill -9 and start `tandem worker` again, which"
                    " restores the weights"
                )
                await self._settle(silent, torn, revoking=True)

        return take_back

    async def _settle(self, what: str, torn: str | None, *, revoking: bool = False) -> None:
        """Go on if the weights are whole, else refuse requests with the reason `torn` (None: the present one)."""
        try:
            header = await (self._revoke() if revoking else self._read_header())
            if header["state"] == "CLEAN":
                if revoking:
                    self._lost = f"{what}: the server took the weights back and went on; start the trainer again"
                await self._serve_again(header)
                logger.warning("tandem: %s; serving version %d", what, header["version"])
                return
            reason = torn and torn.replace("{next}", str(header["version"] + 1))
        except Exception as error:  # nobody is left to hear it but the server's own clients
            reason = f"{what}, and the server could not go on ({_said(error)}); restart it"
        if reason is None:
            return
        logger.error("tandem: %s", reason)
        holds_pause = self._state.condition == PAUSED or self._state.mending
        self._state.tear(reason)
        self._state.mending = revoking and holds_pause  # a holder that is late may still finish, and resume
        self._spawn(self._end_requests())

    async def _serve_again(self, header: dict[str, Any]) -> None:
        """Go on under `header`. Requests that come from now on find nothing of what was computed during the write."""
        if self._state.torn and not self._state.mending:
            await self._empty_and_pause()
        elif self._state.condition == SERVING:  # hogwild
            self._state.pause()
            await self._engine.pause()
        await self._go_on(header, rebuilt=True)  # by an update, or by a rollback: nobody is left to say

    async def _end_requests(self) -> None:
        """Drop what is in vLLM, again until nobody waits for an answer: a request may be on its way into the engine."""
        rest = 0.1
        while self._state.torn and self._state.in_flight:
            async with self.turn:
                if not self._state.torn:
                    return
                try:
                    await self._engine.abort_all()
                except Exception:
                    logger.exception("tandem: ending the requests failed")
            await asyncio.sleep(rest)
            rest = min(2 * rest, 30.0)  # one whose client does not read what it is sent may stay for ever

    async def _watch_engine(self) -> None:
        """Nobody may wait for the end of a pause once the engine is gone: vLLM's shutdown waits for requests."""
        while not self._engine.ended:
            await asyncio.sleep(1.0)
        self._state.ended = True
        self._state.tear("the server is shutting down: its engine has ended")

    # The engine and the header

    async def _pause_serving(self) -> None:
        self._state.pause()
        try:
            await self._engine.pause()
        except Exception as error:
            await self._engine.resume()
            self._state.go_on()
            raise ControlError(f"vLLM did not pause ({_said(error)}); it goes on serving") from error

    async def _empty_and_pause(self) -> None:
        """Of torn weights: the requests inside were told so, and may not go on under other weights."""
        await self._engine.abort_all()
        await self._engine.pause(recompute=True)

    async def _go_on(self, header: dict[str, Any], rebuilt: bool) -> None:
        """Resume under the header's version, which whoever is answered from here on is told."""
        self._end()
        await self._engine.handed_over()
        self._state.lineage = header["lineage"]
        self._state.take(header["version"], rebuilt)
        await self._engine.resume(updated=True)
        self._state.resume(header["version"])

    async def _read_header(self) -> dict[str, Any]:
        return await self._asked(read_header)

    async def _revoke(self) -> dict[str, Any]:
        """Move the fence, and the header as it is when everybody who began before that can be seen."""
        await self._asked(revoke)
        await asyncio.sleep(SETTLED_SECONDS)
        return await self._read_header()

    async def _asked(self, question: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """What the engine's process answers, which the event loop does not wait for."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(None, question, self._run_dir)
        except unix_socket.WireError as error:
            raise ControlError(f"vLLM's engine process did not say what state its weights are in: {error}") from error

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)  # an event loop holds its tasks weakly
        task.add_done_callback(self._background.discard)


def _said(error: Exception) -> str:
    """`error` in words: our own as it is, others with their type, since some have no message."""
    return str(error) if isinstance(error, TandemError) else f"{type(error).__name__}: {error}"
