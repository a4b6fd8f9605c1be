"""The alert rules, judged by Prometheus' own promtool: each fires for the series that it is for, and for no others."""

import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from metrics_parts import PROMTOOL, ROOT, unknown_metrics

FOLDER = ROOT / "docs" / "prometheus"
RULES = {one["alert"]: one for one in yaml.safe_load((FOLDER / "tandem-alerts.yml").read_text())["groups"][0]["rules"]}
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool here")

SERVER = {"deployment": "main", "instance": "s", "job": "tandem-server"}
WORKER = {"deployment": "main", "instance": "w", "job": "tandem-worker"}
WELL = {
    'tandem_server_state{state="torn"}': "0+0x120",
    'tandem_server_state{state="paused"}': "0+0x120",
    'tandem_worker_state{state="paused"}': "0+0x120",
    "tandem_trainer_connected": "1+0x120",
    "tandem_queue_oldest_job_age_seconds": "5+0x120",
    "tandem_versions_total": "0+1x120",
    'tandem_canary_loss{set="canary"}': "2+0x120",
    "tandem_state_free_bytes": "1e12+0x120",
    "tandem_checkpoint_bytes": "4e9+0x120",
    "tandem_checkpoints": "2+0x120",
    "tandem_journal_bytes": "1e8+0x120",
    "tandem_redis_up": "1+0x120",
    "tandem_redis_may_evict": "0+0x120",
    "tandem_redis_evicted_keys_total": "7+0x120",
    "tandem_redis_memory_bytes": "5e7+0x120",
    "tandem_redis_maxmemory_bytes": "1e8+0x120",
    "tandem_lost_jobs": "0+0x120",
    "tandem_status_timestamp_seconds": "0+60x120",
    "tandem_replicas": "2+0x120",
    "tandem_replicas_present": "2+0x120",
    "tandem_replica_digest_unequal": "0+0x120",
    "up": "1+0x120",
    "up{server}": "1+0x120",
}
"""Series -> values, one a minute, from the year 1970 on."""
OF_SERVER = ("tandem_server_state", "tandem_trainer_connected", "up{server}")

PAIR = {"deployment": "main"}
IDLE = {"tandem_queue_oldest_job_age_seconds": "0+60x120", "tandem_versions_total": "5+0x120"}
FIRST = {"tandem_checkpoints": "0+0x120", "tandem_checkpoint_bytes": "0+0x120", "tandem_journal_bytes": "0+0x120"}
"""Before there is a checkpoint."""
FIRES: list[tuple[str, dict[str, str], int, int, dict[str, str]]] = [
    ("TandemTorn", {'tandem_server_state{state="torn"}': "0+0x9 1+0x110"}, 9, 10, PAIR),
    ("TandemServerPausedTooLong", {'tandem_server_state{state="paused"}': "0+0x9 1+0x110"}, 11, 12, PAIR),
    ("TandemTrainingPaused", {'tandem_worker_state{state="paused"}': "0+0x9 1+0x110"}, 24, 25, PAIR),
    ("TandemNoVersion", IDLE, 20, 21, WORKER),
    ("TandemReplicaMissing", {"tandem_replicas_present": "2+0x9 1+0x110"}, 14, 15, WORKER),
    ("TandemReplicaDigestUnequal", {"tandem_replica_digest_unequal": "0+0x9 1+0x110"}, 9, 10, WORKER),
    ("TandemCanaryUp", {'tandem_canary_loss{set="canary"}': "2+0x9 2.25+0x110"}, 14, 15, WORKER | {"set": "canary"}),
    ("TandemDiskFilling", {"tandem_state_free_bytes": "1e12+0x9 2.9e9+0x110"}, 9, 25, WORKER),
    ("TandemDiskFilling", {"tandem_state_free_bytes": "1e12-1e9x120"}, 10, 30, WORKER),
    ("TandemDiskFilling", FIRST | {"tandem_state_free_bytes": "9e8+0x120"}, 14, 15, WORKER),
    ("TandemJournalFilling", {"tandem_journal_bytes": "1e8+0x9 2e12+0x110"}, 24, 25, WORKER),
    ("TandemRedisMayEvict", {"tandem_redis_may_evict": "0+0x9 1+0x110"}, 14, 15, WORKER),
    ("TandemRedisEvicted", {"tandem_lost_jobs": "0+0x9 1+0x110"}, 9, 10, WORKER),
    ("TandemRedisFull", {"tandem_redis_memory_bytes": "5e7+0x9 9.1e7+0x110"}, 14, 15, WORKER),
    ("TandemRedisAway", {"tandem_redis_up": "1+0x9 0+0x110"}, 11, 12, WORKER),
    ("TandemWorkerAway", {"tandem_trainer_connected": "1+0x9 0+0x110"}, 19, 20, PAIR),
    ("TandemNotScraped", {"up{server}": "1+0x9 0+0x110"}, 14, 15, SERVER),
    ("TandemNotLookedUp", {"tandem_status_timestamp_seconds": "0+60x9 540+0x110"}, 16, 17, WORKER),
    ("TandemNotLookedUp", {"tandem_status_timestamp_seconds": "0+60x9 stale _x100"}, 14, 15, WORKER),
]  # fmt: skip
"""(alert, what is not as in WELL, minute at which it does not fire yet, minute at which it does, its labels)."""
QUIET: list[tuple[str, dict[str, str]]] = [
    ("TandemServerPausedTooLong", {'tandem_server_state{state="paused"}': "0 1 0 1 1 0 1 0 1 1 0 1 0"}),
    ("TandemNoVersion", {"tandem_queue_oldest_job_age_seconds": "0+60x120"}),  # a long queue, and versions
    ("TandemNoVersion", {"tandem_versions_total": "5+0x120"}),  # nothing to do
    ("TandemCanaryUp", {'tandem_canary_loss{set="canary"}': "2+0x9 2.15+0x110"}),
    ("TandemCanaryUp", {'tandem_canary_loss{set="canary"}': "2+0x9 2.5+0x2 2+0x110"}),
    ("TandemDiskFilling", {"tandem_state_free_bytes": "1e12-1e8x120"}),
    (
        "TandemRedisEvicted",
        {"tandem_redis_evicted_keys_total": "0+10x120"},
    ),  # somebody else's keys, with a time to live
    ("TandemRedisFull", {"tandem_redis_maxmemory_bytes": "0+0x120"}),  # no limit
]
BOTH = {"tandem_redis_may_evict": "1+0x120", "tandem_redis_evicted_keys_total": "0+0x9 3+0x110"}


def series(name: str) -> str:
    """`name` as promtool wants it, with the labels of the port that shows it."""
    found = re.fullmatch(r"(\w+)(?:\{(.*)\})?", name)
    assert found
    own = SERVER if name.startswith(OF_SERVER) else WORKER
    labels = [f'{label}="{value}"' for label, value in own.items()]
    return f"{found[1]}{{{','.join([*labels, *([found[2]] if found[2] and found[2] != 'server' else [])])}}}"


def case(alert: str, other: dict[str, str], *looks: tuple[int, dict[str, str] | None]) -> dict[str, Any]:
    """One test of promtool's: `other` instead of what is in WELL; looks: minute, and the labels with which it fires."""
    looked = [
        {"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": [] if labels is None else [fired(alert, labels)]}
        for minute, labels in looks
    ]
    given = [{"series": series(name), "values": values} for name, values in (WELL | other).items()]
    return {"interval": "1m", "input_series": given, "alert_rule_test": looked}


def silent(alerts: Iterable[str], other: dict[str, str], *minutes: int) -> dict[str, Any]:
    """One test of promtool's: none of `alerts` fires."""
    cases = [case(alert, other, *((minute, None) for minute in minutes)) for alert in sorted(alerts)]
    return cases[0] | {"alert_rule_test": [look for one in cases for look in one["alert_rule_test"]]}


def fired(alert: str, labels: dict[str, str]) -> dict[str, Any]:
    words = {
        "$labels.set": "canary",
        'printf "%.2f" $value': "0.25",
        "$labels.job": "tandem-server",
        "$labels.instance": "s",
    }
    said = {}
    for name, text in RULES[alert]["annotations"].items():
        for word, value in words.items():
            text = text.replace("{{ " + word + " }}", value)
        said[name] = text
    return {"exp_labels": labels | RULES[alert]["labels"], "exp_annotations": said}


def judge(tests: list[dict[str, Any]], folder: Path) -> None:
    assert PROMTOOL
    file = folder / "rules.test.yml"
    file.write_text(json.dumps({"rule_files": [str(FOLDER / "tandem-alerts.yml")], "tests": tests}))
    done = subprocess.run([PROMTOOL, "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_takes_rules_and_configuration() -> None:
    for what, name in (("rules", "tandem-alerts.yml"), ("config", "prometheus.yml")):
        done = subprocess.run([str(PROMTOOL), "check", what, str(FOLDER / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_each_alert_fires_for_its_series_and_not_before(tmp_path: Path) -> None:
    judge(
        [case(alert, other, (quiet, None), (fires, labels)) for alert, other, quiet, fires, labels in FIRES], tmp_path
    )
    judge([case("TandemRedisEvicted", BOTH, (9, None), (10, WORKER))], tmp_path)
    assert {alert for alert, *_ in FIRES} == RULES.keys(), "an alert without a test"


@needs_promtool
def test_what_one_alert_is_for_fires_no_other(tmp_path: Path) -> None:
    judge([silent(RULES.keys() - {alert}, planted, fires) for alert, planted, _, fires, _ in FIRES], tmp_path)


@needs_promtool
def test_where_all_is_well_none_fires(tmp_path: Path) -> None:
    judge([silent(RULES.keys(), {}, 1, 30, 90)], tmp_path)


@needs_promtool
def test_what_looks_alike_fires_none(tmp_path: Path) -> None:
    judge([case(alert, other, *((minute, None) for minute in range(1, 60))) for alert, other in QUIET], tmp_path)


def test_rules_name_only_metrics_that_exist_and_say_what_to_do() -> None:
    for alert, rule in RULES.items():
        assert not unknown_metrics(rule["expr"]), alert
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"} and all(rule["annotations"].values())


def test_operating_says_of_each_what_to_do() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    assert set(re.findall(r"`(Tandem\w+)`", page)) == set(RULES)
