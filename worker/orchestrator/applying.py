"""The writing half of an update: pause, record, APPLYING, write, CLEAN, resume.

    burst, factors, streaming: pause -> record -> APPLYING -> write -> CLEAN, version + 1 -> resume
    hogwild:          record -> APPLYING -> write -> CLEAN, version + 1 -> pause -> resume

Invariants: the record is complete before the header says APPLYING, so a restarted worker that finds CLEAN and that
version can commit it. The header says APPLYING from before the first write until after the last. Whatever goes wrong
before the first write leaves the header CLEAN, the version unchanged and the server running. Whatever goes wrong after
it ends the worker: as `TornWeightsError` while the header says APPLYING (the server answers 503 with the reason, and
the next start makes the weights again), as `UnavailableError` once it is CLEAN (the next start commits the version).
"""

import time

from producer.errors import TandemError
from worker.apollo import NonFiniteGradientError
from worker.config.protocol import TornWeightsError, UnavailableError, Update
from worker.orchestrator.session import Session
from worker.shared_weights.header import LeaseLostError
from worker.utils.fault_injection import point

BACKWARD = 3.0
"""How many times as long as the forward pass a streamed write takes: its backward pass, with layers computed anew."""


class Others:
    """What is done at the borders of an update together with other replicas: here nothing."""

    def standing_still(self) -> None:
        """Our server stands still, and the header says CLEAN. Raises `GroupLostError`."""

    def begun(self) -> None:
        """The header says APPLYING: from here on the version will be made, now or by the next start."""

    def written(self) -> None:
        """The header says CLEAN, with the new version; our server still stands still."""


NOBODY: Others = Others()


def apply_update(session: Session, update: Update, others: Others = NOBODY) -> dict[str, float]:
    """Make `update`, which is journaled, the live version from what `Trainer.begin` left; what was measured.

    For the main thread, with signals deferred. Raises as the invariants say; `NonFiniteGradientError` when a burst met
    one, with nothing changed and the journal's entry voided.
    """
    header, hogwild = session.weights.header, session.settings.hogwild
    before, version = header.version, update.version
    assert version is not None
    asked = time.monotonic()
    _take_lease(session, version, BACKWARD * float(update.manifest.get("forward_s", 0.0)))
    leased = time.monotonic()
    point("paused")
    try:
        session.weights.record.write(update.record().plain())
        others.standing_still()
        header.begin(session.control.fence)
        point("applying")
        others.begun()
        measured = _write(session, version)
    except TornWeightsError:
        raise
    except LeaseLostError as error:
        session.manager.void(version)
        raise UnavailableError(str(error)) from error
    except BaseException:  # nothing was written
        session.manager.void(version)
        _end_lease(session, before)
        raise
    point("applied")
    written = time.monotonic()
    others.written()
    paused = _end_lease(session, version)
    point("resumed")
    done = time.monotonic()
    waited = {"wait_for_pause_s": paused - written, "pause_s": done - paused}
    if not hogwild:
        waited = {"wait_for_pause_s": leased - asked, "pause_s": done - leased}
    return measured | _measured(session, version) | {"sweep_s": written - leased} | waited


def _take_lease(session: Session, version: int, at_least: float) -> None:
    """The server is paused, or knows that it will be written to while it serves; in both cases it watches us. at_least:
    seconds that the write takes, by what is known before."""
    try:
        if session.settings.hogwild:
            session.control.begin_hogwild(at_least=at_least)
        else:
            session.control.pause(at_least=at_least)
    except TandemError as error:
        session.manager.void(version)
        raise UnavailableError(f"the server could not be paused: {error}") from error


def _write(session: Session, version: int) -> dict[str, float]:
    """All writes of the update and their end awaited, then CLEAN; CLEAN without a write if a burst was refused."""
    trainer, started = session.trainer, time.monotonic()
    try:
        trainer.write()
        trainer.optimizer.check()  # on CUDA a refused gradient is known only once the device has answered
        session.weights.header.finish(version)
    except NonFiniteGradientError as error:
        if trainer.begun == "burst":
            session.weights.header.abandon()
            raise
        session.manager.void(version)  # it must not be tried again when the weights are restored
        raise TornWeightsError(
            f"{error}, and a part of version {version} was written already: the weights are torn, and the server"
            " refuses requests; start the worker again, which restores them"
        ) from error
    except BaseException as error:
        raise TornWeightsError(
            f"the update to version {version} broke off while it was written: {error}; the weights are torn: start"
            " the worker again, which restores them"
        ) from error
    return {"backward_s": time.monotonic() - started} if trainer.begun == "streaming" else {}


def _measured(session: Session, version: int) -> dict[str, float]:
    """What the trainer says of its write, asked when the server has gone on."""
    try:
        return session.trainer.measured()
    except Exception as error:
        raise UnavailableError(
            f"version {version} is live, but the trainer cannot go on from it ({error}): start the worker again, which"
            " commits the version"
        ) from error


def _end_lease(session: Session, version: int) -> float:
    """Let the server go on under `version`; time.monotonic() of when it stood still, at the latest."""
    try:
        if session.settings.hogwild:
            session.control.pause()  # what was computed with weights of two versions stays with those that have it
        paused = time.monotonic()
        session.control.resume(version)
        return paused
    except TandemError as error:
        # The header is CLEAN: the server resumes by itself when our connection ends, and the record is committed
        # at the next start.
        raise UnavailableError(f"the server could not be resumed at version {version}: {error}") from error
