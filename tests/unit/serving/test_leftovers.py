"""What a killed server leaves behind is ended by the next one, and nothing else is."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.serving import launch
from worker.serving.leftovers import end_leftovers, find_leftovers
from worker.testing.child_process import die_with_parent

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


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    running = Family(tmp_path)
    yield running
    running.close()


def test_engine_and_worker_of_a_killed_server_are_ended(family: Family, tmp_path: Path) -> None:
    family.kill_api()
    assert find_leftovers(tmp_path) == family.others
    said: list[str] = []
    end_leftovers(tmp_path, said.append)
    assert family.alive() == [] and find_leftovers(tmp_path) == []
    assert said == [f"ending what a killed server left in {tmp_path}: processes {family.others[0]}, {family.others[1]}"]
    end_leftovers(tmp_path, said.append)
    assert len(said) == 1, "nothing left, nothing said"


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    family = Family(tmp_path, "stubborn")
    try:
        family.kill_api()
        end_leftovers(tmp_path, lambda note: None, grace=0.1)
        assert family.alive() == []
    finally:
        family.close()


def test_a_living_server_is_left_alone(family: Family, tmp_path: Path) -> None:
    """Its lock may have been lost: somebody emptied the folder."""
    assert find_leftovers(tmp_path) == []
    end_leftovers(tmp_path, pytest.fail)
    assert family.alive() == family.others


@pytest.mark.parametrize("other", ["another folder", "no server of ours"])
def test_other_processes_are_left_alone(tmp_path: Path, other: str) -> None:
    family = Family(tmp_path / "other") if other == "another folder" else Family(tmp_path, user="0")
    try:
        family.kill_api()
        assert find_leftovers(tmp_path) == []
        end_leftovers(tmp_path, pytest.fail)
        assert family.alive() == family.others
    finally:
        family.close()


def test_taking_the_lock_ends_leftovers(family: Family, tmp_path: Path) -> None:
    family.kill_api()
    code = "import sys; from pathlib import Path; from worker.serving.launch import lock; lock(Path(sys.argv[1]), 'm')"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "ending what a killed server left" in result.stdout and family.alive() == []


def test_vllms_processes_keep_the_variables_that_they_are_recognised_by() -> None:
    """They rename themselves, and the library for it would write the new name over their environment."""
    assert launch.build_environment({}, Path("/run/x"), [], on_cpu=True)["SPT_NOENV"] == "1"
