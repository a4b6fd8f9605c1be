"""Asks a server's `weights.sock`; for the API process and the status display, so without torch.

Must not know: torch, vLLM.
"""

import contextlib
from pathlib import Path
from typing import Any

from worker.utils import unix_socket

SOCKET = "weights.sock"
"""Name of the socket in the run directory."""
ANSWER_SECONDS = 60.0
"""A thread of the engine's process answers in milliseconds; a machine at its limit has let one wait for ten seconds.
People who look are not to wait as long: status and doctor have bounds of their own."""


def rank_dir(run_dir: Path, rank: int) -> Path:
    """Where rank `rank` of a server with --tensor-parallel-size has its `weights.sock`; rank 0's is the run directory's
    own."""
    return Path(run_dir) if rank == 0 else Path(run_dir) / f"rank-{rank}"


def ask(run_dir: Path, op: str, timeout: float = ANSWER_SECONDS) -> tuple[dict[str, Any], int]:
    """The server's answer to `op`, and its worker process's pid. `WireError` if none answers, or with its own error."""
    with unix_socket.connect(unix_socket.socket_path(Path(run_dir), SOCKET), timeout) as sock:
        pid, _ = unix_socket.peer(sock)
        unix_socket.send(sock, {"op": op})
        answer = unix_socket.receive(sock)
    if answer is None:
        raise unix_socket.WireError("the server closed the connection without an answer: it is going down")
    if "error" in answer:
        raise unix_socket.WireError(f"the server says: {answer['error']}")
    return answer, pid


def read_header(run_dir: Path, timeout: float = ANSWER_SECONDS) -> dict[str, Any]:
    """{"lineage": 32 hex digits, "version": int, "state": "CLEAN" | "APPLYING", "fence": int}, as it lies beside the
    weights now."""
    return ask(run_dir, "header", timeout)[0]


def rank_headers(run_dir: Path, timeout: float = ANSWER_SECONDS) -> list[dict[str, Any]]:
    """As `read_header`, of every rank that answers, from rank 0 on: one where the weights are in one process."""
    found = [read_header(run_dir, timeout)]
    with contextlib.suppress(unix_socket.WireError):  # no such rank, or what an earlier server left
        while True:
            found.append(read_header(rank_dir(run_dir, len(found)), timeout))
    return found


def revoke(run_dir: Path, timeout: float = ANSWER_SECONDS) -> dict[str, Any]:
    """Take back every lease on the weights (`Header.revoke`); the header as it is then. For the server alone."""
    return ask(run_dir, "revoke", timeout)[0]
