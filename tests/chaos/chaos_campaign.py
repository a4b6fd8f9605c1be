"""A campaign: transcripts are sent while worker, server and Redis are killed and versions rolled back, as a seed says;
then all is drained.

What is done is noted in the folder, so that a campaign can be broken off and gone on with. Manifests are noted too:
Redis keeps those of the history alone. Whether nothing was lost, trained twice or torn is judged by chaos_audit.py.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from chaos_plan import MAX_JOBS, CanaryFails, Kill, Operation, Rollback, conversation, operations, transcript
from chaos_processes import Cluster, Forked
from patience import TimedOut, until

from producer import Producer, keys
from producer.errors import TandemError
from worker.orchestrator.canary import GOOD
from worker.utils.fault_injection import CHECKPOINT_POINTS, RECOVERY_POINTS
from worker.versions import ledger, pause_switch

QUEUE = f"rq:queue:{keys.QUEUE}"
LEAST = 3
"""Versions there are before one is rolled back."""
WATCHED = 4
"""Conversations of the canary set."""


class Sender:
    """Sends transcripts from a thread, up to `allowed` of them, again and again until Redis has said it has them."""

    def __init__(self, url: str, count: int) -> None:
        self.count, self.allowed, self.sent = count, 0, 0
        self._producer = Producer(url)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            upto = min(self.allowed, self.count, self.sent + 20)
            if self.sent >= upto:
                time.sleep(0.01)
                continue
            try:
                self._producer.enqueue_many([transcript(i) for i in range(self.sent, upto)])
                self.sent = upto
            except TandemError:
                time.sleep(0.05)  # Redis is away: the same ids again

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._producer.close()


class Campaign:
    """`kills` on `transcripts` in `cluster`, and what `operations` adds. `notes` counts what happened besides."""

    def __init__(self, cluster: Cluster, *, seed: int, kills: int, transcripts: int) -> None:
        self.cluster, self.transcripts = cluster, transcripts
        self.plan = operations(seed, kills)
        self._dice = random.Random(f"{seed}/replicas")
        self.notes: Counter[str] = Counter()
        self.manifests = Manifests(cluster)
        self._done_file = cluster.folder / "kills.jsonl"
        self.done = len(self._done_file.read_text().splitlines()) if self._done_file.exists() else 0
        canary = cluster.folder / "canary.jsonl"
        canary.write_text("".join(json.dumps(conversation(10**6 + i)) + "\n" for i in range(WATCHED)))
        self._watch = ("--canary", str(canary), "--canary-every", "7", "--canary-bound", "1000", "--auto-rollback")

    def run(self, tell: Callable[[int, str], None] = lambda done, what: None) -> None:
        """Every operation that is left of the plan, then the rest of the queue in peace."""
        sender = Sender(self.cluster.store.url, self.transcripts)
        try:
            for number in range(self.done, len(self.plan)):
                operation = self.plan[number]
                tell(number, str(operation))
                sender.allowed = max(sender.allowed, self.transcripts * (number + 1) // len(self.plan))
                self._fill(sender, operation.count if isinstance(operation, Kill) else 1 + LEAST)
                self._do(operation)
                self.manifests.collect()
                self._note(number, operation)
            tell(len(self.plan), "draining")
            sender.allowed = self.transcripts
            until(lambda: sender.sent == self.transcripts, "the last transcripts to be sent")
        finally:
            sender.close()
        self._drain()

    def _do(self, operation: Operation) -> None:
        if isinstance(operation, Rollback):
            self._roll_back(operation)
        elif isinstance(operation, CanaryFails):
            self._fail_the_canary(operation)
        else:
            self._execute(operation)

    def _fill(self, sender: Sender, batches: int) -> None:
        """Let so many more be sent that this kill finds work."""
        wanted = (batches + 1) * MAX_JOBS
        while (queued := self._queued()) < wanted and sender.allowed < self.transcripts:
            sender.allowed = min(sender.allowed + wanted - queued, self.transcripts)
            until(lambda: sender.sent >= sender.allowed, "transcripts to be sent")

    def _queued(self) -> int:
        return int(self.cluster.redis.llen(QUEUE))  # type: ignore[arg-type]

    # One kill

    def _execute(self, kill: Kill) -> None:
        cluster = self.cluster
        if kill.point:
            if kill.point in RECOVERY_POINTS:
                self._ended(self.start(fault="swept"))
            worker = self._doomed(kill.point, kill.count)
            code = self._ended(worker)
            self.notes["killed at its point" if code == -9 else f"point not reached, exit code {code}"] += 1
        elif kill.what == "worker":
            worker = self.start()
            time.sleep(kill.delay)
            cluster.kill_worker()
        else:
            worker = self.running()
            time.sleep(kill.delay)
        for target in kill.what.split("+"):
            if target == "worker":
                cluster.kill_worker()
            elif target == "server":
                cluster.kill_server()
            elif target == "redis":
                cluster.restart_redis(kill.pause)
        if kill.what == "server":
            self._ended(worker)
            self.notes["worker noticed that the server is gone"] += 1
        if kill.what == "redis":
            self._goes_on(worker)

    def _doomed(self, point: str, count: int) -> Forked:
        """A worker that dies at its pass number `count` of `point`; in a checkpoint, at the first one, after `count`
        versions at most."""
        if point in CHECKPOINT_POINTS:
            return self.start("--checkpoint-every", str(count), fault=point)
        return self.start(fault=f"{point}:{count}")

    def start(self, *options: str, fault: str | None = None) -> Forked:
        """A fresh worker, on a fresh server if there is none; the worker that runs is killed. Nothing else is done for
        it: whatever was left behind, it has to mend itself."""
        self.cluster.kill_worker()
        self.cluster.ensure_server()
        if self.cluster.replicas > 1:
            self.notes[self.cluster.ensure_follower(self._dice)] += 1
        header = self.cluster.header()
        if header is not None and header["state"] != "CLEAN":
            self.notes["found torn weights"] += 1
        elif header is not None and header["version"] == 0 and ledger.state(self.cluster.redis).version:
            self.notes["found a server that had lost what it learnt"] += 1
        return self.cluster.start_worker(*self._watch, *options, fault=fault)

    def running(self) -> Forked:
        """A worker that drains: the one that runs, or a fresh one."""
        worker = self.cluster.worker
        if worker is None or not worker.alive():
            worker = self.start()
        until(lambda: "worker ready" in worker.said() or not worker.alive(), "the worker to be ready")
        self._check_alive(worker)
        return worker

    def _check_alive(self, worker: Forked) -> None:
        """No worker may refuse to go on in a campaign: all that is broken here can be mended."""
        if not worker.alive():
            raise AssertionError(f"a worker ended with code {worker.ended()} by itself:\n{worker.said()[-3000:]}")

    def _clear_error(self, worker: Forked, code: int) -> str:
        """The one line that a worker has to end with when nobody killed it."""
        said = worker.said()
        last = said.strip().splitlines()[-1] if said.strip() else ""
        if code != 1 or not last.startswith("error: "):
            raise AssertionError(f"a worker ended with code {code} and no clear error:\n{said[-3000:]}")
        return last

    def _ended(self, worker: Forked) -> int:
        """The end of a worker that must end; one whose point is not reached (an empty queue) is killed."""
        try:
            code = worker.ended(300)
        except TimedOut:
            worker.kill()
            code = -9
            self.notes["never reached its point, killed after 300 s"] += 1
        if code != -9:
            self._clear_error(worker, code)
        return code

    def _goes_on(self, worker: Forked) -> None:
        """After Redis came back the very same worker drains on."""
        version = ledger.state(self.cluster.redis).version

        def on() -> bool:
            return ledger.state(self.cluster.redis).version > version or not self._queued() or not worker.alive()

        until(on, "the worker to go on after Redis came back")
        self._check_alive(worker)
        self.notes["worker went on after Redis came back"] += 1

    # Going back

    def _roll_back(self, what: Rollback) -> None:
        """With the worker stopped, as the command asks for; of a server that may be torn or fresh."""
        if ledger.state(self.cluster.redis).version < LEAST:
            worker = self.start()
            until(lambda: ledger.state(self.cluster.redis).version >= LEAST or not worker.alive(), "some versions", 300)
            self._check_alive(worker)
        self.cluster.kill_worker()
        self.cluster.ensure_server()
        self.manifests.collect()
        now = ledger.state(self.cluster.redis).version
        target = max(now - what.back, 1)
        recent = self.manifests.jobs(now - 2 * what.back, now) - self.manifests.dropped()
        drop = random.Random(what.dice).sample(sorted(recent), min(what.drop, len(recent)))
        arguments = ["rollback", str(target), *(word for id in drop for word in ("--drop", id))]
        process = self.cluster.start_command(*arguments, *(["--requeue"] if what.requeue else []), fault=what.point)
        code = process.ended(300)
        if code == 0:
            self.notes["rolled back"] += 1
        elif code == -9 and what.point:
            self.notes[f"rollback killed at {what.point}"] += 1
        else:
            self.notes[f"rollback refused: {self._clear_error(process, code)[:60]}"] += 1

    def _fail_the_canary(self, what: CanaryFails) -> None:
        """Every version fails from here: the worker holds training, and goes back to the last one that passed."""
        store = self.cluster.redis
        if store.hget(keys.STATE, GOOD) is None:
            worker = self.start("--canary-every", "1")
            until(lambda: store.hget(keys.STATE, GOOD) is not None or not worker.alive(), "a version to pass", 300)
            self._check_alive(worker)
        before = ledger.state(store).version
        worker = self.start("--canary-bound", "0.001", "--canary-every", "1", fault=what.point)

        def over() -> bool:
            if not worker.alive():
                return True
            return pause_switch.pause_reason(store) is not None and self.manifests.went_back_after(before)

        until(over, "the canary to fail", timeout=300)
        if not worker.alive():
            code = worker.ended()
            if code == -9:
                self.notes[f"a failing canary's worker killed at {what.point}"] += 1
            else:
                self.notes[f"canary: {self._clear_error(worker, code)[:60]}"] += 1
        else:
            self.notes["the canary took the weights back"] += 1
        self.cluster.kill_worker()
        pause_switch.resume(store)

    # The end

    def _drain(self) -> None:
        """Train what is left. Transcripts that failed because their worker died too often are requeued, and counted."""
        for _ in range(20):
            worker = self.running()  # ready, so that the server is what it was, also where nothing is left to train
            until(lambda w=worker: self._idle() or not w.alive(), "the queue to be drained", timeout=1200, pace=0.1)
            self.manifests.collect()
            self._check_alive(worker)
            self.cluster.kill_worker()
            if not self._requeue():
                self._settle_replicas()
                return
        raise AssertionError("the queue is not drained after 20 workers")

    def _settle_replicas(self) -> None:
        """The second one, left in peace, is brought to where the first one is."""
        cluster = self.cluster
        if cluster.replicas == 1:
            return
        worker = self.start()
        until(lambda: "train together" in worker.said() or not worker.alive(), "replicas to meet", timeout=300)
        if cluster.follower is not None:
            cluster.follower.kill()
        cluster.ensure_follower(None)

        def same() -> bool:
            ours, theirs = cluster.header(), cluster.header(cluster.other_dir)
            names = ("lineage", "version", "state")
            return ours is not None and theirs is not None and all(ours[name] == theirs[name] for name in names)

        follower = cluster.follower
        assert follower is not None
        until(lambda: not follower.alive() or "is one of" in follower.said(), "replica 1 to be let in", timeout=300)
        until(lambda: same() or not follower.alive(), "replica 1 to be where replica 0 is", timeout=300)
        self._check_alive(follower)
        cluster.kill_worker()

    def _idle(self) -> bool:
        self.manifests.collect()
        pipe = self.cluster.redis.pipeline()
        pipe.llen(QUEUE).llen(f"{QUEUE}:intermediate").zcard(f"rq:wip:{keys.QUEUE}").zcard(f"rq:scheduled:{keys.QUEUE}")
        return sum(pipe.execute()) == 0

    def _requeue(self) -> int:
        failed = [raw.decode() for raw in self.cluster.redis.zrange(f"rq:failed:{keys.QUEUE}", 0, -1)]
        from worker.consumer.jobs import FeedbackJob, open_queue

        queue = open_queue(self.cluster.redis)
        for job_id in failed:
            job = FeedbackJob.fetch(job_id, connection=self.cluster.redis, serializer=queue.serializer)
            job.requeue()
        self.notes["failed after too many deaths, requeued"] += len(failed)
        return len(failed)

    def _note(self, number: int, kill: Operation) -> None:
        with self._done_file.open("a") as file:
            file.write(json.dumps({"number": number, "kill": str(kill), "notes": dict(self.notes)}) + "\n")
        self.done = number + 1


class Manifests:
    """All manifests that Redis ever had, also of versions that lie beyond the history by now."""

    def __init__(self, cluster: Cluster) -> None:
        self.redis, self.file = cluster.redis, cluster.folder / "manifests.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.all: dict[int, dict[str, Any]] = {line["version"]: line for line in map(json.loads, lines)}

    def collect(self) -> None:
        """Note the new ones."""
        now = ledger.state(self.redis).version
        with self.file.open("a") as file:
            for version in range(len(self.all) + 1, now + 1):
                plain: dict[str, Any] = dict(ledger.manifest(self.redis, version))
                assert plain, f"version {version} of {now} has no manifest: Redis trimmed it too early"
                for name in ("jobs", "rehearsed", "dropped", "requeued", "retaken", "abandoned"):
                    plain[name] = json.loads(plain.get(name, "[]"))
                self.all[version] = plain | {"version": version}
                file.write(json.dumps(self.all[version]) + "\n")

    def jobs(self, first: int, last: int) -> set[str]:
        """Who was trained in the versions from `first` to `last`."""
        return {id for version, found in self.all.items() if first <= version <= last for id in found["jobs"]}

    def dropped(self) -> set[str]:
        """Who was ever dropped."""
        return {id for found in self.all.values() for id in found["dropped"]}

    def went_back_after(self, version: int) -> bool:
        """Whether a later one than `version` is a rollback."""
        self.collect()
        return any(found["kind"] == "rollback" for number, found in self.all.items() if number > version)
