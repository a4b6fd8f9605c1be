"""Replicas in a test: a site with several servers and their workers, and what becomes of it when one is killed."""

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chaos_processes import Forked, RealServer, run_stand_in, run_tandem
from durable_parts import LEARNING, QUIET, Site
from patience import PATIENCE, until
from replica_parts import feedback, free_port

from worker.checkpoint import replay
from worker.serving.control_client import server_state
from worker.serving.protocol import PAUSED, SERVING
from worker.shared_weights.attach import attach


class FleetSite(Site):
    """A site with several stand-ins: replica 0's is the site's own; the others' workers are `follower(n)`."""

    def __init__(self, folder: Path, model: Path, count: int = 2, *, real: bool = False) -> None:
        """real: with vLLM instead of stand-ins."""
        super().__init__(folder, model, real=real)
        self.count, self.port = count, free_port()
        self.servers = {n: self.start_other_server(n) for n in range(1, count)}
        self.followers: dict[int, Forked] = {}

    def run_dir_of(self, number: int) -> Path:
        return self.folder / f"run-{number}" if number else self.run_dir

    def state_of(self, number: int) -> Path:
        return self.folder / f"state-{number}" if number else self.state

    def start_other_server(self, number: int) -> Any:
        if self.real:
            return RealServer(self.model, self.run_dir_of(number), self.folder / f"server-{number}.log")
        folders = (str(self.model), str(self.run_dir_of(number)))
        server = Forked(run_stand_in, folders, {}, self.folder / f"server-{number}.log")
        until(lambda: "ready" in server.said(), "the stand-in is ready")
        return server

    def restart_other_server(self, number: int) -> None:
        self.servers[number].kill()
        self.servers[number] = self.start_other_server(number)

    def close(self) -> None:
        for process in (*self.followers.values(), *self.servers.values()):
            process.kill()
        super().close()

    def replica(self, number: int) -> list[str]:
        """The flags of one."""
        meeting = ["--rendezvous", f"127.0.0.1:{self.port}", "--replica-wait", str(PATIENCE)]
        return ["--replica", f"{number}/{self.count}", *meeting]

    def follow(self, number: int, *options: str, fault: str | None = None) -> Forked:
        """The worker of a replica but 0, in the background."""
        own = ["--run-dir", str(self.run_dir_of(number)), "--state-dir", str(self.state_of(number))]
        environment = {"TANDEM_FAULT": fault or ""}
        arguments = ("worker", *self.replica(number), *own, *LEARNING, *QUIET, *options)
        self.followers[number] = Forked(run_tandem, arguments, environment, self.folder / f"tandem-{number}.log")
        return self.followers[number]

    def lead(self, *options: str, jobs: int = 3, code: int = 0) -> str:
        """Replica 0's worker until the queue is empty."""
        return self.work(*self.replica(0), *QUIET, *options, jobs=jobs, code=code)

    def lead_killed(self, fault: str, *options: str, jobs: int = 3) -> str:
        return self.killed(fault, *self.replica(0), *QUIET, *options, jobs=jobs)

    def together(self, *options: str, jobs: int = 3) -> str:
        """All replicas until the queue is empty; what replica 0 said."""
        for number in range(1, self.count):
            self.follow(number, *options)
        said = self.lead(*options, jobs=jobs)
        for follower in self.followers.values():
            assert follower.ended() == 0, follower.said()
        return said

    def background(self, *options: str, fault: str | None = None) -> Forked:
        """Replica 0's worker, which goes on until it is told to stop."""
        return self.start("worker", *self.replica(0), *LEARNING, *QUIET, "--max-jobs", "3", *options, fault=fault)

    def to_version(self, version: int, leader: Forked) -> None:
        """Wait for it."""
        until(lambda: self.producer.version() >= version or not leader.alive(), f"version {version}")
        assert leader.alive(), leader.said()

    def stop(self, leader: Forked) -> str:
        """Tell `leader` to stop, and so all; what it said."""
        os.kill(leader.pid, signal.SIGTERM)
        assert leader.ended() == 0, leader.said()
        for follower in self.followers.values():
            assert follower.ended() == 0, follower.said()
        return leader.said()

    def wakes(self, other: Forked, leader: Forked) -> None:
        """`other`, stopped at version 1, goes on, is brought up, and has its part in version 2; then all end."""
        os.kill(other.pid, signal.SIGCONT)
        until(lambda: other.said().count("is one of") == 2 or not other.alive(), "it is back")
        self.send("i", 3)
        self.to_version(2, leader)
        self.stop(leader)
        assert self.all_agree() == 2 and self.manifest(2)["replicas"] == "2"

    def send_kinds(self, count: int) -> list[str]:
        """Transcripts of all kinds; their ids."""
        sent = feedback(count)
        for item in sent:
            self.producer.enqueue(**item)
        return [item["id"] for item in sent]

    def served_by(self, number: int) -> tuple[str, int]:
        """What a server says that it does (serving, paused, torn), and its version: that of its answers' headers."""
        state = server_state(self.run_dir_of(number))
        return state["state"], state["version"]

    def still(self, number: int) -> list[tuple[float, float]]:
        """When (time.monotonic()) a stand-in did not serve, from each moment to another."""
        log = self.folder / (f"server-{number}.log" if number else "server.log")
        said = [
            line.split() for line in log.read_text().splitlines() if f" {SERVING} " in line or f" {PAUSED} " in line
        ]
        found, since = list[tuple[float, float]](), None
        for at, condition, _ in said:
            if condition == PAUSED and since is None:
                since = float(at)
            elif condition == SERVING and since is not None:
                found.append((since, float(at)))
                since = None
        return found

    def standing(self, number: int) -> tuple[str, int, str, str]:
        """Digest of weights and optimizer's state, and the header's version, lineage and state."""
        weights = attach(self.run_dir_of(number))
        fields = weights.header.fields()
        said = fields["version"], fields["lineage"], fields["state"]
        return (replay.digest(weights.tensors | {"state": weights.state}), *said)

    def all_agree(self) -> int:
        """Every replica, Redis and the ledger tell one story; the version."""
        version = self.agree()
        standings = {self.standing(number) for number in range(self.count)}
        assert len(standings) == 1, standings
        return version


TOLD = ("applying", "swept", "applied", "resumed")
"""Points that a replica passes when replica 0 has said that the version will be made."""


def check_killed_follower(site: FleetSite, point: str, *options: str, told: Sequence[str] = TOLD) -> None:
    """Replica 0 ends its batch alone; the other one, started again, gets its weights."""
    sent = site.send(f"f-{point}", 3)
    other = site.follow(1, *options, fault=point)
    said = site.lead(*options)
    assert other.ended() == -signal.SIGKILL, other.said()
    assert re.search("(a replica|replica 1) was lost", said) and set(sent) <= set(site.trained()), said
    version = site.agree()
    assert (site.manifest(version).get("replicas") == "2") == (point in told)
    site.together(*options)
    assert site.all_agree() == version
    assert len(site.trained()) == len(set(site.trained()))


def check_killed_leader(site: FleetSite, point: str, *options: str) -> None:
    """The other one puts back what was not written, and waits for the next replica 0."""
    sent = site.send(f"l-{point}", 3)
    other = site.follow(1, *options)
    site.lead_killed(point, *options)
    said = site.lead(*options)
    assert other.ended() == 0, other.said()
    assert "replicas 0, 1 of 2 train together" in said
    site.all_agree()
    assert set(sent) <= set(site.trained()) and len(site.trained()) == len(set(site.trained()))
