"""Servers, one a GPU, and the workers beside them that train as one: started here, or there already (`attached`).

Must not know: what is measured. Invariant: as a rig's; servers that were there stay.
"""

import json
import os
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rig import Rig, Worker
from texts import conversation

from worker.data.examples import ExampleBuilder
from worker.versions import replica_status


@dataclass
class Fleet:
    """Servers, one a GPU, and the workers beside them; all share the Redis of the first. options: of workers that make
    versions of `tokens` a replica; more: of every worker."""

    rigs: list[Rig]
    builder: ExampleBuilder
    tokens: int
    jobs: int
    options: list[str]
    more: list[str]

    @contextmanager
    def workers(self, count: int, rendezvous: int, options: Sequence[str] | None = None) -> Iterator[list[Worker]]:
        """`count` replicas that train as one, all ready; one of them is a plain worker. options: in the place of those
        that make a version of `tokens`."""
        with ExitStack() as stack:
            started = [self.start(number, count, rendezvous, options) for number in range(count)]
            for worker in started:
                stack.callback(worker.stop)
            started[0].until("be ready", lambda: "worker ready" in started[0].said(), 300)
            if count > 1:
                started[0].until("have all replicas", lambda: len(self.members().present) == count, 300)
            yield started

    def start(self, number: int, count: int, rendezvous: int, options: Sequence[str] | None = None) -> Worker:
        replica = ["--replica", f"{number}/{count}", "--rendezvous", f"127.0.0.1:{rendezvous}"] if count > 1 else []
        if options is None:
            options = [*self.options, "--max-jobs", str(self.jobs * count), "--linger", "3"]
        return self.rigs[number].start_worker(*options, *self.more, *replica)

    def members(self) -> replica_status.Members:
        store = self.rigs[0].redis
        said = {key.decode(): value.decode() for key, value in store.hgetall("weights:state").items()}
        return replica_status.read(said) or replica_status.Members()

    def version(self, name: str, count: int) -> dict[str, float]:
        """One version of `count` times `tokens`: see `Rig.version`, and tokens/s."""
        names = [f"{name}-{os.getpid()}-{n}" for n in range(self.jobs * count)]
        row = self.rigs[0].version([conversation(self.builder, one, self.tokens // self.jobs) for one in names])
        return row | {"tokens_per_s": row["tokens"] / row["step_s"]}


def served_version(rig: Rig) -> Any:
    with urllib.request.urlopen(f"{rig.url}/weights/version", timeout=30) as answer:
        return json.load(answer)["version"]


def attached(name: str) -> tuple[Path, str, Path]:
    """(run directory, URL, model directory) of a server that is there, named as RUN_DIR=URL."""
    run_dir, _, url = name.partition("=")
    if not url.startswith("http"):
        raise click.BadParameter(
            f"{name!r}: write RUN_DIR=URL, e.g. /tmp/run=http://127.0.0.1:8000", param_hint="--attach"
        )
    if not Path(run_dir).is_dir():
        raise click.BadParameter(f"{run_dir} is no directory: name that server's run directory", param_hint="--attach")
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
            model = json.load(answer)["data"][0]
    except OSError as error:
        raise click.BadParameter(f"{url} does not answer: {error}", param_hint="--attach") from None
    if model["id"] != model["root"]:
        raise click.BadParameter(
            f"{url} serves {model['root']} as {model['id']}: start it without --served-model-name",
            param_hint="--attach",
        )
    return Path(run_dir), url, Path(model["root"])
