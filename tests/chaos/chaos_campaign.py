"""A campaign: transcripts are sent while worker, server and Redis are killed, as a seed says; then all is drained.

The plan follows from the seed alone, and what is done is noted in the folder, so that a campaign can be broken off and
gone on with. Whether nothing was lost, trained twice or torn is judged afterwards by chaos_audit.py.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from chaos_processes import Cluster, Forked
from patience import TimedOut, until

from producer import Producer, keys
from producer.errors import TandemError
from worker.utils.fault_injection import CHECKPOINT_POINTS, POINTS, RECOVERY_POINTS
from worker.versions import ledger

MAX_JOBS = 4
"""Transcripts a version: small, so that there are many versions to be killed in."""
OPTIONS = ("--max-jobs", str(MAX_JOBS), "--linger", "0.02", "--checkpoint-every", "16", "--outliers", "0")
WORDS = ("red", "green", "blue", "one", "two", "three", "night", "day", "sun", "moon", "up", "down")
QUEUE = f"rq:queue:{keys.QUEUE}"


@dataclass(frozen=True)
class Kill:
    """what: worker | server | redis, or two of them with +. point: where the worker dies (on its pass number `count`;
    before a point of the recovery another dies in an update, so that there is something to recover); without one,
    `delay` seconds after the worker started ("worker") or was ready. pause: how long Redis stays away."""

    what: str
    point: str | None = None
    count: int = 1
    delay: float = 0.0
    pause: float = 0.0

    def __str__(self) -> str:
        return f"{self.what} at {self.point}:{self.count}" if self.point else f"{self.what} after {self.delay:.2f} s"


def plan(seed: int, kills: int) -> list[Kill]:
    """Which kills, in which order: seven in ten at the named points, each of these equally often."""
    dice = random.Random(seed)
    timed = ["worker", "server", "redis", "worker", "redis+worker", "worker", "server+worker"]
    at_points = [POINTS[i % len(POINTS)] for i in range(kills * 7 // 10)]
    planned = []
    for i, point in enumerate(at_points):
        what = "worker+server" if i // len(POINTS) % 4 == 3 else "worker"
        count = 1 if point in RECOVERY_POINTS else dice.choice((1, 1, 2, 3))
        planned.append(Kill(what, point, count))
    for i in range(kills - len(planned)):
        planned.append(Kill(timed[i % len(timed)], delay=dice.uniform(0, 1.5), pause=dice.uniform(0, 0.6)))
    dice.shuffle(planned)
    return planned


def transcript(index: int) -> dict[str, Any]:
    """Transcript `index`: one to three turns whose words follow from the index."""
    dice = random.Random(index)

    def say(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(dice.choices(WORDS, k=dice.randint(2, 12)))}

    turns = [say(role) for _ in range(dice.randint(1, 3)) for role in ("user", "assistant")]
    return {"id": f"t{index}", "messages": turns, "weight": dice.choice((1.0, 1.0, 0.5))}


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
    """`kills` on `transcripts` in `cluster`. `notes` counts what happened besides."""

    def __init__(self, cluster: Cluster, *, seed: int, kills: int, transcripts: int) -> None:
        self.cluster, self.transcripts = cluster, transcripts
        self.plan = plan(seed, kills)
        self.notes: Counter[str] = Counter()
        self._done_file = cluster.folder / "kills.jsonl"
        self.done = len(self._done_file.read_text().splitlines()) if self._done_file.exists() else 0

    def run(self, tell: Callable[[int, str], None] = lambda done, what: None) -> None:
        """Every kill that is left of the plan, then the rest of the queue in peace."""
        sender = Sender(self.cluster.store.url, self.transcripts)
        try:
            for number in range(self.done, len(self.plan)):
                kill = self.plan[number]
                tell(number, str(kill))
                sender.allowed = max(sender.allowed, self.transcripts * (number + 1) // len(self.plan))
                self._fill(sender, kill.count)
                self._execute(kill)
                self._note(number, kill)
            tell(len(self.plan), "draining")
            sender.allowed = self.transcripts
            until(lambda: sender.sent == self.transcripts, "the last transcripts to be sent")
        finally:
            sender.close()
        self._drain()

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
        header = self.cluster.header()
        if header is not None and header["state"] != "CLEAN":
            self.notes["found torn weights"] += 1
        elif header is not None and header["version"] == 0 and ledger.state(self.cluster.redis).version:
            self.notes["found a server that had lost what it learnt"] += 1
        return self.cluster.start_worker(*options, fault=fault)

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

    # The end

    def _drain(self) -> None:
        """Train what is left. Transcripts that failed because their worker died too often are requeued, and counted."""
        for _ in range(20):
            worker = self.start()
            until(lambda w=worker: self._idle() or not w.alive(), "the queue to be drained", timeout=1200)
            self._check_alive(worker)
            self.cluster.kill_worker()
            if not self._requeue():
                return
        raise AssertionError("the queue is not drained after 20 workers")

    def _idle(self) -> bool:
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

    def _note(self, number: int, kill: Kill) -> None:
        with self._done_file.open("a") as file:
            file.write(json.dumps({"number": number, "kill": str(kill), "notes": dict(self.notes)}) + "\n")
        self.done = number + 1


def kills_by_kind(planned: list[Kill]) -> Iterator[tuple[str, int]]:
    """(kind, how many), for the report."""
    yield from sorted(Counter(f"{kill.what} at {kill.point}" if kill.point else kill.what for kill in planned).items())
