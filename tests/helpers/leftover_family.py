"""The processes of a server that was killed, as `tandem serve` leaves them: they do nothing but live."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from worker.utils.child_process import die_with_parent

API = "vllm.entrypoints.openai.api_server"
PARENT = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[1] == "stubborn" else signal.SIG_DFL)
generations = int(sys.argv[2])
if generations:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[3], sys.argv[1], str(generations - 1), sys.argv[3]])
print(os.getpid(), flush=True)
sys.stdin.read() if generations == 2 else signal.pause()
"""
"""A process with a child with a child, as API process, engine and worker; each prints its number."""


class Family:
    """The three processes of a server of `run_dir`, that do nothing."""

    def __init__(self, run_dir: Path, manner: str = "meek", user: str = "1") -> None:
        environment = os.environ | {"TANDEM_SERVE": user, "TANDEM_RUN_DIR": str(run_dir)}
        command = [sys.executable, "-c", PARENT, manner, "2", PARENT, "-m", API]
        self.api = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        assert self.api.stdout is not None
        pids = {int(self.api.stdout.readline()) for _ in range(3)}
        self.others = sorted(pids - {self.api.pid})

    def kill_api(self) -> None:
        self.api.kill()
        self.api.wait()

    def alive(self) -> list[int]:
        return [pid for pid in self.others if os.path.exists(f"/proc/{pid}") and _state(pid) != "Z"]

    def close(self) -> None:
        try:
            os.killpg(self.api.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.api.communicate()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
