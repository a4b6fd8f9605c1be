"""The run directory, where the sockets lie: ours alone, and its path short enough for a socket.

Must not know: torch, vLLM, Redis. Invariant: only looks.
"""

import os
import stat
from pathlib import Path

from worker.operations.doctor.finding import Fact, Finding, fault, ok, unchecked
from worker.serving.protocol import SOCKET as CONTROL
from worker.shared_weights.weights_client import SOCKET as WEIGHTS
from worker.utils.unix_socket import WireError, socket_path

NAME = "run directory"


def check_sockets(run_dir: Path) -> Finding:
    """Owner, mode and length of `run_dir`."""
    try:
        for socket in (CONTROL, WEIGHTS):
            socket_path(run_dir, socket)
    except WireError as error:
        return fault(NAME, Fact.SOCKETS_LONG, said=str(error))
    try:
        info = run_dir.lstat()
    except FileNotFoundError:
        return unchecked(NAME, Fact.SOCKETS_NONE, path=str(run_dir))
    except OSError:
        return fault(NAME, Fact.SOCKETS_FOREIGN, path=str(run_dir), owner=None, uid=os.getuid())
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        return fault(NAME, Fact.SOCKETS_FOREIGN, path=str(run_dir), owner=info.st_uid, uid=os.getuid())
    if info.st_mode & 0o077:
        return fault(NAME, Fact.SOCKETS_OPEN, path=str(run_dir), mode=f"{info.st_mode & 0o777:04o}")
    return ok(NAME, Fact.SOCKETS, path=str(run_dir))
