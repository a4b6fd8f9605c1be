"""What a recovery or a rollback did: facts, one dataclass for each kind, and `sentence`, which shows them.

Only what logs or prints calls `sentence`; everybody else passes the facts on.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from worker.checkpoint.checkpoint_writer import NotWritten, Written
from worker.checkpoint.journal import TornTail
from worker.checkpoint.rebuild import Compared, Rebuilt
from worker.checkpoint.snapshots import HalfRemoved, NoFiles
from worker.config.guard_options import CANARY

log = logging.getLogger("tandem")

Report = Any
"""Any of the dataclasses that `sentence` knows."""


@dataclass(frozen=True)
class NotApplied:
    """`version` was journaled, and the weights never got it."""

    version: int


@dataclass(frozen=True)
class Lost:
    """The server's weights are torn, or those of `version` of `lineage`; `wanted` is to be made again."""

    torn: bool
    version: int
    lineage: str
    wanted: int


@dataclass(frozen=True)
class LeftOut:
    """`version` cannot be made again: its gradient is not finite."""

    version: int


@dataclass(frozen=True)
class Live:
    """The server serves `version` of `lineage`."""

    version: int
    lineage: str


@dataclass(frozen=True)
class CommittedAgain:
    """Redis did not know the versions from `first` to `last`, with so many jobs, and knows them now."""

    first: int
    last: int
    jobs: int


@dataclass(frozen=True)
class Refilled:
    """Redis stood at version `before` (0: it was empty) and was given `version`, with so many trained ids."""

    before: int
    version: int
    lineage: str
    ids: int


@dataclass(frozen=True)
class RolledBack:
    """`version` is `target` again, without `dropped`. abandoned: ids of the versions that are no longer in the weights;
    requeued: those of them that are queued again; retaken: ids that were taken out of the ledger and are back in."""

    version: int
    target: int
    dropped: tuple[str, ...]
    versions: int
    abandoned: int
    requeued: int
    retaken: int


@dataclass(frozen=True)
class CanaryScored:
    """The loss of the canary set `name` at `version`, in nats per trained token, and the highest one that passes; None:
    it is only watched."""

    version: int
    loss: float
    bound: float | None
    name: str = CANARY


@dataclass(frozen=True)
class CanaryFailed:
    """It did not pass, and training is paused. target: the version to go back to, if that was asked and there is one;
    made: the version that holds it now; problem: why there is none."""

    version: int
    loss: float
    bound: float
    target: int | None = None
    made: int | None = None
    problem: str = ""
    name: str = CANARY


@dataclass(frozen=True)
class CanaryNotScored:
    """Scoring it at `version` broke off, and training is paused. kind: the exception's type."""

    version: int
    kind: str


@dataclass(frozen=True)
class NothingPassed:
    """No version passed the canary before: there is none to go back to."""


Tell = Callable[[Report], None]
"""Is given what was done."""


def log_report(report: Report) -> None:
    """One line of the log."""
    held = isinstance(report, CanaryFailed | CanaryNotScored)
    log.log(logging.ERROR if held else logging.INFO, "%s%s", "training is paused: " if held else "", sentence(report))


def _called(name: str) -> str:
    return "canary set" if name == CANARY else f"canary set {name}"


@singledispatch
def sentence(report: Report) -> str:
    """`report`, as one is told of it."""
    raise TypeError(f"no sentence for a {type(report).__name__}")


@sentence.register
def _(report: TornTail) -> str:
    return f"journal {report.path.name}: cut {report.cut} bytes that a crash left of an unfinished record"


@sentence.register
def _(report: HalfRemoved) -> str:
    return f"removed the half-written checkpoint {report.path.name}; the ones before it are untouched"


@sentence.register
def _(report: NoFiles) -> str:
    return (
        f"the server's weights came from no files (load_format dummy): {report.source} has no *.safetensors. There are"
        " no checkpoints, and torn or lost weights cannot be restored; the journal is kept"
    )


@sentence.register
def _(report: Written) -> str:
    return f"checkpoint of version {report.version} written in {report.seconds:.1f} s: {report.path}"


@sentence.register
def _(report: NotWritten) -> str:
    return report.reason


@sentence.register
def _(report: NotApplied) -> str:
    return f"version {report.version} was journaled and not applied: nothing to undo"


@sentence.register
def _(report: Lost) -> str:
    found = f"those of version {report.version}, lineage {report.lineage}"
    if report.torn:
        found = "torn: a worker died while writing them"
    return f"the server's weights are {found}; version {report.wanted} is to be made again"


@sentence.register
def _(report: LeftOut) -> str:
    return f"version {report.version} has a gradient that is not finite: it is left out"


@sentence.register
def _(report: Rebuilt) -> str:
    plan, replayed = report.plan, report.replayed
    parts = [f"{reason}; an older one is taken, with more of the journal" for reason in plan.passed_over]
    source = f"the checkpoint of version {plan.base}" if plan.base else "the source model"
    count = len(plan.steps)
    batches = f" and {count} journaled batch{'' if count == 1 else 'es'}" if count else ""
    parts.append(f"version {plan.version} was made from {source}{batches} in {report.seconds:.1f} s")
    if replayed.changed:
        parts.append(f"replay may not repeat every bit: {'; '.join(replayed.changed)}")
    parts += [f"version {o.version} was repeated with loss {o.now!r}, not {o.then!r}" for o in replayed.losses]
    return ". ".join(parts)


@sentence.register
def _(report: Compared) -> str:
    what = f"the weights of version {report.version} are"
    if report.same:
        return f"{what} bit for bit what they were (digest {report.now})"
    return f"{what} not bit for bit what they were (digest {report.now}, then {report.then})"


@sentence.register
def _(report: Live) -> str:
    return f"version {report.version} of lineage {report.lineage} is live"


@sentence.register
def _(report: CommittedAgain) -> str:
    which = f"versions {report.first} to {report.last} were"
    if report.first == report.last:
        which = f"version {report.first} was"
    return f"{which} in the weights but not in Redis: committed from the journal, with {report.jobs} jobs"


@sentence.register
def _(report: Refilled) -> str:
    was = f"stood at version {report.before}" if report.before else "was empty"
    return (
        f"Redis {was}: version {report.version}, lineage {report.lineage} and the ids of {report.ids} trained"
        " transcripts were written to it again; none will be trained twice. Transcripts that were still queued there"
        " are lost with it, unless their applications send them again"
    )


@sentence.register
def _(report: RolledBack) -> str:
    text = f"version {report.version} is live: it is version {report.target}"
    if report.dropped:
        text += f" without {', '.join(report.dropped)}"
    if report.versions:
        fate = "they stay in the ledger and are not trained again"
        if report.requeued:
            fate = f"{report.requeued} of them are queued again"
        text += f"; {report.abandoned} transcripts of {report.versions} later versions are no longer in the weights,"
        text += f" {fate}"
    if report.retaken:
        text += f"; {report.retaken} transcripts that were queued again are in the weights once more, and in the ledger"
    return text


@sentence.register
def _(report: CanaryScored) -> str:
    bound = "no bound" if report.bound is None else f"bound {report.bound:.4f}"
    return f"{_called(report.name)} at version {report.version}: loss {report.loss:.4f}, {bound}"


@sentence.register
def _(report: CanaryFailed) -> str:
    above = f"{report.loss:.4f}, above {report.bound:.4f}" if math.isfinite(report.loss) else "not finite"
    text = f"the {_called(report.name)}'s loss at version {report.version} is {above}"
    if report.made is not None:
        text += f"; version {report.made} is version {report.target} again"
    elif report.problem:
        text += f"; rolling back to version {report.target} failed: {report.problem}"
    return text


@sentence.register
def _(report: CanaryNotScored) -> str:
    return (
        f"the canary set could not be scored at version {report.version} ({report.kind}, see the worker's log): nobody"
        " knows whether it passes"
    )


@sentence.register
def _(report: NothingPassed) -> str:
    return "no version passed before: there is nothing to roll back to"
