"""One worker per queue and weights: a lock in Redis that names its holder.

Must not know: RQ, torch.
Invariants: the key's value says who holds it (name, host, pid); it expires unless renewed; only its owner renews or
removes it. A holder that died on this very machine is replaced at once: machine, pid namespace and the process's start
time are in the value, so a recycled pid or another container's pid is never mistaken for it.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import redis

from producer import keys
from producer.errors import TandemError
from worker.consumer.heartbeat import Heartbeat

TTL = 60
"""Seconds the lock outlives its last renewal; a worker on another machine can be replaced after that."""
BEATS = 6
"""How often it is renewed in that time."""


class WorkerBusyError(TandemError):
    """Another worker holds the lock."""


class LockLostError(TandemError):
    """The lock is somebody else's now: this worker was silent for too long."""


def _birth(pid: int) -> str | None:
    """When the process started, in clock ticks since boot (proc(5), stat field 22); None if gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    """This boot of this machine and this pid namespace: within one machine a pid means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"unknown-{socket.gethostname()}-{os.getpid()}"  # equal to no other: never taken over before the TTL


def is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this very machine that is no more; False when that cannot be known."""
    return holder.get("machine") == _machine() and _birth(int(holder.get("pid", 0))) != holder.get("birth")


class WorkerLock:
    """`acquire()` before touching queue or weights, `renew()` well within `TTL` seconds, `release()` at the end; or all
    of what needs it inside `with lock:`, which renews it. `kept()` renews one that is held."""

    def __init__(self, connection: redis.Redis, name: str, key: str = keys.WORKER_LOCK, ttl: int = TTL) -> None:
        self.connection = connection
        self.key = key
        self.ttl = ttl
        pid = os.getpid()
        holder = {"name": name, "host": socket.gethostname(), "pid": pid, "machine": _machine(), "birth": _birth(pid)}
        self.value = json.dumps(holder | {"since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}).encode()
        self.held = False
        self._released = False

    def __enter__(self) -> Self:
        self.acquire()
        self._keeping = self.kept()
        self._keeping.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._keeping.__exit__(None, None, None)
        self.release()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Renewed by a thread, for work inside that may take longer than `ttl`. Whether it was lost all the same, the
        next `renew()` says."""
        beats = Heartbeat(self.ttl / BEATS, self.renew)
        beats.start()
        try:
            yield
        finally:
            beats.stop()

    def acquire(self) -> str | None:
        """Take the lock; returns a sentence when it was taken from a dead worker. Raises `WorkerBusyError`."""
        self._released = False
        while not self.connection.set(self.key, self.value, nx=True, ex=self.ttl):
            with self.connection.pipeline() as pipe:
                try:
                    pipe.watch(self.key)
                    found = pipe.get(self.key)
                    if found is None:
                        continue
                    holder = parse_holder(found)
                    if not is_dead(holder):
                        raise WorkerBusyError(
                            f"worker {describe(holder)} is already training queue '{keys.QUEUE}'; stop it first"
                            f" (if its machine is gone, its lock ends {self.ttl} s after its last sign of life)"
                        )
                    pipe.multi()
                    pipe.set(self.key, self.value, ex=self.ttl)
                    pipe.execute()
                    self.held = True
                    return f"took over from worker {describe(holder)}, which is dead"
                except redis.WatchError:
                    continue
        self.held = True
        return None

    def renew(self) -> None:
        """Extend it; takes it again if it merely expired (Redis was away). Raises `LockLostError` when it is
        another's. Does nothing once it was released: a heartbeat that Redis answers late must not take it again."""
        with self.connection.pipeline() as pipe:
            while not self._released:
                try:
                    pipe.watch(self.key)
                    found = pipe.get(self.key)
                    if found not in (None, self.value):
                        self.held = False
                        raise LockLostError(
                            f"worker {describe(parse_holder(found))} took this worker's place on queue '{keys.QUEUE}'"
                            f" after a silence of more than {self.ttl} s"
                        )
                    if self._released:
                        return
                    pipe.multi()
                    pipe.set(self.key, self.value, ex=self.ttl)
                    pipe.execute()
                    return
                except redis.WatchError:
                    continue

    def release(self) -> None:
        """Give it back if it is still ours."""
        self._released = True
        if not self.held:
            return
        self.held = False
        with self.connection.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(self.key)
                    if pipe.get(self.key) == self.value:  # else it expired, or was taken: not ours to remove
                        pipe.multi()
                        pipe.delete(self.key)
                        pipe.execute()
                    return
                except redis.WatchError:
                    continue  # a last heartbeat may have come between


def parse_holder(value: bytes | str) -> dict[str, Any]:
    """The holder as written by `WorkerLock`; a value that is not ours reads as an unknown holder."""
    try:
        holder = json.loads(value)
        return holder if isinstance(holder, dict) and isinstance(holder.get("pid", 0), int) else {}
    except (ValueError, RecursionError):
        return {}


def describe(holder: dict[str, Any]) -> str:
    """'NAME (pid 1 on HOST, since ...)'."""
    known = "name" in holder and "pid" in holder
    return (
        f"'{holder['name']}' (pid {holder['pid']} on {holder.get('host')}, since {holder.get('since')})"
        if known
        else f"of unknown name (see key {keys.WORKER_LOCK})"
    )
