"""`tandem doctor` names each of twelve planted faults in one line, with what to do, and finds none where all is well.

Real parts: Redis, `tandem worker`, its state directory, processes of a killed server, a full disk. The server is the
stand-in with its real sockets and header (a real one: test_end_to_end.py). Old Redis and wrong clock: a man in the
middle of a real Redis' connection. The device's memory is arithmetic alone (unit/operations/test_doctor_checks.py):
nothing here has a GPU.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from click.testing import CliRunner
from durable_parts import LEARNING, QUIET, Site
from leftover_family import Family
from patience import until
from redis_between import between, hours_ahead, old_redis

from producer.jobs import ACL
from worker.cli import doctor
from worker.consumer.worker_lock import WorkerLock
from worker.operations.doctor.redis_rights import WORKER_ACL
from worker.operations.doctor.state_checks import check_state

NOBODY = 65534


@pytest.fixture(scope="module")
def site(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Version 1 is live, and in the journal and a checkpoint."""
    running = Site(tmp_path_factory.mktemp("site"), tiny_model)
    running.send("first", 2)
    running.work()
    yield running
    running.close()


def examined(site: Site, *options: str, url: str | None = None, state: Path | None = None) -> dict[str, Any]:
    """What `tandem doctor --json` finds, check -> finding, and its exit code under "code"."""
    arguments = ["--redis", url or site.store.url, "--run-dir", str(site.run_dir), "--json"]
    result = CliRunner().invoke(doctor.command, [*arguments, "--state-dir", str(state or site.state), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert (site.store.url.partition("@")[0].rpartition(":")[2]) not in result.output, "the password"
    found = json.loads(result.output)
    by_name = {one["check"]: one for one in found["findings"]}
    assert len(by_name) == len(found["findings"]), "--only picks one check by its name"
    return by_name | {"code": result.exit_code}


def faults(found: dict[str, Any]) -> list[str]:
    """Those beside the worker that the site does not have between two tests."""
    bad = {name: one for name, one in found.items() if name != "code" and one["level"] == "fault"}
    return [name for name, one in bad.items() if one["fact"] != "worker_none"]


def lines(site: Site, *options: str) -> list[str]:
    """As a person sees them."""
    arguments = ["--redis", site.store.url, "--run-dir", str(site.run_dir), "--state-dir", str(site.state), *options]
    return CliRunner().invoke(doctor.command, arguments).output.splitlines()


@contextmanager
def told(site: Site, setting: str, value: str) -> Iterator[None]:
    before = site.redis.config_get(setting)[setting]
    site.redis.config_set(setting, value)
    yield
    site.redis.config_set(setting, before)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root reads everything: as a user that owns nothing, until the end."""
    if os.getuid() == 0:
        os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        if os.geteuid() == NOBODY:
            os.setresuid(0, 0, 0)


def test_a_healthy_site_has_no_fault(site: Site) -> None:
    worker = site.start("worker", "--name", "the-worker", *LEARNING, *QUIET)
    until(lambda: "worker ready" in worker.said() or not worker.alive(), "the worker is ready")
    found = examined(site)
    worker.kill()
    assert faults(found) == [] and found["code"] == 0
    assert found["worker"]["what"].startswith("'the-worker'") and found["worker"]["level"] == "ok"
    assert {name for name, one in found.items() if name != "code" and one["level"] == "not checked"} <= {
        "GPU memory",
        "fla",
    }
    dead = examined(site)
    assert faults(dead) == ["worker"] and dead["code"] == 1 and "died" in dead["worker"]["what"]
    site.redis.delete("weights:worker")


def test_one_check_alone_decides_the_exit_code(site: Site) -> None:
    """As a container's health check asks."""
    with told(site, "appendonly", "no"):
        assert examined(site, "--only", "persistence") == {"persistence": ANY, "code": 0}, "a warning is no fault"
    alone = examined(site, "--only", "worker")
    assert alone == {"worker": ANY, "code": 1} and "start `tandem worker --run-dir" in alone["worker"]["mend"]
    wrong = CliRunner().invoke(doctor.command, ["--redis", site.store.url, "--only", "nothing"])
    assert wrong.exit_code == 2 and "no check is called nothing\n" in wrong.output
    away = CliRunner().invoke(doctor.command, ["--redis", "redis://127.0.0.1:1/0", "--only", "clock"])
    assert away.exit_code == 2 and "not made while it does not answer" in away.output


def test_it_shows_one_line_a_check(site: Site) -> None:
    shown = lines(site)
    assert len(shown) == len(set(shown)) >= 20
    assert all(re.match(r"(ok|warning|fault|not checked) +\S", line) for line in shown)


def test_an_evicting_redis(site: Site) -> None:
    with told(site, "maxmemory-policy", "allkeys-lru"):
        found = examined(site)
        assert faults(found) == ["eviction"]
        assert "allkeys-lru" in found["eviction"]["what"] and "noeviction" in found["eviction"]["mend"]
        assert any(line.startswith("fault") and line.endswith("and in redis.conf") for line in lines(site))


def test_a_key_of_another_type(site: Site) -> None:
    """Another program's, under a name of ours: nothing else is said to be wrong with Redis."""
    site.redis.rename("weights:state", "aside")
    site.redis.set("weights:state", "mine")
    try:
        found = examined(site)
    finally:
        site.redis.rename("aside", "weights:state")
    assert faults(found) == ["keys"] and "weights:state is a string, and a hash is kept" in found["keys"]["what"]
    assert "DEL weights:state" in found["keys"]["mend"]
    assert "rights" not in found["clock"]["what"] + found["clock"]["mend"], "nobody lacks a right"
    assert examined(site)["keys"]["level"] == "ok"


def test_a_checkpoint_whose_files_are_gone(site: Site) -> None:
    assert examined(site)["checkpoints"]["values"] == {"count": 1}
    (checkpoint,) = (path for path in (site.state / "checkpoints").iterdir() if path.name.isdigit())
    for path in (checkpoint / "model.safetensors", checkpoint / "tandem" / "meta.msgpack"):
        aside = path.rename(site.state / "aside")
        try:
            found = examined(site)
        finally:
            aside.rename(path)
        assert faults(found) == ["checkpoints"] and found["checkpoints"]["values"]["path"] == str(checkpoint)
        assert found["checkpoints"]["what"].endswith(f"1 of its files: {path.relative_to(checkpoint)}")
        assert "delete the folder" in found["checkpoints"]["mend"]


def test_redis_that_keeps_nothing(site: Site) -> None:
    with told(site, "appendonly", "no"):
        found = examined(site)
        assert found["persistence"]["level"] == "warning" and "appendonly yes" in found["persistence"]["mend"]


def test_no_space(site: Site, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        found = examined(site, state=disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert faults(found) == ["disk"]
    assert "no space" in found["disk"]["what"] and "--state-dir" in found["disk"]["mend"]
    assert found["disk"]["values"]["checkpoint"] > found["disk"]["values"]["free"] > 0


def test_a_wrong_transformers(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "transformers-4.57.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = examined(site)
    assert faults(found) == ["transformers"]
    assert "4.57.0" in found["transformers"]["what"] and "pip install" in found["transformers"]["mend"]


def test_a_left_over_engine(site: Site) -> None:
    family = Family(site.run_dir)
    try:
        assert examined(site)["leftovers"]["level"] == "ok", "a living server's engine is none"
        family.kill_api()
        found = examined(site)
        assert faults(found) == ["leftovers"] and found["leftovers"]["values"]["pids"] == family.others
        assert "tandem serve" in found["leftovers"]["mend"] and family.alive() == family.others
    finally:
        family.close()


def test_another_worker(site: Site) -> None:
    """One that holds the queue, and trains another server."""
    with WorkerLock(site.redis, "the-other"):
        found = examined(site)
    assert faults(found) == ["worker"]
    assert "another worker, 'the-other'" in found["worker"]["what"] and "stop that worker" in found["worker"]["mend"]


def test_an_unreadable_state_directory(site: Site) -> None:
    journal = site.state / "journal"
    journal.chmod(0)
    try:
        with as_nobody():
            found = examined(site)
    finally:
        journal.chmod(0o700)
    assert "state directory" in faults(found) and "cannot be read" in found["state directory"]["what"]
    assert "chown" in found["state directory"]["mend"]


def test_a_journal_that_its_own_user_cannot_read() -> None:
    """In a folder that can be reached: everything above it is open."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    journal = folder / "journal"
    journal.mkdir(mode=0o700)
    (journal / "00000001.journal").touch()
    if os.getuid() == 0:
        for path in (folder, journal):
            os.chown(path, NOBODY, NOBODY)
    try:
        with as_nobody():
            assert check_state(folder).level == "ok"
            journal.chmod(0)
            found = check_state(folder)
            journal.chmod(0o700)
    finally:
        shutil.rmtree(folder)
    assert found.level == "fault" and found.values["path"] == str(journal)


def test_a_state_directory_that_others_can_read(site: Site) -> None:
    site.state.chmod(0o755)
    try:
        found = examined(site)
        assert found["state directory"]["level"] == "warning" and "0755" in found["state directory"]["what"]
        assert site.state.stat().st_mode & 0o777 == 0o755, "it changes nothing"
    finally:
        site.state.chmod(0o700)


def test_an_old_redis(site: Site) -> None:
    with between(site.store.url, old_redis) as url:
        found = examined(site, url=url)
    assert faults(found) == ["redis version"]
    assert "6." in found["redis version"]["what"] and "install Redis 7" in found["redis version"]["mend"]


def test_a_clock_that_is_off(site: Site) -> None:
    with between(site.store.url, hours_ahead) as url:
        found = examined(site, url=url)
    assert faults(found) == ["clock"]
    assert "7200" in found["clock"]["what"] and "NTP" in found["clock"]["mend"]


def test_rights_too_narrow(site: Site) -> None:
    """A producer's user is one for a producer alone; the documented rules of a worker are enough for both."""
    for rules, lacking in (
        (ACL, ["worker's rights"]),
        (WORKER_ACL, []),
        (f"{WORKER_ACL} -evalsha", ["worker's rights"]),
    ):
        site.redis.execute_command("ACL", "SETUSER", "narrow", "reset", "on", ">pw", *rules.split())
        before = site.redis.dbsize()
        found = examined(site, url=site.store.url.replace("unix://", "unix://narrow").replace(_password(site), "pw"))
        assert [name for name in faults(found) if "rights" in name] == lacking
        assert site.redis.dbsize() == before, "nothing that was tried has happened"
    assert found["worker's rights"]["what"].endswith(": evalsha") and "ACL SETUSER" in found["worker's rights"]["mend"]
    site.redis.execute_command("ACL", "DELUSER", "narrow")


def _password(site: Site) -> str:
    return site.store.url.partition("@")[0].rpartition(":")[2]


def test_an_unsupported_flag(site: Site) -> None:
    found = examined(site, "--", "--max-model-len", "2048", "--enable-sleep-mode")
    assert faults(found) == ["flags"]
    assert "--enable-sleep-mode" in found["flags"]["what"] and found["flags"]["mend"] == "leave it out"
    assert examined(site, "--", "--max-model-len", "2048")["flags"]["level"] == "ok"


def test_a_torn_header(site: Site) -> None:
    """Last: the next worker mends it."""
    site.send("torn", 2)
    site.killed("applying")
    site.is_torn()
    site.redis.delete("weights:worker")
    found = examined(site)
    assert faults(found) == ["weights"] and found["code"] == 1
    assert "half-written" in found["weights"]["what"] and "start `tandem worker --run-dir" in found["weights"]["mend"]
    site.work(*QUIET)
    assert faults(examined(site)) == []
