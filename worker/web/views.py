"""The view of learning: overview, versions, jobs, each a page made on the server that works without JavaScript.

Must not know: torch, vLLM.
Invariants: reads only; no text of a transcript is on a page, and no id in a title; what Redis holds is escaped.
"""

from typing import Any

from flask import Blueprint, abort, redirect, render_template, request, url_for
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response

from producer.connection import redis_errors
from producer.errors import TandemError
from worker.operations import history, job_story
from worker.versions import evaluations, ledger
from worker.web import curves, texts
from worker.web.charts import draw
from worker.web.evaluated_sets import EvaluatedSet
from worker.web.site import site

blueprint = Blueprint("learning", __name__, url_prefix="/learning", static_folder="static", template_folder="templates")
for _name, _filter in texts.FILTERS.items():
    blueprint.add_app_template_filter(_filter, _name)
blueprint.add_app_template_global(draw, "draw")
blueprint.add_app_template_global(job_story.is_id, "is_id")

COUNTS = (30, 60, 120, 300)
"""How many versions a page may show."""
REFRESH = 5
"""Seconds between two looks of a page that refreshes itself."""
KEPT = ("n", "x", "before")
"""What of a page's address stays when it is asked to refresh itself, or not to."""
DONE = {
    "paused": "Training is paused. The server goes on serving.",
    "resumed": "Training goes on.",
    "not-paused": "Training was not paused.",
    "requeued": "The job is queued again.",
    "not-failed": "Nothing was done: the job is not among the failed ones.",
    "running": "Nothing was done: a rollback is running already.",
}
"""What a page says at its head after an action, by the word in its address."""


def page(template: str, title: str, *, live: bool = True, **values: Any) -> str:
    """One page. live: it refreshes itself, unless its address says ?refresh=off."""
    refresh = REFRESH if live and request.args.get("refresh") != "off" else None
    kept: dict[str, Any] = {name: request.args[name] for name in KEPT if name in request.args}
    kept |= (request.view_args or {}) | {"refresh": "off" if refresh else None}
    switch = url_for(request.endpoint, **kept) if live and request.endpoint else None
    return render_template(
        f"learning/{template}.html", title=title, refresh=refresh, switch=switch, site=site(),
        done=DONE.get(request.args.get("done", "")), **values,
    )  # fmt: skip


@blueprint.get("/")
def overview() -> str:
    """What is live, what is wrong, and how learning goes."""
    times, count = request.args.get("x") == "time", _count()
    found, trouble = site().history(count)
    return page(
        "overview", "Overview", status=site().status(), history=found, trouble=trouble, times=times, count=count,
        counts=COUNTS, charts=curves.charts(found, times=times),
    )  # fmt: skip


@blueprint.get("/versions")
def versions() -> str:
    """The versions, newest first, a page at a time."""
    before, count = request.args.get("before", type=int), _count()
    found, trouble = site().history(count, None if before is None else max(0, before - 1))
    marks, no_marks = site().marks()
    return page(
        "versions", "Versions", history=found, trouble=trouble, count=count,
        marks=None if no_marks else marks, no_marks=no_marks,
        older=found.versions[-1].number if found.versions and found.versions[-1].number > 1 else None, before=before,
    )  # fmt: skip


@blueprint.get("/versions/<int:number>")
def version(number: int) -> str:
    """All that is known of one version."""
    found = _around(number)
    if found is None:
        abort(404, f"Redis knows nothing of version {number}: it does not exist, or lies further back than is kept")
    looks = [one for one in found.happenings if one.kind == "canary" and one.version == number]
    marks, _ = site().marks()
    return page(
        "version", f"Version {number}", version=found.versions[0], history=found, mark=marks.get(number), looks=looks
    )


def _around(number: int) -> history.History | None:
    """The history whose only version is `number`, where Redis knows it."""
    with redis_errors(site().where):
        found = history.read(site().connection, 1, number) if number < 2**53 else history.History()
    return found if found.versions and found.versions[0].number == number else None


@blueprint.get("/evaluations")
def evaluated() -> str:
    """What `tandem eval` found of named sets, by version."""
    with redis_errors(site().where):
        live = ledger.state(site().connection)
        named = [evaluations.of_set(site().connection, name) for name in evaluations.names(site().connection)]
    sets = [EvaluatedSet.of(each, live.lineage) for each in named if each]
    return page("evaluations", "Evaluations", sets=sets, times=request.args.get("x") == "time")


@blueprint.get("/jobs")
def jobs() -> str | Response:
    """A job by its id; which failed last, and which come next."""
    asked = request.args.get("id", "").strip()
    if asked and job_story.is_id(asked):
        return redirect(url_for("learning.job", job_id=asked))
    with redis_errors(site().where):
        count, failed = job_story.failed(site().connection)
        waiting = job_story.waiting(site().connection)
    return page("jobs", "Jobs", asked=asked, failed=failed, failed_count=count, waiting=waiting)


@blueprint.get("/jobs/<job_id>")
def job(job_id: str) -> str:
    """One job's story."""
    if not job_story.is_id(job_id):
        abort(404, "this is no id of a transcript: it may hold only A-Z a-z 0-9 _ -")
    with redis_errors(site().where):
        story = job_story.story(site().connection, job_id)
    trained = _around(story.version) if story.version else None
    gone = trained is not None and story.version in trained.gone
    return page("job", "A job's story", story=story, trained=trained.versions[0] if trained else None, gone=gone)


def _count() -> int:
    asked = request.args.get("n", type=int)
    return asked if asked in COUNTS else 60


@blueprint.app_errorhandler(HTTPException)
def refused(error: HTTPException) -> Any:
    """On the learning view's pages, an error as a page of its own; elsewhere as Flask has it."""
    if not request.path.startswith(f"{blueprint.url_prefix}/") or error.code is None or error.code < 400:
        return error
    return page("error", error.name, live=False, says=error.description), error.code


@blueprint.errorhandler(TandemError)
def trouble(error: TandemError) -> Any:
    """Redis is away, or holds what it should not: the page says it, and comes back by itself."""
    return page("error", "Not now", says=str(error)), 503
