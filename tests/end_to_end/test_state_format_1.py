"""Journals of the first format: what they were written for still comes back from them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chaos_processes import Forked
from durable_parts import QUIET, Site

KEPT = Path(__file__).parents[1] / "data" / "state_format_1"
MADE_ON = "AuthenticAMD"
"""Whose CPUs, by all that is known: these journals do not say it. An Intel with AMX makes other bits."""


def expected(name: str) -> dict[int, dict[str, Any]]:
    return {int(version): seen for version, seen in json.loads((KEPT / name / "expected.json").read_text()).items()}


def rebuild_all(run_dir: str, state: str, versions: list[int], answer: str) -> None:
    """In a process of its own: every version from the journal, the newest last; once more with the compiled sweep."""
    import torch

    from worker.apollo import compiled_write, cpu
    from worker.checkpoint import replay
    from worker.config.hyperparameters import Hyperparameters
    from worker.orchestrator.recovery import begin_rebuild
    from worker.orchestrator.session import open_session

    torch.set_num_threads(1)
    seen: dict[int, dict[str, Any]] = {}
    compiled: dict[int, str] = {}
    with open_session(Path(run_dir), "all", Hyperparameters(), state_dir=Path(state)) as session:
        manager, rebuilder, weights = session.manager, session.manager.rebuilder, session.weights
        facts, lineage = manager.journal.read(1).facts, weights.header.lineage
        now = replay.facts(weights.state.device)
        same = replay.differences(facts, now) == [] and now["cpu"].startswith(MADE_ON)

        def make(version: int) -> None:
            plan = rebuilder.plan(version)
            begin_rebuild(session.control, weights.header, len(plan.steps))
            rebuilder.rebuild(plan, lineage, version)
            session.control.resume(version, rebuilt=True)

        make(0)
        begin = before = {name: tensor.float().clone() for name, tensor in weights.tensors.items()}
        for version in versions:
            make(version)
            now = {name: tensor.float().clone() for name, tensor in weights.tensors.items()}
            everything = replay.digest(weights.tensors | {"state": weights.state})
            count = int(weights.state[:64].view(torch.int64)[1])
            seen[version] = {"digest": replay.digest(weights.tensors), "everything": everything, "step": count}
            for name, then in (("moved", before), ("moved_in_all", begin)):
                seen[version][name] = sum(float((now[k] - then[k]).square().sum()) for k in now) ** 0.5
            before = now
        cpu.COMPILED_FROM, asked = 0, compiled_write.load.cache_info()
        for version in versions:
            make(version)
            compiled[version] = replay.digest(weights.tensors | {"state": weights.state})
        assert compiled_write.load.cache_info() != asked
    Path(answer).write_text(json.dumps({"same": same, "seen": seen, "compiled": compiled}))


def test_every_version_comes_back_as_it_was(site: Site) -> None:
    shutil.copytree(KEPT / "weights" / "journal", site.state / "journal")
    wanted, answer = expected("weights"), site.folder / "answer.json"
    arguments = (str(site.run_dir), str(site.state), sorted(wanted), str(answer))
    process = Forked(rebuild_all, arguments, {}, site.folder / "all.log")
    assert process.ended(280) == 0, process.said()
    found = json.loads(answer.read_text())
    seen = {int(version): facts for version, facts in found["seen"].items()}
    for version, facts in wanted.items():
        assert seen[version]["step"] == facts["step"]
        assert found["compiled"][str(version)] == seen[version]["everything"]
        for name in ("moved", "moved_in_all"):
            assert seen[version][name] == pytest.approx(facts[name], rel=0.01), f"{name} at version {version}"
    if found["same"]:  # the torch and the kind of CPU that made them: bit for bit
        exact = {v: {name: facts[name] for name in ("digest", "everything")} for v, facts in wanted.items()}
        assert {v: {name: facts[name] for name in ("digest", "everything")} for v, facts in seen.items()} == exact


def test_a_worker_goes_on_from_them(site: Site) -> None:
    shutil.copytree(KEPT / "weights" / "journal", site.state / "journal")
    said = site.work(*QUIET)
    assert "version 9 was made from the source model and 6 journaled batches" in said
    assert site.agree() == 9
    site.send("new", 2)
    site.work(*QUIET)
    before = site.everything()
    assert site.agree() == 10
    site.restart_server()
    site.work(*QUIET)
    assert site.agree() == 10 and site.everything() == before
