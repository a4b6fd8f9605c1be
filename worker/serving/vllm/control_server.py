"""The control socket in vLLM's API process: one trainer pauses and resumes the server here.

Messages are maps with "op": hello {name}, pause, begin_hogwild, resume {version}, state; answers are maps with "error"
if refused. A pause is a lease on the connection it was asked on: when that ends, the header beside the weights says
whether they are whole. CLEAN: the server takes the header's version and goes on. APPLYING: it is torn; every request is
answered with the reason, also those in flight, until a trainer has mended the weights: it pauses, writes them, resumes.
`begin_hogwild` is the same lease while requests run on what is being written. A pause and a resume end it.

Running requests keep their caches over an update, or are computed again (`CachePolicy`); requests that come later never
read prefixes of older weights than the policy allows (`PrefixEpochs`).

Must not know: tensors, transcripts, HTTP. Uses of vLLM's EngineClient are its public methods; what is private of it is
handed in.
Invariants: one trainer at a time; requests run only under a CLEAN header, unless its trainer asked for hogwild; no
message, however malformed, does more than cost its sender the connection.
"""

import asyncio
import atexit
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from producer.errors import TandemError
from worker.serving.cache_policy import CachePolicy
from worker.serving.protocol import ENGINE_SECONDS, HELD_BACK_SECONDS, PAUSED, SERVING, SOCKET, ControlError
from worker.serving.vllm.framing import peer_pid, receive, send
from worker.serving.vllm.recomputation import Recomputation
from worker.serving.vllm.server_state import ServerState
from worker.shared_weights.weights_client import read_header
from worker.utils import unix_socket

logger = logging.getLogger("vllm.tandem")
"""Below vLLM's logger, so that our lines go where the server's go."""

MAX_CONNECTIONS = 32

Reply = dict[str, Any]


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

    progress: the tokens that each request inside the engine has made, for `--running recompute`.
    """

    def __init__(
        self,
        engine: Any,
        state: ServerState,
        run_dir: Path,
        rendering: dict[str, Any],
        policy: CachePolicy = CachePolicy(),  # noqa: B008  (frozen)
        progress: Callable[[], dict[str, int]] = dict,
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._recomputation = Recomputation(progress)
        self._state = state
        self._run_dir = run_dir
        self._rendering = rendering
        self._trainer: Connection | None = None
        self._connections = 0
        self._turn = asyncio.Lock()  # one request, or one lost lease, at a time
        self._background: set[asyncio.Task[None]] = set()
        self._ops: dict[str, Callable[[Connection, dict[str, Any]], Awaitable[Reply]]] = {
            "hello": self._hello,
            "pause": self._pause,
            "begin_hogwild": self._begin_hogwild,
            "resume": self._resume,
        }

    async def start(self) -> str:
        """Bind the socket and answer from now on; the socket's path. WireError when another server has it."""
        path = unix_socket.socket_path(self._run_dir, SOCKET)
        # Kept: an event loop may close a server that nobody holds (uvloop does).
        self._server = await asyncio.start_unix_server(self._serve, sock=unix_socket.bind(path))
        self._spawn(self._watch())
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
                    await self._let_go(connection)
            writer.close()

    async def _answer(self, connection: Connection, request: dict[str, Any]) -> Reply:
        op = request.get("op")
        if op == "state":
            return self._plain()
        if not isinstance(op, str) or op not in self._ops:
            return {"error": f"unknown op: this server knows {', '.join([*self._ops, 'state'])}"}
        async with self._turn:
            try:
                return await self._ops[op](connection, request)
            except TandemError as error:
                return {"error": str(error)}
            except Exception as error:
                logger.exception("tandem: %s failed", op)
                return {"error": f"the server could not {op} ({type(error).__name__}: {error})"}

    # Operations: each runs alone, and its errors go back to the trainer

    async def _hello(self, connection: Connection, request: dict[str, Any]) -> Reply:
        name = request.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= 100 or not name.isprintable():
            raise ControlError("hello: name must be 1 to 100 printable characters")
        if self._trainer is not None and self._trainer is not connection:
            raise ControlError(f"{self._trainer} is connected to this server already: stop it first")
        connection.name = name
        self._trainer = connection
        logger.info("tandem: %s connected", connection)
        return self._plain() | {"rendering": self._rendering}

    async def _pause(self, connection: Connection, request: dict[str, Any]) -> Reply:
        self._check(connection)
        if self._state.condition == PAUSED or self._state.mending:
            raise ControlError("the server is paused already")
        started = time.perf_counter()
        if self._state.torn:  # requests go on being refused, and nothing of them may be left inside
            async with asyncio.timeout(ENGINE_SECONDS):
                while self._state.in_flight:
                    await asyncio.sleep(0.1)
            await self._pause_engine(recompute=True)
            self._state.mending = True
            return {"seconds": time.perf_counter() - started}
        if self._policy.recompute:
            await self._hold_back()
        self._state.pause()
        try:
            await self._pause_engine(self._policy.recompute)
        except Exception as error:
            await asyncio.wait_for(self._engine.resume_generation(), ENGINE_SECONDS)
            self._state.go_on()
            raise ControlError(f"vLLM did not pause ({type(error).__name__}: {error}); it goes on serving") from error
        return {"seconds": time.perf_counter() - started}

    async def _begin_hogwild(self, connection: Connection, request: dict[str, Any]) -> Reply:
        self._check(connection)
        if self._state.condition != SERVING or self._state.written:
            raise ControlError("begin_hogwild: the server is not serving whole weights")
        self._state.begin_hogwild()
        return self._plain()

    async def _resume(self, connection: Connection, request: dict[str, Any]) -> Reply:
        self._check(connection)
        version, rebuilt = request.get("version"), request.get("rebuilt", False)
        if type(version) is not int:
            raise ControlError("resume: version must be an integer")
        if type(rebuilt) is not bool:
            raise ControlError("resume: rebuilt must be true or false")
        if self._state.condition != PAUSED and not self._state.mending:
            raise ControlError("the server is not paused")
        header = await self._read_header()
        if (header["state"], header["version"]) != ("CLEAN", version):
            raise ControlError(
                f"resume with version {version} refused: the header beside the weights says "
                f"{header['state']}, version {header['version']}"
            )
        await self._go_on(header, rebuilt)
        return self._plain()

    def _check(self, connection: Connection) -> None:
        """Only the trainer, which may also mend torn weights, as long as there is an engine to serve them."""
        if connection is not self._trainer:
            raise ControlError("say hello first")
        if self._state.ended:
            raise ControlError(f"refused: {self._state.reason}")

    def _plain(self) -> Reply:
        holder = self._trainer
        trainer = {"name": holder.name, "pid": holder.pid, "since": holder.since} if holder else None
        return self._state.plain() | {"trainer": trainer, "in_flight": self._state.in_flight}

    # The end of a connection

    async def _let_go(self, connection: Connection) -> None:
        """The trainer is gone. If it had a lease, find out what it left, and go on or say why not."""
        self._trainer = None
        logger.info("tandem: %s is gone", connection)
        paused = self._state.condition == PAUSED or self._state.mending
        if self._state.ended or not (paused or self._state.written):
            return
        self._state.mending = False
        try:
            header = await self._read_header()
            if header["state"] == "CLEAN":
                if not paused:  # requests that come from now on must find nothing of what the write's time computed
                    self._state.pause()
                    await self._pause_engine(self._policy.recompute)
                await self._go_on(header, rebuilt=True)  # by an update, or by a rollback: nobody is left to say
                logger.warning("tandem: %s was lost in an update; serving version %d", connection, header["version"])
                return
            reason = (
                f"the weights are torn: {connection} ended while it wrote version {header['version'] + 1}; "
                "start `tandem worker` again: it restores them"
            )
        except Exception as error:  # nobody is left to hear it but the server's own clients
            reason = (
                f"{connection} ended in an update, and the server could not go on ({type(error).__name__}: {error}); "
                "restart it"
            )
        self._state.tear(reason)
        logger.error("tandem: %s", reason)
        self._spawn(self._end_requests())

    async def _end_requests(self) -> None:
        """Abort what is in vLLM, again until none is left: a request may be on its way into the engine."""
        while self._state.in_flight:
            try:
                await asyncio.wait_for(self._engine.pause_generation(mode="abort", clear_cache=False), ENGINE_SECONDS)
            except Exception:
                logger.exception("tandem: aborting requests failed")
            await asyncio.sleep(0.5)

    async def _watch(self) -> None:
        """Nobody may wait for the end of a pause once the engine is gone: vLLM's shutdown waits for requests."""
        while not self._engine.errored:
            await asyncio.sleep(1.0)
        self._state.ended = True
        self._state.tear("the server is shutting down: its engine has ended")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)  # an event loop holds its tasks weakly
        task.add_done_callback(self._background.discard)

    # The engine and the header

    async def _pause_engine(self, recompute: bool) -> None:
        """Freeze the running requests and idle the device. recompute: they lose what they have, as do all prefixes."""
        async with asyncio.timeout(ENGINE_SECONDS):
            await self._engine.pause_generation(mode="keep", clear_cache=recompute)
            if not await self._engine.is_paused():
                raise ControlError("it reports that it is running")
            # 0.26 ignores a failed reset inside pause; with nothing running, resetting again shows it.
            if recompute and await self._engine.reset_prefix_cache() is False:
                raise ControlError("its prefix cache could not be reset and holds states of the old weights")
            await self._engine.collective_rpc("tandem_synchronize")

    async def _hold_back(self) -> None:
        """Wait until the requests that the last version threw back have been computed again."""
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

    async def _go_on(self, header: dict[str, Any], rebuilt: bool) -> None:
        """Resume under the header's version, which whoever is answered from here on is told."""
        self._state.lineage = header["lineage"]
        self._state.take(header["version"], rebuilt)
        if self._policy.recompute:
            self._recomputation.begin()
        await asyncio.wait_for(self._engine.resume_generation(), ENGINE_SECONDS)
        self._state.resume(header["version"])

    async def _read_header(self) -> dict[str, Any]:
        return await asyncio.get_running_loop().run_in_executor(None, read_header, self._run_dir)
