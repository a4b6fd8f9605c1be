"""Ends what a killed server left behind: vLLM's engine and worker outlive an API process that died of SIGKILL.

Only called by the holder of the run directory's lock, so by nobody while a server runs there. A process is a leftover
when all of this holds: the same user, started by `tandem serve` for the same run directory (both read from its
environment), and none of its ancestors is an API process. A process that cannot be judged is left alone.

Must not know: vLLM, torch. Linux only (/proc, pidfd).
"""

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from worker.serving.protocol import SERVE_ENV
from worker.serving.vllm_flags import LaunchError

GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""
GONE_SECONDS = 120.0
"""After SIGKILL: the kernel gives a GPU's memory back before the process is gone."""
API_MODULES = (b"vllm.entrypoints.cli.main", b"vllm.entrypoints.openai.api_server")
"""What `tandem serve` becomes."""


def end_leftovers(run_dir: Path, tell: Callable[[str], None], grace: float = GRACE_SECONDS) -> None:
    """End the processes that a killed server of `run_dir` left; `tell` gets one sentence when there were any.

    LaunchError when one of them does not end.
    """
    found = find_leftovers(run_dir)
    if not found:
        return
    pids = ", ".join(map(str, found))
    tell(f"ending what a killed server left in {run_dir}: process{'es' if len(found) > 1 else ''} {pids}")
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, GONE_SECONDS)):
        deadline = time.monotonic() + seconds
        handles = {pid: _open(pid) for pid in found}
        try:
            # Judged again under its handle: from here on the number cannot become another process's.
            living = {pid: fd for pid, fd in handles.items() if fd is not None and _ours(pid, run_dir)}
            for fd in living.values():
                _signal(fd, number)
            found = [pid for pid, fd in living.items() if not _ended(fd, deadline)]
        finally:
            for handle in handles.values():
                if handle is not None:
                    os.close(handle)
        if not found:
            return
    raise LaunchError(
        f"process {found[0]}, left over from a killed server, does not end, not even by SIGKILL: see what it waits for"
        f" (/proc/{found[0]}/stack), or choose another --run-dir"
    )


def find_leftovers(run_dir: Path) -> list[int]:
    """The processes that a killed server of `run_dir` left, by number."""
    return sorted(pid for pid in _processes() if _ours(pid, run_dir) and not _has_api_process(pid, run_dir))


def is_ending(pid: int) -> bool:
    """Whether `pid` has let go of its memory, and with it of its command line: what it holds else goes next."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _ours(pid: int, run_dir: Path) -> bool:
    """Whether `pid` runs under our user and was started by `tandem serve` for `run_dir`."""
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.getuid():
            return False
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or not ours to look into
        return False
    wanted = (f"{SERVE_ENV}=1".encode(), b"TANDEM_RUN_DIR=" + os.fsencode(run_dir))
    return all(entry in environment for entry in wanted)


def _has_api_process(pid: int, run_dir: Path) -> bool:
    """Whether `pid`, or the process that it descends from, is an API process: then its server lives, or is ending."""
    while pid > 1 and _ours(pid, run_dir):
        if any(module in _command_line(pid) for module in API_MODULES):
            return True
        pid = _parent(pid)
    return False


def _command_line(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _parent(pid: int) -> int:
    try:
        # After the name, which may hold anything but ends at the last bracket: state, parent, ...
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _open(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _signal(descriptor: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        pass


def _ended(descriptor: int, deadline: float) -> bool:
    """Whether the process ends before `deadline` (time.monotonic)."""
    ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
    return bool(ready)
