"""Several workers that train as one: the flags, torchrun's environment, and what they mean together.

Must not know: torch, Redis.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from producer.errors import TandemError

F = TypeVar("F", bound=Callable[..., Any])
RENDEZVOUS = "127.0.0.1:29400"
SECRET = "TANDEM_REPLICAS_SECRET"
"""Environment: what all replicas of a fleet know."""
MOST_SECONDS = 1e6
PLACE = "{replica}"
"""In --run-dir and --state-dir: this replica's number."""


@dataclass(frozen=True)
class ReplicaSettings:
    """number: this replica's, of `count`; 0 decides. rendezvous: HOST:PORT of replica 0. timeout: seconds that a
    replica which hangs is waited for. wait: seconds that the first group is waited for. kept: torchrun keeps the store.
    rolling: servers are paused in turn. here: all of them are to be started, on this host."""

    number: int
    count: int
    rendezvous: str
    timeout: float
    wait: float
    secret: str = ""
    kept: bool = False
    rolling: bool = False
    here: bool = False

    @property
    def follows(self) -> bool:
        return self.number > 0


def replica_options(command: F) -> F:
    """Click decorator: adds the flags that `replica_settings_of` reads."""
    options = [
        click.option(
            "--replica",
            metavar="I/N",
            help="This worker is replica I (from 0) of N, each on a server of its own, which train as one. Replica 0"
            f" reads the queue. {PLACE} in --run-dir and --state-dir becomes I. Default under torchrun: its rank.",
        ),
        click.option(
            "--replicas",
            type=click.IntRange(2, 64),
            metavar="N",
            help=f"Start N workers on this host that train as one, and end with them; --run-dir has {PLACE} in it.",
        ),
        click.option(
            "--rendezvous",
            metavar="HOST:PORT",
            default=RENDEZVOUS,
            help="Where replica 0 listens for the others. Anybody who reaches it could change gradients: use a private"
            f" network, and the same {SECRET} for all.",
        ),
        click.option(
            "--replica-timeout",
            type=click.FloatRange(10),
            default=300.0,
            help="Seconds until a replica that hangs is given up; one that ends is noticed at once.",
        ),
        click.option(
            "--replica-wait",
            type=click.FloatRange(0),
            default=60.0,
            help="Seconds that replica 0 waits at its start for the others. Later ones join between two versions.",
        ),
        click.option(
            "--rolling",
            is_flag=True,
            help="Pause the replicas' servers in turn, replica 0's first, so that at least half of them serve at any"
            " moment. Meanwhile their answers come from two versions. With --apply burst or factors.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def replica_settings_of(options: dict[str, Any], environment: Mapping[str, str] = os.environ) -> ReplicaSettings | None:
    """Takes its flags out of a command's options; None for a worker alone. Raises `TandemError`."""
    replica, rendezvous, here = options.pop("replica"), options.pop("rendezvous"), options.pop("replicas")
    timeout, wait = options.pop("replica_timeout"), options.pop("replica_wait")
    rolling, kept = options.pop("rolling"), False
    for name, seconds in (("--replica-timeout", timeout), ("--replica-wait", wait)):
        if not seconds <= MOST_SECONDS:  # nor what is no number
            raise TandemError(f"{name} {seconds:g}: write a number of seconds, at most {MOST_SECONDS:,.0f}")
    if here is not None:
        if replica is not None:
            raise TandemError("--replicas N starts every replica, --replica I/N is one of them: give one of both")
        replica = f"0/{here}"
    if replica is None and "TORCHELASTIC_RUN_ID" in environment:
        replica = f"{environment['RANK']}/{environment['WORLD_SIZE']}"
        rendezvous = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        kept = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if replica is None:
        if rolling:
            raise TandemError("--rolling pauses the servers of several replicas in turn: it goes with --replica I/N")
        return None
    number, _, count = replica.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise TandemError(f"--replica {replica}: write I/N, with I from 0 to N - 1")
    if int(count) == 1:
        if rolling:
            raise TandemError(
                f"--replica {replica} --rolling: one replica has nobody to pause in turn with; leave --rolling out, or"
                " start N of them with --replica I/N"
            )
        return None
    secret = environment.get(SECRET, "")
    return ReplicaSettings(int(number), int(count), rendezvous, timeout, wait, secret, kept, rolling, here is not None)


def placed(path: Path, settings: ReplicaSettings | None) -> Path:
    """`path`, with this replica's number where it says so."""
    return path if settings is None else Path(str(path).replace(PLACE, str(settings.number)))


def check_places(*paths: Path | None) -> None:
    """Raises `TandemError` for a path that would be the same for all replicas of this host."""
    for path in paths:
        if path is not None and PLACE not in str(path):
            raise TandemError(
                f"--replicas: {path} would be that of every replica; write {PLACE} where the number goes, as in"
                f" /run/tandem-{PLACE}"
            )
