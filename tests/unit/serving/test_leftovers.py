"""What a killed server leaves behind is ended by the next one, and nothing else is."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from leftover_family import Family

from worker.serving import launch
from worker.serving.leftovers import end_leftovers, find_leftovers


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
