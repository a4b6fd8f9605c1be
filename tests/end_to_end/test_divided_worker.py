"""`tandem worker` beside a server whose weights are divided over two ranks (the stand-in): one trainer process a rank,
and whoever is killed, whenever."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from divided_parts import KILLED, DividedSite
from durable_parts import LEARNING, QUIET, Site
from patience import until
from replica_parts import feedback

from worker.apollo.state_layout import HEADER_BYTES
from worker.checkpoint import model_directory
from worker.shared_weights.attach import attach
from worker.shared_weights.divided import DividedWeights
from worker.utils.fault_injection import UPDATE_POINTS

WRITING = ("applying", "swept")
"""Points at which a version is half written."""


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Iterator[DividedSite]:
    site = DividedSite(tmp_path, tiny_model)
    yield site
    site.close()


def live(site: Site) -> dict[str, torch.Tensor]:
    """The whole weights as they are served, fp32 copies."""
    tensors = site.weights().tensors if isinstance(site, DividedSite) else attach(site.run_dir).tensors
    return {name: tensor.detach().float().clone() for name, tensor in tensors.items()}


def apart(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor], first: dict[str, torch.Tensor]) -> float:
    """How far two sets of weights are apart, of the way that they moved from `first` (L2, over all tensors). Some bf16
    weights take the neighbouring number, as sums come in another order: one in some hundred."""
    distance = sum(float((ours[name] - others[name]).square().sum()) for name in first)
    way = sum(float((ours[name] - first[name]).square().sum()) for name in first)
    return (distance / way) ** 0.5


def test_every_kind_is_trained_and_a_checkpoint_is_the_whole_model(site: DividedSite) -> None:
    """All kinds of feedback; the checkpoint is what is served; one process makes the same weights from the journal."""
    first = live(site)
    sent = feedback(9)
    for item in sent:
        site.producer.enqueue(**item)
    said = site.work(jobs=3)
    assert "rank 1 (process" in said and "of 2 trains its part" in said
    assert site.agree() == 3 and sorted(site.trained()) == sorted(item["id"] for item in sent)
    assert all(site.manifest(version)["ranks"] == "2" for version in (1, 2, 3))
    served, weights = live(site), site.weights()
    assert isinstance(weights, DividedWeights)
    assert [one.header.fields()["version"] for one in weights.ranks] == [3, 3]
    assert "rank 1 CLEAN at 3" in site.tandem("status", code=1)  # 1: no worker runs now
    model, _ = model_directory.load(site.state / "checkpoints" / "3")
    loaded = dict(model.named_parameters())
    for name, tensor in served.items():
        torch.testing.assert_close(loaded[name].float(), tensor, rtol=2**-8, atol=0, msg=name)  # A_log is bf16 there
    shutil.rmtree(site.state / "checkpoints")
    site.ranks = 1
    site.restart_server()
    assert "ranks was 2 and is 1" in site.work(*QUIET)
    assert apart(served, live(site), first) < 0.15


def test_a_rank_that_is_lost_in_the_write_leaves_the_weights_torn_until_the_next_start(site: DividedSite) -> None:
    sent = site.send("a", 2)
    said = site.rank_killed("swept", code=1)
    assert "rank 1 (process" in said and "was killed by signal 9; the weights are torn: start the worker again" in said
    site.is_torn()
    assert site.header()["state"] == "APPLYING" and site.producer.version() == 0
    site.work(*QUIET)
    assert site.agree() == 1 and site.trained() == sent


@pytest.mark.slow
@pytest.mark.parametrize("way", ["burst", "streaming"])
def test_whoever_dies_wherever_the_weights_are_those_of_an_undisturbed_run(
    tmp_path: Path, tiny_model: Path, way: str
) -> None:
    """Every point, either rank: nothing lost, nothing twice, torn where a write was cut off, the same bits in the
    end. Rank 1 passes four points: it has no journal, no lease and no Redis."""
    expected: dict[str, tuple[str, int]] = {}
    passed = UPDATE_POINTS if way == "burst" else UPDATE_POINTS[1:]  # the backward pass is the write
    of_rank_1 = [point for point in ("backward", *WRITING, "applied") if point in passed]
    cases = [(None, ""), *((1, point) for point in of_rank_1), *((0, point) for point in passed)]
    for rank, point in cases:
        folder = tmp_path / f"{rank}-{point}"
        folder.mkdir()
        site = DividedSite(folder, tiny_model)
        try:
            sent = site.send("a", 4)
            if rank == 1:
                said = site.rank_killed(point, "--apply", way, code=1 if point in WRITING else 0)
                assert "rank 1 (process" in said and "was killed by signal 9" in said
            elif rank == 0:
                site.killed(point, *QUIET, "--apply", way)
            if point in WRITING:
                site.is_torn()
            site.work(*QUIET, "--apply", way)
            assert site.agree() == 2 and sorted(site.trained()) == sent, (rank, point)
            order = " ".join(site.trained())  # who was given back may be trained later
            assert expected.setdefault(order, site.everything()) == site.everything(), (rank, point)
        finally:
            site.close()
    assert len(expected) < len(cases) / 2, "most are compared with others"


@pytest.mark.slow
def test_killed_while_weights_are_made_again(site: DividedSite) -> None:
    site.send("a", 4)
    site.work(*QUIET)
    before = site.everything()
    for point in ("restoring", "restored"):
        site.restart_server()
        site.killed(point, *QUIET)
        site.is_torn()
        site.work(*QUIET)
        assert site.everything() == before and site.agree() == 2


@pytest.mark.slow
def test_ranks_that_disagree_at_a_start_are_torn_and_made_again(site: DividedSite) -> None:
    site.send("a", 4)
    site.work(*QUIET)
    before, weights = site.everything(), site.weights()
    assert isinstance(weights, DividedWeights)
    weights.ranks[1].header.begin(0)
    next(iter(weights.ranks[1].tensors.values())).zero_()
    assert "torn" in site.work(*QUIET)
    assert site.everything() == before and site.agree() == 2


@pytest.mark.slow
def test_rank_1_dies_with_the_worker_and_is_started_again_when_it_is_idle(site: DividedSite) -> None:
    worker = site.start("worker", *LEARNING, *QUIET)
    until(lambda: "worker ready" in worker.said(), "the worker is ready")
    ours = _rank_of(worker.pid)
    ours_path = Path(f"/proc/{ours}")
    os.kill(ours, signal.SIGKILL)
    until(lambda: "every rank but 0 is started again" in worker.said(), "the worker notices")
    sent = site.send("a", 1)
    until(lambda: site.trained() == sent, "it trains")
    later = _rank_of(worker.pid)
    assert later != ours and not ours_path.exists()
    worker.kill()
    until(lambda: not Path(f"/proc/{later}").exists(), "rank 1 dies with the worker")
    assert site.agree() == 1 and worker.ended() == KILLED


def _rank_of(worker: int) -> int:
    """The process of rank 1."""
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    return next(int(pid) for pid in children if "rank_worker" in Path(f"/proc/{pid}/cmdline").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("point", ["backward", "swept"])
def test_a_rank_that_is_stopped_is_named_by_status_and_ended(site: DividedSite, point: str) -> None:
    """Before the write the batch is trained by new ranks; in it, the weights are torn until the next start."""
    sent = site.send("a", 2)
    worker = site.start("worker", "--until-empty", *LEARNING, *QUIET, rank_fault=f"{point}:1:stop")
    until(lambda: "is stopped (SIGSTOP, or a debugger)" in worker.said() or not worker.alive(), "it is seen")
    stopped = _rank_of(worker.pid)
    status = site.tandem("status", code=1, log="status.log")
    assert f"waiting     for rank 1 (process {stopped}), " in status and "which is stopped" in status
    assert f"! rank 1 (process {stopped}) is stopped, and the worker has waited for it" in status
    torn = point in WRITING
    assert worker.ended() == int(torn), worker.said()
    assert f"rank 1 (process {stopped}) was stopped for 10 s, and was ended" in worker.said()
    if torn:
        site.is_torn()
        site.work(*QUIET)
    assert site.agree() == 1 and site.trained() == sent
    assert "waiting  " not in site.tandem("status", code=1)


@pytest.mark.slow
def test_rollback_and_another_number_of_ranks(site: DividedSite) -> None:
    """Undone on two ranks; then the same checkpoint is served by one process and by two again, bit for bit."""
    site.send("a", 4)
    site.work()
    version_2 = site.everything()
    site.send("b", 2)
    site.work("--checkpoint-every", "1")
    site.tandem("rollback", "2")
    assert site.agree() == 4 and site.everything()[0] != version_2  # the step count is another's
    weights = live(site)
    site.work("--checkpoint-every", "1")
    for ranks in (1, 2):
        site.ranks = ranks
        site.restart_server()
        site.work(*QUIET)
        assert site.agree() == 4
        again = live(site)
        assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items()), ranks
        assert int(site.weights().state.cpu()[:HEADER_BYTES].clone().view(torch.int64)[1]) == 2


@pytest.mark.slow
def test_what_does_not_go_with_ranks_is_refused_by_name(site: DividedSite) -> None:
    for options, message in [
        (("--apply", "factors"), "--apply factors does not go with a server that has --tensor-parallel-size"),
        (("--apply", "streaming", "--hogwild"), "--hogwild does not go with"),
        (("--replica", "0/2"), "--replica does not go with"),
    ]:
        said = site.work(*options, code=1)
        assert message in said and len(said.strip().splitlines()) == 1, said
    assert site.header()["state"] == "CLEAN"
    site.optimizer = "factored"
    site.restart_server()
    assert "--optimizer apollo-mini" in site.work(code=1)
