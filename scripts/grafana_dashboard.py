"""Writes docs/grafana/tandem.json, the dashboard to import into Grafana, from the rows below.

    python scripts/grafana_dashboard.py docs/grafana/tandem.json

A panel is (title, kind, unit, queries, what it says). Units are Grafana's. Every query is limited to what the reader
chose at the top: `deployment`, a label that docs/prometheus/prometheus.yml gives to a server and its worker alike.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

WIDTH, HEIGHT = 24, 8
"""Of Grafana's grid; three panels to a row, six small ones."""
SMALL = ("stat", "state", "alarm")


class Panel(NamedTuple):
    title: str
    kind: str
    unit: str
    queries: dict[str, str]
    """Legend -> PromQL, for all deployments."""
    says: str


def lines(title: str, queries: dict[str, str], says: str) -> Panel:
    """Curves of plain numbers: most panels."""
    return Panel(title, "lines", "none", queries, says)


def rate(name: str, by: str = "") -> str:
    """Per second, of a counter, summed over all labels but `by`."""
    return f"sum {f'by ({by}) ' if by else ''}(rate({name}[$__rate_interval]))"


def a_minute(name: str, by: str = "") -> str:
    return f"60 * {rate(name, by)}"


def quantiles(name: str) -> dict[str, str]:
    """Of a histogram."""
    of = f"sum by (le) (rate({name}_bucket[$__rate_interval]))"
    return {"half are shorter": f"histogram_quantile(0.5, {of})", "99 % are shorter": f"histogram_quantile(0.99, {of})"}


def mean(parts: str) -> str:
    """Mean seconds of a version by part."""
    of = f'{{part=~"{parts}"}}'
    return f"{rate('tandem_version_seconds_sum' + of, 'part')} / {rate('tandem_version_seconds_count' + of, 'part')}"


def hourly(name: str, by: str = "") -> str:
    return f"sum {f'by ({by}) ' if by else ''}(increase({name}[1h]))"


ROWS: dict[str, list[Panel]] = {
    "Is it learning?": [
        Panel("Version", "stat", "none", {"": 'max(tandem_version{source="server"})'},
              "The version of the weights that answers now."),
        Panel("Last version", "stat", "s", {"": "time() - max(tandem_last_version_timestamp_seconds)"},
              "How long ago the last version was made."),
        Panel("Server", "state", "none", {"{{state}}": "max by (state) (tandem_server_state) == 1"},
              "torn: half-written weights, which are not served; start the worker again."),
        Panel("Worker", "state", "none", {"{{state}}": "max by (state) (tandem_worker_state) == 1"},
              "paused: training waits for tandem resume. resting: serving keeps its share."),
        Panel("Problems", "alarm", "none", {"": "max(tandem_problems)"},
              "How many problems tandem status names. It says what to do."),
        Panel("Transcripts learnt", "stat", "short", {"": "max(tandem_ledger_transcripts)"},
              "All that was ever trained, each once."),
        lines("Loss of new transcripts, by kind", {"{{kind}}": "tandem_loss"},
              "Before the update, in nats a token. Kinds have their own losses: compare each with itself only."),
        lines("Loss of what must not be forgotten",
              {"canary set {{set}}": "tandem_canary_loss", "set {{set}}": "tandem_evaluation_loss"},
              "Canary and evaluation sets, in nats a token. They are never trained: what rises here is forgotten."),
        Panel("Evaluation sets", "lines", "percentunit",
              {"{{set}}: exact match": "tandem_evaluation_exact_match_ratio",
               "{{set}}: chosen over rejected": "tandem_evaluation_win_ratio"},
              "The part of answers that are the reference, and of pairs whose better answer is the likelier one."),
        lines("Jobs by kind, a minute", {"{{kind}}": a_minute("tandem_trained_jobs_total", "kind")},
              "Trained jobs by kind of feedback."),
        lines("Update over weights", {"": "tandem_update_ratio"},
              "RMS of the update over the RMS of the weights: how far a version moves them."),
        lines("What went wrong, and what was put right, an hour",
              {"failed jobs": hourly('tandem_jobs_total{outcome="failed"}'),
               "batches in halves": hourly("tandem_splits_total"), "rollbacks": hourly("tandem_rollbacks_total"),
               "recovered: {{what}}": hourly("tandem_recoveries_total", "what"), "tears": hourly("tandem_tears_total")},
              "docs/metrics.md says what each is."),
    ],
    "What it costs serving": [
        Panel("Share of serving", "lines", "percentunit",
              {"asked": "tandem_serving_share_asked_ratio", "kept": "tandem_serving_share_kept_ratio"},
              "The part of the time that updates leave to running requests: as asked, and of the last minute."),
        Panel("Pauses", "lines", "s", quantiles("tandem_pause_seconds"),
              "How long requests that came in a pause had to wait, at most."),
        Panel("Taken from serving", "lines", "percentunit",
              {"paused": rate("tandem_pause_seconds_sum"), "all": rate("tandem_serving_cost_seconds_total")},
              "The part of the time in which the server is paused, and all that updates take from running requests."),
        Panel("Seconds of a version", "stack", "s", {"{{part}}": mean("linger|tokenize|step|commit")},
              "From its first job to Redis: the batch fills, tokens, training (step), commit."),
        Panel("Seconds of a step", "stack", "s", {"{{part}}": mean("gradients|journal|wait_for_pause|pause")},
              "Of the training: gradients beside serving, the journal, waiting for the pause, the pause."),
        lines("Tokens a second",
              {"trained, with prompts": rate("tandem_tokens_total"), "in the loss": rate("tandem_trained_tokens_total"),
               "generated by vLLM": rate("vllm:generation_tokens_total")},
              "What the same weights learn and say."),
        lines("Requests in vLLM",
              {"running": "sum(vllm:num_requests_running)", "waiting": "sum(vllm:num_requests_waiting)"},
              "vLLM's own metrics."),
        Panel("Time to the first token", "lines", "s", quantiles("vllm:time_to_first_token_seconds"),
              "vLLM's own metric: pauses and training show here."),
        lines("Trainer",
              {"connected": "tandem_trainer_connected",
               "overdue pauses, an hour": hourly("tandem_overdue_leases_total")},
              "Whether a worker is connected to the server, and pauses that one did not end in time."),
    ],
    "The queue": [
        lines("Jobs", {"{{state}}": 'tandem_queue_jobs{state!="finished"}'},
              "queued is the depth of the queue; failed ones wait for you in tandem dashboard."),
        Panel("Age of the oldest job", "lines", "s", {"": "tandem_queue_oldest_job_age_seconds"},
              "How long the job at the front has waited."),
        lines("Jobs by outcome, a minute",
              {"{{outcome}}": a_minute("tandem_jobs_total", "outcome"),
               "versions": a_minute("tandem_versions_total")},
              "What became of the jobs, and in how many versions."),
        lines("Completions kept, a minute",
              {"{{outcome}}": a_minute("tandem_completions_total", "outcome")},
              "What --record keeps. dropped: Redis was away, full or too slow."),
        lines("Calls of /v1/feedback, a minute",
              {"{{code}}": a_minute("tandem_feedback_requests_total", "code")}, "By HTTP status."),
        lines("Lost jobs", {"": "tandem_lost_jobs"},
              "Queued transcripts of the last day whose job is gone: evicted, or deleted."),
    ],
    "Disk and Redis": [
        Panel("State directory", "lines", "bytes",
              {"journal": "tandem_journal_bytes", "checkpoints": "tandem_checkpoint_bytes",
               "free on its disk": "tandem_state_free_bytes"},
              "What the worker keeps, and what there is left."),
        Panel("Redis' memory", "lines", "bytes",
              {"used": "tandem_redis_memory_bytes", "limit (0: none)": "tandem_redis_maxmemory_bytes"},
              "At its limit Redis takes no more transcripts, or evicts some: see the next panel."),
        lines("Redis",
              {"there": "tandem_redis_up", "may evict": "tandem_redis_may_evict",
               "evicted keys": "tandem_redis_evicted_keys_total"},
              "may evict must be 0: an evicted key is a lost transcript. Set maxmemory-policy noeviction."),
        Panel("Memory of the processes", "lines", "bytes", {"{{job}}": "process_resident_memory_bytes"},
              "Worker, and vLLM's API process. On a CPU the served weights count in the worker too: it maps them."),
        lines("CPUs of the processes",
              {"{{job}}": "rate(process_cpu_seconds_total[$__rate_interval])"},
              "How many are in use."),
        lines("Checkpoints", {"": "tandem_checkpoints"}, "How many there are."),
    ],
}  # fmt: skip
METRIC = re.compile(r"\b((?:tandem_|vllm:|process_)[a-z_]+)(?:\{([^}]*)\})?")


def here(query: str) -> str:
    """`query`, each of its metrics limited to the chosen deployments."""
    return METRIC.sub(lambda m: f"{m[1]}{{{', '.join(filter(None, [CHOSEN, m[2]]))}}}", query)


CHOSEN = 'deployment=~"$deployment"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def panel(number: int, one: Panel, place: dict[str, int]) -> dict[str, Any]:
    """One panel as Grafana wants it."""
    small = one.kind in SMALL
    targets = [
        {"refId": chr(ord("A") + index), "expr": here(expr), "legendFormat": legend or one.title, "datasource": SOURCE}
        for index, (legend, expr) in enumerate(one.queries.items())
    ]
    custom = {"fillOpacity": 30, "stacking": {"mode": "normal", "group": "A"}} if one.kind == "stack" else {}
    alarm = [{"value": None, "color": "green"}, {"value": 1, "color": "red"}]
    steps = alarm if one.kind == "alarm" else [{"value": None, "color": "blue"}]
    defaults = {"unit": one.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    options: dict[str, Any] = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
    }
    options["tooltip"] = {"mode": "multi", "sort": "desc"}
    if small:
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "values": False, "fields": ""}, "graphMode": "none"}
        options |= {"colorMode": "value", "textMode": "name" if one.kind == "state" else "value"}
        options |= {"justifyMode": "auto", "orientation": "auto"}
    return {
        "id": number,
        "type": "stat" if small else "timeseries",
        "title": one.title,
        "description": one.says,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": defaults | ({} if small else {"custom": custom}), "overrides": []},
        "options": options,
    }


def panels() -> list[dict[str, Any]]:
    """All rows, laid out: small panels six to a line, others three."""
    made: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        made.append({"id": len(made) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
                     "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1}})  # fmt: skip
        top, left, height = top + 1, 0, 0
        for one in row:
            wide, high = (WIDTH // 6, HEIGHT // 2) if one.kind in SMALL else (WIDTH // 3, HEIGHT)
            if left + wide > WIDTH:
                top, left = top + height, 0
            made.append(panel(len(made) + 1, one, {"x": left, "y": top, "w": wide, "h": high}))
            left, height = left + wide, high
        top += height
    return made


def variable(name: str, kind: str, query: Any, label: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "query": query, "label": label, "hide": 0, "skipUrlSync": False} | more


def dashboard() -> dict[str, Any]:
    """The whole dashboard."""
    chosen = variable(
        "deployment", "query", "label_values(tandem_build_info, deployment)", "Deployment",
        datasource=SOURCE, refresh=2, sort=1, multi=True, includeAll=True, allValue=".*",
        current={"text": "All", "value": "$__all", "selected": True},
    )  # fmt: skip
    return {
        "uid": "tandem",
        "title": "Tandem",
        "description": "A model that learns while vLLM serves it. docs/metrics.md says what each metric is.",
        "tags": ["tandem", "vllm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [variable("datasource", "datasource", "prometheus", "Prometheus"), chosen]},
        "annotations": {"list": []},
        "links": [],
        "panels": panels(),
    }


def text() -> str:
    """The dashboard as JSON, a line for each of its fields and each panel."""
    fields = {name: json.dumps(value) for name, value in dashboard().items()}
    fields["panels"] = "[\n" + ",\n".join(map(json.dumps, panels())) + "\n]"
    return "{\n" + ",\n".join(f'"{name}": {value}' for name, value in fields.items()) + "\n}\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text())
