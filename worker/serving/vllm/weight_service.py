"""Answers on `weights.sock`, from daemon threads in vLLM's worker process, what a trainer or the API process asks.

One request a message: {"op": "describe"} -> everything needed to attach; {"op": "header"} -> lineage, version, state,
fence; {"op": "revoke"} -> the same, with the fence moved: every lease given so far is taken back.
It answers while the engine is busy and whether or not a trainer lives: it takes no lock of vLLM's, does no work of its
own beyond one 64-byte copy, and runs on any CPU that the process may use, also where vLLM has bound itself to some.

Must not know: vLLM.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from producer.errors import TandemError
from worker.shared_weights.weights_client import SOCKET
from worker.utils import unix_socket

logger = logging.getLogger(__name__)

_IDLE = 60.0
"""Seconds after which a silent connection is closed, so that none holds its thread for ever."""

REST = 0.5
"""Seconds after which a process that has no descriptor left is asked again for one."""

Answer = Callable[[], dict[str, Any]]


class WeightService:
    """Serves `answers` (op -> function giving a plain map) until `close`."""

    def __init__(self, run_dir: Path, answers: dict[str, Answer]) -> None:
        self._answers = answers
        self._path = unix_socket.socket_path(unix_socket.prepare_run_dir(run_dir), SOCKET)
        self._listener = unix_socket.bind(self._path)
        self._pid = os.getpid()
        self._closed = False
        threading.Thread(target=self._accept, name="tandem-weights", daemon=True).start()

    def close(self) -> None:
        """Stop answering and remove the socket. Idempotent; does nothing in a forked child."""
        if os.getpid() != self._pid or self._closed:
            return
        self._closed = True
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() alone would not
        self._listener.close()
        Path(self._path).unlink(missing_ok=True)

    def _accept(self) -> None:
        on_any_cpu()  # so do the threads that it starts
        lacking = False
        while True:
            try:
                self._begin(self._listener.accept()[0])
                lacking = False
            except (OSError, RuntimeError) as error:
                if self._closed:
                    return
                # No descriptor or no thread is left: it passes, and without an answer no version could be made again.
                if not lacking:
                    logger.warning("weights.sock: connections are not accepted (%s) until this has passed", error)
                lacking = True
                time.sleep(REST)

    def _begin(self, connection: socket.socket) -> None:
        try:
            threading.Thread(target=self._serve, args=(connection,), name="tandem-weights", daemon=True).start()
        except RuntimeError:
            connection.close()  # who asked hears at once that nobody answers
            raise

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(_IDLE)
            try:
                unix_socket.check_peer(connection)
                while (request := unix_socket.receive(connection)) is not None:
                    unix_socket.send(connection, self._answer(request))
            except unix_socket.WireError as error:
                logger.warning("weights.sock: %s", error)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = self._answers.get(str(request.get("op")))
        if answer is None:
            return {"error": f"unknown op {request.get('op')!r}: this server knows {', '.join(sorted(self._answers))}"}
        try:
            return answer()
        except TandemError as error:
            return {"error": str(error)}
        except Exception as error:  # the asker must hear of it; the thread has nobody else to tell
            logger.exception("weights.sock: %s failed", request["op"])
            return {"error": f"the server failed to answer ({type(error).__name__}: {error})"}


def on_any_cpu() -> None:
    """Have the calling thread run wherever our parent process may.

    vLLM's CPU backend binds its worker process to the CPUs that compute, and threads that start later inherit that. On
    one of which others take their share, each answer waited for its turns: up to 8.6 s beside four busy loops; 0.2 s
    unbound.
    """
    with contextlib.suppress(OSError):  # the parent is gone, or is somebody else's: we stay where we are
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
