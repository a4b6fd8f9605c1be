"""The server of a run directory as somebody sees it who is not its trainer: asked once, for all checks.

Must not know: torch, vLLM, Redis. Invariants: takes no lease and no lock; every wait has a bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from producer.errors import TandemError
from worker.serving.control_client import server_state
from worker.serving.leftovers import API_MODULES
from worker.serving.protocol import SOCKET
from worker.shared_weights.weights_client import ask, read_header
from worker.utils import unix_socket

SECONDS = 4.0
"""The longest that one answer may take."""
OURS = ("--weight-transfer-config", "--worker-extension-cls")
"""Flags that `tandem serve` adds, each with a value."""


@dataclass(frozen=True)
class ServerView:
    """state, header, described: as control.sock and weights.sock say; empty where nobody answers, and `reason` says
    why. flags, environment: of the API process; empty where they cannot be read."""

    reason: str = ""
    state: dict[str, Any] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> Path | None:
        """The model's directory, where the server says it."""
        return Path(self.described["model"]) if "model" in self.described else None

    @property
    def on_gpu(self) -> bool:
        return bool(self.described.get("memory", {}).get("kind") == "cuda")


def look_at_server(run_dir: Path) -> ServerView:
    """Ask the server of `run_dir`. What does not answer is left empty."""
    try:
        state, header = server_state(run_dir, SECONDS), read_header(run_dir, SECONDS)
        described, _ = ask(run_dir, "describe", SECONDS)
        with unix_socket.connect(unix_socket.socket_path(run_dir, SOCKET), SECONDS) as sock:
            pid, _ = unix_socket.peer(sock)
    except (TandemError, OSError) as error:
        return ServerView(reason=str(error))
    return ServerView("", state, header, described, flags_of(_entries(pid, "cmdline")), _environment(pid))


def flags_of(arguments: Sequence[str]) -> list[str]:
    """The flags that a user gave, of an API process's command line: without the model and what `tandem serve` added."""
    modules = [name.decode() for name in API_MODULES]
    start = next((at for at, argument in enumerate(arguments) if argument in modules), len(arguments))
    given = list(arguments[start + 1 :])
    while given and not given[0].startswith("-"):  # serve MODEL
        given.pop(0)
    for flag in OURS:
        if flag in given:
            at = given.index(flag)
            del given[at : at + 2]
    return given


def _environment(pid: int) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in _entries(pid, "environ")]
    return {name: value for name, _, value in pairs}


def _entries(pid: int, name: str) -> list[str]:
    """Of /proc/PID/NAME, which are separated by NUL; none where we may not look."""
    try:
        data = Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return []
    return [entry.decode(errors="replace") for entry in data.split(b"\0") if entry]
