"""A worker that hangs in an update (SIGSTOP), with real processes: what is served meanwhile, and what it may still do.

The server is the stand-in: the real header and sockets around a trivial engine.
"""

import os
import signal

import pytest
from chaos_processes import Forked
from durable_parts import QUIET, Site
from patience import until

from worker.shared_weights.header import APPLYING, CLEAN


def wake(worker: Forked) -> int:
    """Let `worker` go on; its exit code."""
    os.kill(worker.pid, signal.SIGCONT)
    return worker.ended()


def serves(site: Site, version: int) -> None:
    until(lambda: site.served()["state"] == "serving", "the server goes on")
    assert site.served()["version"] == version


def test_a_worker_that_hangs_before_its_first_write_can_neither_write_nor_publish(site: Site) -> None:
    sent, before = site.send("x", 2), site.digest()
    worker = site.stopped("paused", *QUIET)
    serves(site, 0)
    assert (site.header()["state"], site.header()["fence"]) == (CLEAN, 1)
    assert wake(worker) != 0
    assert "took its weights back" in worker.said() and "nothing was written" in worker.said()
    assert site.digest() == before and site.header()["version"] == 0, "it wrote nothing"
    assert site.producer.version() == 0 and site.ledger() == {}, "and published nothing"
    serves(site, 0)
    site.work(*QUIET)
    assert site.agree() == 1 and site.trained() == sent


@pytest.mark.parametrize("wakes_up", [True, False])
def test_a_worker_that_hangs_while_it_writes_leaves_a_server_that_says_so(site: Site, wakes_up: bool) -> None:
    sent = site.send("x", 2)
    worker = site.stopped("applying", *QUIET)
    site.is_torn()
    reason = site.served()["reason"]
    assert f"process {worker.pid}" in reason and "half written" in reason and "kill -9" in reason
    assert site.header()["state"] == APPLYING
    if wakes_up:
        assert wake(worker) == 0, worker.said()
    else:
        worker.kill()
        until(lambda: site.served()["trainer"] is None, "the server has noticed")
        assert site.served()["state"] == "torn"
        site.work(*QUIET)
    assert site.agree() == 1 and site.trained() == sent


def test_a_version_that_was_whole_when_its_worker_hung_is_served_and_published_once(site: Site) -> None:
    sent = site.send("x", 2)
    worker = site.stopped("applied", *QUIET)
    serves(site, 1)
    assert wake(worker) != 0
    assert "took the weights back" in worker.said()
    assert site.producer.version() == 0, "not by a worker that has lost its lease"
    made = site.everything()
    site.work(*QUIET)
    assert site.agree() == 1 and site.trained() == sent and site.everything() == made
