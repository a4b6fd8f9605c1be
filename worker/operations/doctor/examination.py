"""All of doctor's checks, in the order in which a person would look.

Must not know: torch, vLLM. Invariants: changes nothing; one check that fails keeps no other from being made; none waits
longer than a few seconds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from producer.connection import own_words
from worker.operations.doctor import redis_checks, server_checks, state_checks
from worker.operations.doctor.finding import Fact, Finding, unchecked
from worker.operations.doctor.gpu_check import check_gpu
from worker.operations.doctor.package_checks import check_packages
from worker.operations.doctor.redis_rights import check_rights
from worker.operations.doctor.server_view import ServerView, look_at_server
from worker.operations.doctor.sockets_check import check_sockets
from worker.operations.doctor.worker_check import check_worker
from worker.operations.status import gather
from worker.versions.eviction_watch import redis_info


@dataclass(frozen=True)
class Subject:
    """What is examined. redis_url: may hold a password. state_dir: None, the worker's own. flags: for vLLM; none: those
    of the running server. environment: the one that `flags` would be used in."""

    redis_url: str
    run_dir: Path
    state_dir: Path | None
    flags: Sequence[str]
    environment: Mapping[str, str]


def examine(subject: Subject) -> Iterator[Finding]:
    """Every finding, as it is made."""
    answers, client = redis_checks.check_answers(subject.redis_url)
    yield answers
    server = look_at_server(subject.run_dir)
    known: dict[str, Any] = {}
    if client is not None:
        with client:
            yield from _redis(client)
        known = gather(subject.redis_url, subject.run_dir)
    yield check_sockets(subject.run_dir)
    yield server_checks.check_server(server)
    yield server_checks.check_weights(server, known)
    yield server_checks.check_flags(server, subject.flags, subject.environment)
    yield server_checks.check_leftovers(subject.run_dir)
    yield check_worker(known, server)
    yield check_gpu(server, worker_runs=bool(server.state.get("trainer")))
    yield from check_packages()
    yield from _state(subject.state_dir, server)


def _redis(client: redis.Redis) -> Iterator[Finding]:
    try:
        info = redis_info(client)
    except redis.RedisError as error:
        yield unchecked("redis version", Fact.REDIS_SILENT, command="INFO", said=own_words(error))
        return
    yield redis_checks.check_version(info)
    yield redis_checks.check_eviction(info)
    yield redis_checks.check_persistence(info)
    checks: dict[str, Callable[[], Finding]] = {
        "worker's rights": lambda: check_rights(client, "worker"),
        "producer's rights": lambda: check_rights(client, "producer"),
        "keys": lambda: redis_checks.check_types(client),
        "latency": lambda: redis_checks.check_latency(client),
        "clock": lambda: redis_checks.check_clock(client),
    }
    for name, check in checks.items():
        try:
            yield check()
        except redis.exceptions.NoPermissionError as error:
            yield unchecked(name, Fact.REDIS_SILENT, command="a command", said=own_words(error))
        except redis.RedisError as error:
            yield unchecked(name, Fact.REDIS_REFUSED, said=own_words(error))


def _state(given: Path | None, server: ServerView) -> Iterator[Finding]:
    folder = state_checks.state_dir_of(given, server)
    yield state_checks.check_state(folder)
    yield state_checks.check_formats(folder, server.model)
    yield state_checks.check_checkpoints(folder)
    yield state_checks.check_room(folder, server.model)
