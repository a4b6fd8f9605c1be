"""Makes rq-dashboard 0.9 understand Tandem's jobs by being imported: `rq-dashboard -c worker.web.dashboard_config`.

The dashboard knows pickle and JSON only: with msgpack jobs several of its pages answer 500, and it would unpickle what
it reads. Here it gets our serializer and our job class, which runs, imports and unpickles nothing. RQ's own classes
stay as they are; the names that are replaced in rq-dashboard are checked below.
"""

import json
from typing import Any

import redis
import rq
from rq.exceptions import NoSuchJobError
from rq_dashboard import web

from producer.errors import TandemError
from producer.serializer import MsgpackSerializer
from worker.consumer.jobs import FeedbackJob
from worker.consumer.rq_private import check_rq, never_unpickle


class PlainEncoder(json.JSONEncoder):
    """Metadata may hold what JSON cannot say (bytes, dates): shown as text rather than as an error page."""

    def default(self, o: Any) -> str:
        return str(o)


class DashboardJob(FeedbackJob):
    """As rq-dashboard 0.9 expects a job to be: it knows dependencies as RQ 1 gave them, as keys in bytes."""

    dependency_ids = property(lambda self: [self.key_for(job_id).encode() for job_id in self.waits_for])


class DashboardQueue(rq.Queue):
    """RQ's own takes an id off the queue when somebody looks at it and its job is gone, and fails at an id that it
    would not make itself: whoever looks changes nothing, and sees the others."""

    job_class = FeedbackJob

    def fetch_job(self, job_id: str) -> FeedbackJob | None:
        try:
            job = FeedbackJob.fetch(job_id, connection=self.connection, serializer=self.serializer)
        except (NoSuchJobError, ValueError):
            return None
        return job if isinstance(job, FeedbackJob) else None


class DashboardWorker(rq.Worker):
    """What a worker is at is one of our jobs."""

    job_class = FeedbackJob
    queue_class = DashboardQueue


RQ_DASHBOARD_JSON_ENCODER = PlainEncoder
RQ_DASHBOARD_SHOW_FULL_ARGS = False
DEPRECATED_OPTIONS: list[str] = []


def _requeue(job_id: str, connection: redis.Redis, **_: Any) -> Any:
    return FeedbackJob.fetch(job_id, connection=connection, serializer=MsgpackSerializer).requeue()


def _prepare() -> None:
    check_rq()
    never_unpickle()
    missing = [name for name in ("Job", "Queue", "Worker", "requeue_job", "config") if not hasattr(web, name)]
    if missing:
        raise TandemError(f"rq_dashboard.web lacks {', '.join(missing)}: pip install 'rq-dashboard>=0.9,<0.10'")
    web.config.serializer = MsgpackSerializer
    web.Job = DashboardJob
    web.Queue = DashboardQueue
    web.Worker = DashboardWorker
    web.requeue_job = _requeue


_prepare()
