"""Charges a budget with what versions take from serving, as this trainer and the server measure it.

    standing still   from the acknowledged pause until the server goes on, where requests stood still with it
    computing        what gradients (or a canary's scores) take beside running requests: on a GPU the seconds that the
                     device needs for them (`worker.trainer.device_time`), at most those that pass; on a CPU this
                     process' CPU time over the cores, since waiting for a core takes nothing
    recomputing      with --running recompute: the time until the last request that was thrown back goes on
    lost prefixes    what the device needs for tokens of later prompts that would have been found cached, had no update
                     made them too old (`--prefix-max-age`), as the server estimates them

On a server without requests nothing is taken, and nothing is charged. Nor is the wait for the pause: until it is
acknowledged the server ends the step that it is in, and its requests get their tokens.
Invariant: how many requests run is what the server says, asked before and after.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from worker.orchestrator.session import Session
from worker.trainer.device_time import DeviceTime
from worker.utils.serving_budget import ServingBudget


class ServingCost:
    """Of the versions of one session, in `budget`."""

    def __init__(self, session: Session, budget: ServingBudget) -> None:
        self.session, self.budget = session, budget
        self.requests = 0
        """The most requests that were seen running beside the present version."""
        self._recomputed: float | None = None
        self._lost: int | None = None

    def begin(self) -> None:
        """A version begins. Raises `UnavailableError` when the server has gone."""
        self.look()  # what is known only now was taken by the last one
        self.requests = 0
        self.budget.begin()

    def look(self) -> int:
        """How many requests run; charges what recomputing and lost prefixes have taken since the last look. Raises
        `UnavailableError` when the server has gone."""
        state = self.session.check()
        recomputed, running = float(state["recomputed_s"]), int(state["running"])
        lost = int(state["lost_prefix_tokens"])
        if self._recomputed is not None and self._lost is not None:
            self.budget.charge(recomputed - self._recomputed)
            self.budget.charge((lost - self._lost) * self.session.trainer.device_time.prompt_token_s)
        self._recomputed, self._lost = recomputed, lost
        self.requests = max(self.requests, running)
        return running

    def _clock(self) -> float:
        """Seconds of the device that this process may have taken, and only growing; other ranks of a divided trainer
        take as much."""
        if self.session.trainer.device.type == "cpu":
            return time.process_time() * self.session.weights.rank_count / len(os.sched_getaffinity(0))
        return time.monotonic()

    @contextmanager
    def computing(self, needed: DeviceTime | None = None) -> Iterator[None]:
        """What runs inside computes while the server serves. A pause inside does not count. needed: of what runs
        inside, if that is all of it; a CPU's learns here what it took."""
        control, running = self.session.control, self.look()
        started, paused = self._clock(), control.paused_s
        try:
            yield
            running = max(running, self.look())
        finally:
            passed = self._clock() - started - (control.paused_s - paused)
            if needed is not None and self.session.trainer.device.type == "cpu":
                needed.took(passed)
            if running:
                self.budget.charge(passed if needed is None else min(passed, needed.seconds()))

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """What runs inside pauses the server and lets it go on."""
        before = self.session.control.stood_s
        try:
            yield
        finally:
            self.budget.charge(self.session.control.stood_s - before)

    def take(self) -> dict[str, float]:
        """What the version's manifest says: `serving_cost_s`, all that was charged since the last one's (also what the
        versions before took, and was known only later), and how many requests were seen running."""
        return {"serving_cost_s": self.budget.take(), "running_requests": self.requests}
