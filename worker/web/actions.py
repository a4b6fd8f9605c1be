"""What an operator may do from the page: pause, resume, requeue a failed job, roll back. Each asks before it does.

Must not know: torch, vLLM.
Invariants: every route here, the question too, is refused unless the dashboard was started with --allow-actions;
nothing is done but by a POST with the token of that very action; it is done by the code that the command runs.
"""

from typing import Any

from flask import Blueprint, abort, redirect, request, url_for
from werkzeug.wrappers import Response

from producer.connection import redis_errors
from producer.errors import TandemError
from worker.operations import job_story
from worker.versions import ledger, pause_switch
from worker.web.protection import READ_ONLY
from worker.web.rollback_child import obstacles
from worker.web.site import site
from worker.web.views import page, trouble

blueprint = Blueprint("actions", __name__, url_prefix="/learning/actions")
blueprint.register_error_handler(TandemError, trouble)
MAX_REASON = 200


@blueprint.before_request
def only_where_allowed() -> None:
    """403, in one sentence; and 403 for a form that this process did not make."""
    if not site().allow_actions:
        abort(403, READ_ONLY)
    if request.method == "POST":
        site().tokens.check(request.path, request.form.get("token", ""))


def ask(title: str, what: str, button: str, **values: Any) -> str:
    """The page that asks before the POST to its own address."""
    token = site().tokens.of(request.path)
    return page("confirm", title, live=False, what=what, button=button, token=token, **values)


@blueprint.get("/pause")
def ask_pause() -> str:
    return ask(
        "Pause training",
        "The worker ends the batch in hand and trains no other until training is resumed. The server goes on serving,"
        " and jobs wait in the queue.",
        "Pause training",
        field="reason",
    )


@blueprint.post("/pause")
def pause() -> Response:
    reason = " ".join(request.form.get("reason", "").split())[:MAX_REASON] or "paused from the dashboard"
    with redis_errors(site().where):
        pause_switch.pause(site().connection, reason)
    return redirect(url_for("learning.overview", done="paused"), 303)


@blueprint.get("/resume")
def ask_resume() -> str:
    with redis_errors(site().where):
        reason = pause_switch.pause_reason(site().connection)
    why = f"Training is paused: {reason}." if reason is not None else "Training is not paused."
    return ask("Resume training", f"{why} The worker takes the next batch at once.", "Resume training")


@blueprint.post("/resume")
def resume() -> Response:
    with redis_errors(site().where):
        reason = pause_switch.resume(site().connection)
    return redirect(url_for("learning.overview", done="not-paused" if reason is None else "resumed"), 303)


@blueprint.get("/requeue/<job_id>")
def ask_requeue(job_id: str) -> str:
    return ask(
        "Queue this job again",
        f"Job {job_id} has failed. It goes to the end of the queue and is tried once more.",
        "Queue it again",
        back=url_for("learning.job", job_id=job_id),
    )


@blueprint.post("/requeue/<job_id>")
def requeue(job_id: str) -> Response:
    with redis_errors(site().where):
        done = "requeued" if job_story.requeue(site().connection, job_id) else "not-failed"
    return redirect(url_for("learning.job", job_id=job_id, done=done), 303)


@blueprint.get("/rollback")
def choose_rollback() -> Response:
    """From a form that names the version."""
    target = request.args.get("version", type=int)
    if target is None or target < 0:
        abort(400, "name the version to go back to: a whole number from 0")
    return redirect(url_for("actions.ask_rollback", target=target))


@blueprint.get("/rollback/<int:target>")
def ask_rollback(target: int) -> str:
    with redis_errors(site().where):
        live = ledger.state(site().connection).version
    if not target < live:
        abort(400, f"version {target} is not older than the live one, {live}: there is nothing to go back to")
    return ask(
        f"Go back to version {target}",
        f"Version {live + 1} will be version {target} again: the weights are made from a checkpoint and the journal,"
        f" and the server answers nobody while they are written. The {live - target:,} versions after {target} are no"
        " longer in the weights. Their transcripts are not trained again unless they are queued again. Start the"
        " worker afterwards.",
        f"Go back to version {target}",
        choice="Queue the transcripts of later versions again",
        in_the_way=obstacles(site().status()),
        command=site().rollbacks.command(target),
    )


@blueprint.post("/rollback/<int:target>")
def rollback(target: int) -> Response:
    if obstacles(site().status()):  # it has changed since the page asked
        return redirect(url_for("actions.ask_rollback", target=target), 303)
    started = site().rollbacks.start(target, requeue="choice" in request.form)
    return redirect(url_for("actions.progress", done=None if started else "running"), 303)


@blueprint.get("/rollback/progress")
def progress() -> str:
    """What the last rollback from here says."""
    return page("rollback", "Rollback", progress=site().rollbacks.progress())
