"""The trainer's side of the control socket: pause, hogwild, resume, and what state the server is in.

Every wait has a bound. Must not know: vLLM, torch. Invariant: after an error on the wire the connection is closed,
which gives the pause back: the server then judges by the header what was left.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from producer.errors import TandemError
from worker.serving.protocol import (
    ANSWER_SECONDS,
    CONNECT_SECONDS,
    LEAVING_SECONDS,
    PLANNED_SECONDS,
    SOCKET,
    lease_seconds,
)
from worker.shared_weights.weights_client import ANSWER_SECONDS as WEIGHTS_SECONDS
from worker.utils import unix_socket

LOOK_SECONDS = 0.1
"""Between two looks whether another trainer has gone."""


class ServerError(TandemError):
    """The server refused; the message is its own."""


class ServerTakenError(ServerError):
    """It has another trainer."""


class ServerGoneError(TandemError):
    """The server ended, or does not answer."""


class ServerControl:
    """One trainer's connection to the server of `run_dir`. Not for use from several threads at once."""

    def __init__(self, run_dir: Path | str, name: str = "trainer") -> None:
        self._run_dir = Path(run_dir)
        self._name = name
        self._socket: Any = None
        self.fence = -1
        """What `Header.begin` needs: given with each `pause` and `begin_hogwild`; -1 before the first."""
        self.trainer_bytes = 0
        """After `connect`: how much of the device the server was started to leave to its trainer; 0: nothing said."""
        self._longest = PLANNED_SECONDS
        self._taken: float | None = None
        self._still: tuple[float, int] | None = None
        """Of the pause that is held: since when the server stands still, and how many requests do."""
        self.paused_s = 0.0
        """Seconds in all in which the server stood still for this trainer."""
        self.stood_s = 0.0
        """Those in which requests stood still with it."""
        self.rendering: dict[str, Any] = {}
        """After `connect`: {"chat_template": text or None, "template_kwargs": map}, as the server was started."""

    def connect(self, leaving: float = LEAVING_SECONDS) -> dict[str, Any]:
        """Become the server's one trainer; its state (see `state`). Fills `rendering`.

        leaving: seconds to wait for another trainer to go: the server may not have noticed yet that it ended.
        WireError when no server listens or it is another user's; ServerTakenError when it has a trainer still.
        """
        self._socket = unix_socket.connect(unix_socket.socket_path(self._run_dir, SOCKET), CONNECT_SECONDS)
        try:
            answer = self._hello(leaving)
            if not {"running", "lost_prefix_tokens"} <= answer.keys():
                raise ServerError("the server was started by an older Tandem: start it again (tandem serve ...)")
            self.rendering = answer.pop("rendering")
            self.trainer_bytes = int(answer.pop("trainer_bytes", 0))
            return answer
        except TandemError:
            self.close()
            raise

    def _hello(self, leaving: float) -> dict[str, Any]:
        until = None  # counted from the first answer, which may wait for what the other one asked for last: a pause
        while True:
            try:
                return self._ask({"op": "hello", "name": self._name})
            except ServerTakenError as error:
                until = until or time.monotonic() + leaving
                if time.monotonic() >= until:
                    raise ServerTakenError(f"{error} (it was given {leaving:g} s to go)") from None
                time.sleep(LOOK_SECONDS)

    def pause(self, planned: float | None = None, at_least: float = 0.0) -> float:
        """Freeze the server; the seconds that took. Held until `resume`, or until this connection or process ends.

        planned: seconds until `resume` or `renew`; by default the longest that it has taken so far, or `at_least`, what
        is known of this one. A trainer that is silent for several times as long (`lease_seconds`) is taken to hang: the
        server takes the weights back, and `Header.begin` with this pause's `fence` is refused.
        From its return on no kernel reads the weights, and requests that come later find nothing that was computed with
        them. A server that recomputes running requests first ends what the last version gave it to recompute;
        ServerError when that takes too long.
        """
        answer = self._take("pause", planned, at_least)
        self._still = time.monotonic(), int(answer["running"])
        return float(answer["seconds"])

    def begin_hogwild(self, planned: float | None = None, at_least: float = 0.0) -> None:
        """Tell the server that it will be written to while it serves, from now until a `pause` and a `resume`.

        planned, at_least: as in `pause`.
        Should this connection end meanwhile, the server judges by the header as in a pause: torn weights answer nobody.
        ServerError unless it is serving whole weights.
        """
        self._take("begin_hogwild", planned, at_least)

    def _take(self, op: str, planned: float | None, at_least: float) -> dict[str, Any]:
        """Ask for a lease; the answer."""
        seconds = lease_seconds(max(self._longest, at_least) if planned is None else planned)
        answer = self._ask({"op": op, "seconds": seconds})
        self.fence = int(answer["fence"])
        self._taken = time.monotonic() if planned is None else None
        return answer

    def renew(self, planned: float = PLANNED_SECONDS) -> None:
        """Say that the write goes on; planned: as in `pause`. ServerError when the server took the weights back."""
        self._ask({"op": "renew", "seconds": lease_seconds(planned)})

    def resume(self, version: int, rebuilt: bool = False) -> None:
        """Let the server go on under `version`. ServerError, and still paused, unless the header is CLEAN and at it.

        rebuilt: the weights were made again, or rolled back, so that `version` does not say how near they are to the
        last.
        """
        self._ask({"op": "resume", "version": version} | ({"rebuilt": True} if rebuilt else {}))
        if self._still is not None:
            (since, running), self._still = self._still, None
            seconds = time.monotonic() - since
            self.paused_s += seconds
            self.stood_s += seconds if running else 0.0
        if self._taken is not None:
            self._longest = max(self._longest, time.monotonic() - self._taken)

    def score(self, ids: Sequence[int]) -> list[float]:
        """The engine's own log-probability, in nats, of each of `ids` but the first: 2 to MAX_ROW token ids. It is
        computed as any request is, beside those that run. ServerError when the server cannot, or not in time."""
        return [float(one) for one in self._ask({"op": "score", "ids": list(ids)})["logprobs"]]

    def state(self) -> dict[str, Any]:
        """{"version", "lineage", "state": serving|paused|torn, "written"? (hogwild: the version being written),
        "reason"?, "trainer": {"name", "pid", "since"} | None,
        "in_flight": requests that came in whole and are not answered yet, "running": those inside vLLM's engine,
        "recomputed_s": seconds since the server's start in which requests that an update threw back were being computed
        again (--running recompute), "lost_prefix_tokens": tokens of prompts since then that would have been read from
        the prefix cache, had no update made them too old (`serving.vllm.lost_prefixes`)}"""
        return self._ask({"op": "state"})

    def close(self) -> None:
        """End the connection, and with it the pause if it is held. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._socket is None:
            raise ServerGoneError(f"not connected to the server of {self._run_dir}")
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            unix_socket.send(self._socket, request)
            answer = unix_socket.receive(self._socket)
        except unix_socket.WireError as error:
            self.close()
            raise ServerGoneError(f"the server of {self._run_dir} is gone or stuck ({error}): see its log") from None
        if answer is None:
            self.close()
            raise ServerGoneError(f"the server of {self._run_dir} ended the connection: it is down, start it again")
        if "error" in answer:
            raise (ServerTakenError if answer.get("taken") else ServerError)(str(answer["error"]))
        return answer

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def server_state(run_dir: Path | str, timeout: float = WEIGHTS_SECONDS) -> dict[str, Any]:
    """The state of the server of `run_dir`, as `ServerControl.state`, asked by somebody who is not the trainer.
    timeout: seconds."""
    return _ask_once(run_dir, "state", timeout)


def server_rendering(run_dir: Path | str) -> dict[str, Any]:
    """How the server of `run_dir` turns messages into prompts, as `ServerControl.rendering`, asked by somebody who is
    not the trainer. ServerGoneError from an older Tandem's server, too."""
    rendering: dict[str, Any] = _ask_once(run_dir, "rendering", WEIGHTS_SECONDS)["rendering"]
    return rendering


def _ask_once(run_dir: Path | str, op: str, timeout: float) -> dict[str, Any]:
    with unix_socket.connect(unix_socket.socket_path(Path(run_dir), SOCKET), timeout) as sock:
        unix_socket.send(sock, {"op": op})
        answer = unix_socket.receive(sock)
    if answer is None or "error" in answer:
        raise ServerGoneError(f"the server of {run_dir} did not say its {op}: {answer}")
    return answer
