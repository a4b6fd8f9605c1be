"""After a campaign: was anything lost, trained twice or torn, and are the weights what an undisturbed run gives?

Everything is read back from Redis, from the header and from the weights themselves. The undisturbed run is a fresh
stand-in that the batches of Redis' manifests are trained into, in their order, with nothing killed.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from chaos_campaign import transcript
from chaos_processes import Cluster, Forked, StandIn

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


def audit(cluster: Cluster, transcripts: int) -> Verdict:
    """All checks; the server must run and no worker."""
    verdict = Verdict()
    batches = check_books(cluster.redis, transcripts, verdict)
    header = cluster.header()
    known = ledger.state(cluster.redis)
    expected = {
        "lineage": known.lineage,
        "version": known.version,
        "state": "CLEAN",
        "fence": (header or {}).get("fence"),
    }
    verdict.equal("the header beside the weights", header, expected)
    live, replayed = _digests(cluster, batches)
    _check_journal(cluster.folder / "state" / "journal", batches, verdict)
    verdict.figures["weights"] = live["weights"][:16]
    verdict.equal("the weights, against an undisturbed run of the same batches", live["weights"], replayed["weights"])
    verdict.equal("the optimizer's state, against the same", live["state"], replayed["state"])
    verdict.equal("the undisturbed run's number of versions", replayed["steps"], len(batches))
    return verdict


def check_books(connection: redis.Redis, transcripts: int, verdict: Verdict) -> list[list[str]]:
    """Ledger, manifests, events and jobs against each other; the batches that are in the weights, in their order."""
    ids = {f"t{index}" for index in range(transcripts)}
    raw: dict[bytes, bytes] = connection.hgetall(keys.LEDGER)  # type: ignore[assignment]
    trained = {key.decode(): int(value) for key, value in raw.items()}
    version = ledger.state(connection).version
    manifests = {v: ledger.manifest(connection, v) for v in range(1, version + 1)}
    jobs = {v: json.loads(manifest.get("jobs", "[]")) for v, manifest in manifests.items()}
    times = Counter(job_id for batch in jobs.values() for job_id in batch)
    twice = sorted(job_id for job_id, count in times.items() if count > 1)
    verdict.figures |= {"transcripts": transcripts, "versions": version, "lost": len(ids - trained.keys())}
    verdict.figures["trained twice"] = len(twice)
    verdict.equal("transcripts not in the ledger", sorted(ids - trained.keys()), [])
    verdict.equal("ids in the ledger that nobody sent", sorted(trained.keys() - ids), [])
    verdict.equal("transcripts in two manifests", twice, [])
    verdict.equal("versions without a manifest", [v for v, manifest in manifests.items() if not manifest], [])
    by_manifest = {job_id: v for v, batch in jobs.items() for job_id in batch}
    verdict.equal("ledger entries that no manifest agrees with", trained.items() - by_manifest.items(), set())
    events: list[Any] = connection.xrange(keys.EVENTS)  # type: ignore[assignment]
    told = [int(entry[b"version"]) for _, entry in events if b"version" in entry and b"kind" in entry]
    verdict.equal("versions in the event stream", told, list(range(1, version + 1)))
    statuses = Counter(connection.hget(f"rq:job:{job_id}", "status") for job_id in ids)
    verdict.equal("states of the jobs", dict(statuses), {b"finished": transcripts})
    kinds = Counter(manifest.get("kind") for manifest in manifests.values())
    verdict.equal("kinds of versions", dict(kinds), {"update": version})
    return list(jobs.values())


def _check_journal(folder: Path, batches: list[list[str]], verdict: Verdict) -> None:
    """The versions that the journal still has (checkpoints let go of the oldest) are the manifests' batches."""
    found: dict[int, list[str]] = {}
    for file in sorted(folder.glob("*.journal")):
        for _, record in record_file.scan(file, last=False).records:
            if record["kind"] == "void":
                found.pop(record["version"], None)
            elif record["kind"] in ("update", "rollback", "lineage"):
                found[record["version"]] = list(record.get("ids", []))
    verdict.figures["versions in the journal"] = len(found)
    verdict.equal("the newest version in the journal", max(found, default=0), len(batches))
    differ = [version for version, ids in found.items() if version and ids != batches[version - 1]]
    verdict.equal("versions that the journal has otherwise", differ, [])


# The weights

Digest = dict[str, Any]


def _digests(cluster: Cluster, batches: list[list[str]]) -> tuple[Digest, Digest]:
    """Of the weights that are live, and of those that `batches` make of a fresh stand-in."""
    live = live_digest(cluster)
    quiet = cluster.folder / "quiet"
    server = StandIn(cluster.model, quiet, cluster.folder / "quiet.log")
    try:
        return live, _in_process(_replay, (str(quiet), batches), cluster.folder / "digest-quiet.json")
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


def _replay(run_dir: str, batches: list[list[str]], answer: str) -> None:
    """Train `batches` into the server of `run_dir`, one version each, by the update protocol without a queue."""
    import torch
    from chaos_processes import LEARNING

    from producer import Transcript
    from worker.config.hyperparameters import Hyperparameters
    from worker.orchestrator.worker_loop import attach_step

    torch.set_num_threads(1)
    options = dict(zip(LEARNING[::2], LEARNING[1::2], strict=True))
    h = Hyperparameters(lr=float(options["--lr"]), max_length=int(options["--max-length"]))
    with attach_step(Path(run_dir), "undisturbed", h, state_dir=Path(run_dir) / "state") as step:
        for batch in batches:
            maps = [transcript(int(job_id[1:])) for job_id in batch]
            update = step.run([step.prepare(item["id"], Transcript.from_dict(item)) for item in maps])
            assert list(update.results) == batch, update.rejected
        digest = _digest(step.weights) | {"steps": step.weights.header.version}
    Path(answer).write_text(json.dumps(digest))
