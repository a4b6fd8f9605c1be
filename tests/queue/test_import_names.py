"""The import names are `producer` and `worker`; an application that has such modules imports `tandem_producer`."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import redis
from rq import Queue

from producer import keys
from producer.serializer import MsgpackSerializer

ROOT = Path(__file__).parents[2]

APPLICATION = """
import sys

import producer
import worker
from tandem_producer import Producer, TandemError, errors, keys

assert producer.MINE and worker.MINE
assert issubclass(errors.QueueUnavailableError, TandemError)
with Producer(sys.argv[1]) as sender:
    sent = sender.enqueue([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], id="a")
    assert sent.new and sender.status("a").state == "queued" and sender.job("a").func_name == keys.FUNCTION
"""


@pytest.fixture
def application(tmp_path: Path) -> Path:
    """A folder with modules that are called as ours are."""
    for name in ("producer", "worker"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    (tmp_path / "application.py").write_text(APPLICATION)
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([*command], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_an_application_with_modules_of_our_names_has_a_way_out(application: Path, redis_url: str) -> None:
    done = run(application, sys.executable, "application.py", redis_url)
    assert (done.returncode, done.stderr) == (0, "")
    with redis.Redis.from_url(redis_url) as store:
        assert Queue(keys.QUEUE, connection=store, serializer=MsgpackSerializer).job_ids == ["a"]


def test_the_command_line_does_not_look_at_the_folder_it_is_called_in(application: Path, redis_url: str) -> None:
    done = run(application, str(Path(sys.executable).parent / "tandem"), "version", "--redis", redis_url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_nothing_in_the_producer_relies_on_its_name() -> None:
    """Otherwise `tandem_producer` would import the application's `producer`."""
    for path in (ROOT / "producer").rglob("*.py"):
        for line in path.read_text().splitlines():
            absolute = line.lstrip().startswith(("import producer", "from producer"))
            example = path == ROOT / "producer" / "__init__.py"  # in its docstring
            assert not absolute or example, path


def test_what_is_built_has_both_names_and_the_types(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    (source / "tandem_producer").symlink_to((ROOT / "tandem_producer").readlink())
    for name in ("producer", "worker"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = run(source, *pip, "--wheel-dir", str(tmp_path), ".")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "producer").rglob("*.py"):
        inside = path.relative_to(ROOT / "producer")
        assert {f"producer/{inside}", f"tandem_producer/{inside}"} <= names
    assert {f"{name}/py.typed" for name in ("producer", "tandem_producer", "worker")} <= names
    assert {"worker/cli/main.py", "worker/serving/vllm/plugin.py"} <= names
