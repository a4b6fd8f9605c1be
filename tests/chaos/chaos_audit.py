"""After a campaign: was anything lost, trained twice or torn, and are the weights what an undisturbed run gives?

Everything is read back from Redis, from the header and from the weights themselves. The undisturbed run is a fresh
stand-in that the batches of the manifests are trained into, in their order, with nothing killed (chaos_undisturbed.py).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from chaos_campaign import Manifests
from chaos_history import PREFIX, Batch, Model, ids_of
from chaos_plan import HISTORY
from chaos_processes import Cluster, Forked, StandIn
from chaos_undisturbed import undisturbed

from producer import keys
from worker.checkpoint import record_file
from worker.versions import ledger


@dataclass
class Verdict:
    """figures: what was counted. problems: sentences; none means that the campaign was survived."""

    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def equal(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            self.problems.append(f"{what}: {str(found)[:300]}, not {str(expected)[:300]}")


def audit(cluster: Cluster, manifests: Manifests, transcripts: int) -> Verdict:
    """All checks; the server must run and no worker."""
    verdict = Verdict()
    model = check_books(cluster.redis, manifests.all, transcripts, verdict)
    header = cluster.header()
    known = ledger.state(cluster.redis)
    expected = {
        "lineage": known.lineage,
        "version": known.version,
        "state": "CLEAN",
        "fence": (header or {}).get("fence"),
    }
    verdict.equal("the header beside the weights", header, expected)
    live = live_digest(cluster)
    if cluster.replicas > 1:
        verdict.figures["versions made by two replicas"] = sum("replicas" in one for one in manifests.all.values())
        other = _in_process(_digest_of, (str(cluster.other_dir),), cluster.folder / "digest-other.json")
        verdict.equal("replica 1's weights and state, against replica 0's", other, live)
    replayed = _undisturbed(cluster, model)
    _check_journal(cluster.folder / "state" / "journal", manifests.all, verdict)
    verdict.figures["weights"] = live["weights"][:16]
    verdict.equal("the weights, against an undisturbed run of the same batches", live["weights"], replayed["weights"])
    verdict.equal("the optimizer's state, against the same", live["state"], replayed["state"])
    told = {version: manifests.all[version].get("digest") for version in model.rollbacks}
    same = {int(version): digest for version, digest in replayed["rollbacks"].items()}
    told = {version: digest for version, digest in told.items() if digest}  # a kill in between costs a measurement
    verdict.figures["rollbacks compared with an undisturbed run"] = len(told)
    verdict.equal("rollbacks, against the same", told, {version: same[version] for version in told})
    return verdict


def check_books(
    connection: redis.Redis, manifests: Mapping[int, Mapping[str, Any]], transcripts: int, verdict: Verdict
) -> Model:
    """Ledger, dropped ids, events and jobs in Redis against what the manifests lead to."""
    ids, model = {f"t{index}" for index in range(transcripts)}, Model(manifests)
    version = ledger.state(connection).version
    trained, dropped = ledger.everyone(connection), ledger.dropped(connection)
    verdict.problems += model.problems
    inside = Counter(id for batch in model.live for id in ids_of(batch) if not id.startswith(PREFIX))
    twice = sorted(id for id, count in inside.items() if count > 1)
    verdict.figures |= {"transcripts": transcripts, "versions": version, "lost": len(ids - trained.keys())}
    verdict.figures |= {"trained twice": len(twice), "dropped": len(dropped), "rollbacks": len(model.rollbacks)}
    verdict.figures["rehearsed"] = sum(len(manifest["rehearsed"]) for manifest in manifests.values())
    verdict.equal("versions that have a manifest", sorted(manifests), list(range(1, version + 1)))
    verdict.equal("transcripts not in the ledger", sorted(ids - trained.keys()), [])
    verdict.equal("ids in the ledger that nobody sent", sorted(trained.keys() - ids), [])
    verdict.equal("transcripts twice in the live weights", twice, [])
    verdict.equal("dropped ids in the live weights", sorted(dropped.keys() & _plain(model.live)), [])
    verdict.equal("the ledger, beside what the manifests say", trained.items() ^ model.ledger.items(), set())
    verdict.equal("the dropped ids, beside what the manifests say", dropped, model.dropped)
    events: list[Any] = connection.xrange(keys.EVENTS)  # type: ignore[assignment]
    told = [int(entry[b"version"]) for _, entry in events if entry.get(b"kind") in (b"update", b"rollback")]
    verdict.equal("versions in the event stream", told, list(range(1, version + 1)))
    statuses = Counter(connection.hget(f"rq:job:{job_id}", "status") for job_id in ids)
    verdict.equal("states of the jobs", dict(statuses), {b"finished": transcripts})
    kinds = {manifest.get("kind") for manifest in manifests.values()}
    verdict.equal("other kinds of versions", kinds - {"update", "rollback"}, set())
    kept = [int(key.rsplit(b":")[-1]) for key in connection.scan_iter("weights:manifest:*")]
    last = max((v for v, manifest in manifests.items() if manifest["kind"] == "update"), default=0)
    verdict.equal("manifests beyond the history", [v for v in sorted(kept) if v < last - HISTORY], [])
    return model


def _plain(batches: Sequence[Batch]) -> set[str]:
    return {id.removeprefix(PREFIX) for batch in batches for id in ids_of(batch)}


def _check_journal(folder: Path, manifests: Mapping[int, Mapping[str, Any]], verdict: Verdict) -> None:
    """The versions that the journal still has (checkpoints let go of the oldest) are the manifests'."""
    found: dict[int, tuple[str, list[str]]] = {}
    for file in sorted(folder.glob("*.journal")):
        for _, record in record_file.scan(file, last=False).records:
            if record["kind"] == "void":
                found.pop(record["version"], None)
            elif record["kind"] in ("update", "rollback", "lineage"):
                found[record["version"]] = (record["kind"], list(record.get("ids", [])))
    found.pop(0, None)
    verdict.figures["versions in the journal"] = len(found)
    verdict.equal("the newest version in the journal", max(found, default=0), len(manifests))
    differ = [v for v, what in found.items() if what != (manifests[v]["kind"], manifests[v]["jobs"])]
    verdict.equal("versions that the journal has otherwise", differ, [])


# The weights

Digest = dict[str, Any]


def _undisturbed(cluster: Cluster, model: Model) -> Digest:
    """What the model's batches make of a fresh stand-in, trained in their order, with nothing killed."""
    quiet = cluster.folder / "quiet"
    work = {"live": model.live, "rollbacks": {version: model.batches[version] for version in model.rollbacks}}
    (cluster.folder / "undisturbed.json").write_text(json.dumps(work))
    server = StandIn(cluster.model, quiet, cluster.folder / "quiet.log")
    try:
        arguments = (str(quiet), str(cluster.folder / "undisturbed.json"))
        return _in_process(_replay, arguments, cluster.folder / "digest-quiet.json")
    finally:
        server.kill()


def live_digest(cluster: Cluster) -> Digest:
    """Of the weights that the cluster's server has now."""
    return _in_process(_digest_of, (str(cluster.run_dir),), cluster.folder / "digest-live.json")


def _in_process(function: Any, arguments: tuple[Any, ...], answer: Path) -> Digest:
    """`function(*arguments, answer)` in a process that ends with it, and what it wrote there."""
    answer.unlink(missing_ok=True)
    process = Forked(function, (*arguments, str(answer)), {}, answer.with_suffix(".log"))
    assert process.ended(1800) == 0, process.said()[-3000:]
    digest: Digest = json.loads(answer.read_text())
    return digest


def _digest_of(run_dir: str, answer: str) -> None:
    from worker.shared_weights.attach import attach

    Path(answer).write_text(json.dumps(_digest(attach(Path(run_dir)))))


def _digest(weights: Any) -> Digest:
    """SHA-256 of all tensors, by name, and of the optimizer's area."""
    import torch

    total = hashlib.sha256()
    for name, tensor in weights.named_tensors():
        total.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return {"weights": total.hexdigest(), "state": hashlib.sha256(weights.state.numpy().tobytes()).hexdigest()}


def _replay(run_dir: str, work_file: str, answer: str) -> None:
    """Train the batches of `work_file` into the server of `run_dir`: rollbacks first, what is live last."""
    from worker.checkpoint.replay import digest

    work = json.loads(Path(work_file).read_text())
    with undisturbed(Path(run_dir)) as run:
        rollbacks = {}
        for version, batches in work["rollbacks"].items():
            run.go_to(batches)
            rollbacks[version] = digest(run.weights.tensors)
        run.go_to(work["live"])
        Path(answer).write_text(json.dumps(_digest(run.weights) | {"rollbacks": rollbacks}))
