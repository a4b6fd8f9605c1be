"""How Tandem's processes on one machine talk: a run directory, and msgpack messages on same-uid Unix sockets.

A message is a 4-byte big-endian length and one msgpack map. Nothing else travels: no pickle, no file descriptors, and
no message longer than `MAX_MESSAGE`. Both ends check with SO_PEERCRED that the other runs under our own uid, besides
the permissions of the directory (0700) and the socket (0600).

Must not know: torch, Redis.
"""

import asyncio
import os
import socket
import stat
import struct
import time
from pathlib import Path
from typing import Any

from worker.utils import messages
from worker.utils.messages import MAX_MESSAGE, WireError, unpack

__all__ = ["MAX_MESSAGE", "WireError", "unpack"]

_LENGTH = struct.Struct(">I")
_PEERCRED = struct.Struct("3i")  # pid, uid, gid, as Linux' struct ucred
_MAX_UNIX_PATH = 107
WAITING = 128
"""Connections that wait to be accepted by a process that is busy: the next one has to try again."""
_TRY_AGAIN = 0.05


def default_run_dir() -> Path:
    """Where the sockets of a server lie: $TANDEM_RUN_DIR, else a folder of our own below the runtime directory."""
    if configured := os.environ.get("TANDEM_RUN_DIR"):
        return Path(configured)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "tandem" if runtime else Path(f"/tmp/tandem-{os.getuid()}")


def prepare_run_dir(run_dir: Path) -> Path:
    """Create `run_dir` for us alone, or refuse one that others could have put there."""
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = run_dir.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise WireError(f"run directory {run_dir} is not a folder of uid {os.getuid()}: name another with --run-dir")
    if info.st_mode & 0o077:
        run_dir.chmod(0o700)
    return run_dir


def socket_path(run_dir: Path, name: str) -> str:
    """The path of socket `name`; refuses one too long for a Unix socket (107 bytes)."""
    path = str(run_dir / name)
    if len(os.fsencode(path)) > _MAX_UNIX_PATH:
        raise WireError(f"socket path {path} is longer than {_MAX_UNIX_PATH} bytes: use a shorter --run-dir")
    return path


def pack(message: dict[str, Any]) -> bytes:
    """The bytes of one message on the wire; `WireError` for too many."""
    body = messages.pack(message)
    return _LENGTH.pack(len(body)) + body


def check_length(header: bytes) -> int:
    """The announced length of the body; `WireError` when it is over `MAX_MESSAGE`."""
    (length,) = _LENGTH.unpack(header)
    if length > MAX_MESSAGE:
        raise WireError(f"a message of {length} bytes is announced, over the limit of {MAX_MESSAGE}")
    return length


def peer(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end of a connected Unix socket."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, uid, _gid = _PEERCRED.unpack(raw)
    return pid, uid


def check_peer(sock: socket.socket) -> int:
    """The peer's pid; `WireError` when it runs under another uid."""
    pid, uid = peer(sock)
    if uid != os.getuid():
        raise WireError(f"process {pid} runs under uid {uid}, not ours ({os.getuid()}): refused")
    return pid


def bind(path: str) -> socket.socket:
    """A listening socket at `path`, for our uid only; a stale file of a dead server is replaced, a live one refused."""
    if os.path.exists(path):
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            probe.settimeout(2.0)
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            if os.path.exists(path):
                os.unlink(path)
        except BlockingIOError:
            raise WireError(
                f"{path} is in use by a process that accepts nobody: end it, or choose another --run-dir"
            ) from None
        else:
            raise WireError(f"{path} is in use by process {peer(probe)[0]}: stop it, or choose another --run-dir")
        finally:
            probe.close()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        server.bind(path)
    finally:
        os.umask(mask)
    server.listen(WAITING)
    return server


def connect(path: str, timeout: float = 10.0) -> socket.socket:
    """A connection to `path`; `timeout` in seconds holds for every later call on it as well."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        _connect(sock, path, time.monotonic() + timeout)
        check_peer(sock)
    except OSError as error:
        sock.close()
        raise WireError(
            f"no server listens at {path} ({error.strerror or error}): start one with `tandem serve`"
        ) from None
    except WireError:
        sock.close()
        raise
    return sock


def _connect(sock: socket.socket, path: str, deadline: float) -> None:
    """Where `WAITING` connections wait already, Linux refuses at once (EAGAIN), whatever the socket's timeout is."""
    while True:
        try:
            return sock.connect(path)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise WireError(f"the server at {path} accepts nobody: it hangs, or is stopped; see its log") from None
            time.sleep(_TRY_AGAIN)


def send(sock: socket.socket, message: dict[str, Any]) -> None:
    """Write one message; `WireError` when the other side has gone."""
    try:
        sock.sendall(pack(message))
    except OSError as error:
        raise WireError(f"the connection was lost while sending ({error})") from None


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """Read one message, or None when the other side closed between messages."""
    header = _receive_exactly(sock, _LENGTH.size, at_start=True)
    if header is None:
        return None
    body = _receive_exactly(sock, check_length(header), at_start=False)
    assert body is not None
    return unpack(body)


def _receive_exactly(sock: socket.socket, size: int, at_start: bool) -> bytes | None:
    chunks = bytearray()
    while len(chunks) < size:
        try:
            chunk = sock.recv(min(size - len(chunks), 1 << 20))
        except TimeoutError:
            raise WireError(f"no answer within {sock.gettimeout()} s") from None
        except OSError as error:
            raise WireError(f"the connection was lost ({error})") from None
        if not chunk:
            if at_start and not chunks:
                return None
            raise WireError("the connection ended in the middle of a message")
        chunks += chunk
    return bytes(chunks)


async def receive_async(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """`receive` for asyncio streams."""
    try:
        header = await reader.readexactly(_LENGTH.size)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise WireError("the connection ended in the middle of a message") from None
        return None
    except ConnectionError:
        return None
    try:
        return unpack(await reader.readexactly(check_length(header)))
    except (asyncio.IncompleteReadError, ConnectionError):
        raise WireError("the connection ended in the middle of a message") from None
