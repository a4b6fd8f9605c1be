"""The control socket in vLLM's API process: one trainer pauses and resumes the server here.

Messages are maps with "op": hello {name}, pause {seconds}, begin_hogwild {seconds}, renew {seconds}, resume
{version, rebuilt}, score {ids}, state, rendering; answers are maps with "error" if refused. What a pause means, and
what becomes of it when its trainer dies or hangs, is in `lease.py`.

Invariants: one trainer at a time; no message, however malformed, does more than cost its sender the connection.
"""

import asyncio
import atexit
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from producer.errors import TandemError
from worker.config.optimizers import optimizer_of
from worker.serving.cache_policy import CachePolicy
from worker.serving.memory_share import share_of_environment
from worker.serving.protocol import LONGEST_LEASE, MAX_ROW, SCORE_SECONDS, SERVING, SOCKET, ControlError, TakenError
from worker.serving.vllm.engine import Engine
from worker.serving.vllm.framing import peer_pid, receive, send
from worker.serving.vllm.lease import Leases
from worker.serving.vllm.server_state import ServerState
from worker.utils import unix_socket

logger = logging.getLogger("vllm.tandem")
"""Below vLLM's logger, so that our lines go where the server's go."""

MAX_CONNECTIONS = 32

Reply = dict[str, Any]
Score = Callable[[list[int]], Awaitable[list[float]]]
"""The engine's log-probability of every token of a row but the first, in nats."""


@dataclass(eq=False)
class Connection:
    """One client of the socket; `name` once it said hello as the trainer."""

    pid: int
    since: float
    name: str | None = None

    def __str__(self) -> str:
        at = time.strftime("%H:%M:%S", time.localtime(self.since))
        return f"trainer {self.name!r} (process {self.pid}, since {at})"


class Control:
    """Serves control.sock for `engine` (a vLLM EngineClient), on the event loop it is started on.

    freeze, policy, progress: as `Engine` takes them. score: the engine's; without it no trainer can prove what it
    trains.
    """

    def __init__(
        self,
        engine: Any,
        state: ServerState,
        run_dir: Path,
        rendering: dict[str, Any],
        freeze: Callable[[], Awaitable[None]],
        policy: CachePolicy = CachePolicy(),  # noqa: B008  (frozen)
        progress: Callable[[], dict[str, int]] = dict,
        score: Score | None = None,
    ) -> None:
        self._state = state
        self._run_dir = run_dir
        self._rendering = rendering
        self._leases = Leases(Engine(engine, freeze, policy, progress), state, run_dir)
        self._trainer: Connection | None = None
        self._connections = 0
        self._turn = self._leases.turn
        self._score_row = score
        self._ops: dict[str, Callable[[Connection, dict[str, Any]], Awaitable[Reply]]] = {
            "hello": self._hello,
            "pause": self._pause,
            "begin_hogwild": self._begin_hogwild,
            "renew": self._renew,
            "resume": self._resume,
        }

    async def start(self) -> str:
        """Bind the socket and answer from now on; the socket's path. WireError when another server has it."""
        path = unix_socket.socket_path(self._run_dir, SOCKET)
        # Kept: an event loop may close a server that nobody holds (uvloop does).
        self._server = await asyncio.start_unix_server(self._serve, sock=unix_socket.bind(path))
        self._leases.start()
        atexit.register(Path(path).unlink, missing_ok=True)
        return path

    # One connection

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        connection = None
        try:
            connection = Connection(peer_pid(writer), time.time())
            if self._connections > MAX_CONNECTIONS:
                raise unix_socket.WireError(f"more than {MAX_CONNECTIONS} connections")
            while (request := await receive(reader)) is not None:
                await send(writer, await self._answer(connection, request))
        except unix_socket.WireError as error:
            await send(writer, {"error": str(error)})
        except (ConnectionError, TimeoutError):
            pass  # the other side has gone, or does not read: the same to us
        finally:
            self._connections -= 1
            if connection is not None and connection is self._trainer:
                async with self._turn:
                    self._trainer = None
                    self._state.trainer(False)
                    logger.info("tandem: %s is gone", connection)
                    await self._leases.holder_gone(str(connection))
            writer.close()

    async def _answer(self, connection: Connection, request: dict[str, Any]) -> Reply:
        op = request.get("op")
        if op == "state":
            return self._plain()
        if op == "rendering":
            return {"rendering": self._rendering}
        if op == "score":  # may wait long behind requests, and changes nothing: others have their turns meanwhile
            return await self._answered(op, self._score(connection, request))
        if not isinstance(op, str) or op not in self._ops:
            return {"error": f"unknown op: this server knows {', '.join([*self._ops, 'score', 'state', 'rendering'])}"}
        async with self._turn:
            return await self._answered(op, self._ops[op](connection, request))

    async def _answered(self, op: str, work: Awaitable[Reply]) -> Reply:
        try:
            return await work
        except TakenError as error:
            return {"error": str(error), "taken": True}
        except TandemError as error:
            return {"error": str(error)}
        except Exception as error:
            logger.exception("tandem: %s failed", op)
            return {"error": f"the server could not {op} ({type(error).__name__}: {error})"}

    # Operations: each but score runs alone, and its errors go back to the trainer

    async def _hello(self, connection: Connection, request: dict[str, Any]) -> Reply:
        name = request.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= 100 or not name.isprintable():
            raise ControlError("hello: name must be 1 to 100 printable characters")
        if self._trainer is not None and self._trainer is not connection:
            raise TakenError(f"{self._trainer} is connected to this server already: {self._way_out()}")
        connection.name = name
        self._trainer = connection
        self._state.trainer(True)
        logger.info("tandem: %s connected", connection)
        share = share_of_environment(os.environ)
        return self._plain() | {"rendering": self._rendering, "trainer_bytes": share}

    def _way_out(self) -> str:
        """How to get rid of the trainer that is connected."""
        assert self._trainer is not None
        if self._leases.overdue:  # stopped or hung: it would not hear a plain SIGTERM
            return f"it hangs; end it with kill -9 {self._trainer.pid}"
        return "stop it first"

    async def _pause(self, connection: Connection, request: dict[str, Any]) -> Reply:
        self._check(connection)
        return await self._leases.pause(str(connection), _seconds(request))

    async def _begin_hogwild(self, connection: Connection, request: dict[str, Any]) -> Reply:
        self._check(connection)
        granted = await self._leases.begin_hogwild(str(connection), _seconds(request))
        return self._plain() | granted

    async def _renew(self, connection: Connection, request: dict[str, Any]) -> Reply:
        self._check(connection)
        self._leases.renew(_seconds(request))
        return self._plain()

    async def _resume(self, connection: Connection, request: dict[str, Any]) -> Reply:
        self._check(connection)
        version, rebuilt = request.get("version"), request.get("rebuilt", False)
        if type(version) is not int:
            raise ControlError("resume: version must be an integer")
        if type(rebuilt) is not bool:
            raise ControlError("resume: rebuilt must be true or false")
        await self._leases.resume(version, rebuilt)
        return self._plain()

    async def _score(self, connection: Connection, request: dict[str, Any]) -> Reply:
        """{"logprobs": of ids[1:], "version": of the weights}."""
        self._check(connection)
        ids = request.get("ids")
        if not isinstance(ids, list) or not 2 <= len(ids) <= MAX_ROW or any(type(i) is not int or i < 0 for i in ids):
            raise ControlError(f"score: ids must be 2 to {MAX_ROW} token ids")
        if self._score_row is None or self._state.condition != SERVING:
            raise ControlError("score: the server is not serving whole weights")
        try:
            found = await asyncio.wait_for(self._score_row(ids), SCORE_SECONDS)
        except TimeoutError:
            raise ControlError(
                f"score: a row of {len(ids)} tokens was not computed within {SCORE_SECONDS:g} s: too many requests wait"
                " for the server; start the trainer again when it is less busy"
            ) from None
        return {"logprobs": found, "version": self._state.version}

    def _check(self, connection: Connection) -> None:
        """Only the trainer, which may also mend torn weights, as long as there is an engine to serve them."""
        if connection is not self._trainer:
            raise ControlError("say hello first")
        if self._state.ended:
            raise ControlError(f"refused: {self._state.reason}")
        self._leases.check_not_lost()

    def _plain(self) -> Reply:
        holder = self._trainer
        trainer = {"name": holder.name, "pid": holder.pid, "since": holder.since} if holder else None
        inside = {"in_flight": self._state.in_flight} | self._leases.load()
        return self._state.plain() | {"trainer": trainer, "optimizer": optimizer_of(os.environ)} | inside


def _seconds(request: dict[str, Any]) -> float:
    """The length of the lease that `request` asks for."""
    seconds = request.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST_LEASE:
        raise ControlError(f"seconds must be a number above 0 and at most {LONGEST_LEASE:g}")
    return float(seconds)
