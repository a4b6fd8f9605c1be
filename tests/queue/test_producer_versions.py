"""The producer with the oldest and the newest RQ and redis-py that it is declared to work with, and the worker's RQ."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import redis
from drain_parts import Weights, start

ROOT = Path(__file__).parents[2]
DECLARED: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def install(folder: Path, packages: list[str]) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--target",
        str(folder),
    ]
    done = subprocess.run([*command, *packages], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def oldest(tmp_path: Path) -> Path:
    """The lower bounds, installed once for this environment: a second or two, then none."""
    packages = [re.sub(r"^([a-z]+)>=([0-9.]+).*", r"\1==\2", declared) for declared in DECLARED]
    digest = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:12]
    kept = Path(sys.prefix) / "oldest-producer" / digest
    if not kept.exists():
        made = install(tmp_path / "oldest", packages)
        kept.parent.mkdir(exist_ok=True)
        try:
            made.rename(kept)
        except OSError:  # another file system, or another run was faster
            return made
    return kept


def newest(tmp_path: Path) -> Path:
    return install(tmp_path / "newest", ["--upgrade", *DECLARED])


def between(tmp_path: Path) -> Path:
    return install(tmp_path / "between", ["rq==2.6.1", "redis==6.4.0", *DECLARED[2:]])


@pytest.mark.parametrize(
    ("made", "options"),
    [
        pytest.param(oldest, "", id="oldest"),
        pytest.param(oldest, "&protocol=3", id="oldest-resp3"),
        pytest.param(between, "", id="between", marks=pytest.mark.slow),
        pytest.param(newest, "", id="newest", marks=pytest.mark.slow),
        pytest.param(newest, "&protocol=2", id="newest-resp2", marks=pytest.mark.slow),
    ],
)
def test_an_application_and_the_worker_each_have_their_own_rq(
    made: Any, options: str, redis_url: str, tmp_path: Path
) -> None:
    folder = made(tmp_path)
    environment = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PATH": os.environ["PATH"]}
    with subprocess.Popen(
        [sys.executable, "-S", str(ROOT / "tests" / "helpers" / "producer_child.py"), redis_url + options],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "queued\n"
        start(redis.Redis.from_url(redis_url), Weights(tmp_path), hooks=[], linger=0).work(burst=True)
        seen = json.loads(child.stdout.read())
    assert child.returncode == 0
    if made is oldest:
        assert DECLARED[1].startswith(f"rq>={'.'.join(seen['rq'].split('.')[:2])},")
        assert DECLARED[0] == f"redis>={seen['redis']}"
    del seen["rq"], seen["redis"]
    assert seen == {
        "first": ["queued", {"rating": 5}, 1],
        "said": [["queued", "replaced", "withdrawn", "queued"], 1],
        "many": ["known", "queued", "refused"],
        "failed": "transcript bad failed: TandemError: this transcript cannot be prepared",
        "again": 1,
        "version": 1,
        "async": {
            "said": ["queued", "known", "replaced", "withdrawn"],
            "outcomes": ["queued", "known"],
            "version": 1,
            "state": "finished",
        },
        "torch": False,
    }
