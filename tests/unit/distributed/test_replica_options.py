"""Which replica a worker is: by its flags, or by torchrun; and what does not go together."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from producer.errors import TandemError
from worker.cli.replicas import check_rolling
from worker.cli.side_by_side import without_option
from worker.cli.worker import command
from worker.config.replica_options import ReplicaSettings, check_places, placed, replica_settings_of
from worker.data.batch_capacity import BatchCapacity, sizes_up_to

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.5",
    "MASTER_PORT": "29500",
}


def options(replica: str | None) -> dict[str, Any]:
    numbers = {"replica_timeout": 300.0, "replica_wait": 60.0}
    return {"replica": replica, "rendezvous": "127.0.0.1:1", "replicas": None, "rolling": False, **numbers}


def test_a_worker_alone_is_no_replica_and_the_flags_are_taken_out() -> None:
    given = options(None) | {"lr": 1.0}
    assert replica_settings_of(given, {"RANK": "1", "WORLD_SIZE": "2"}) is None and given == {"lr": 1.0}
    assert replica_settings_of(options("0/1"), {}) is None


def test_flags_come_before_torchrun() -> None:
    ours = replica_settings_of(options("2/3"), TORCHRUN | {"TANDEM_REPLICAS_SECRET": "s"})
    assert ours == ReplicaSettings(2, 3, "127.0.0.1:1", 300.0, 60.0, "s") and ours.follows
    theirs = replica_settings_of(options(None), TORCHRUN)
    assert theirs == ReplicaSettings(1, 2, "10.0.0.5:29500", 300.0, 60.0, "", kept=True)
    assert placed(Path("/run/tandem-{replica}"), theirs) == Path("/run/tandem-1")
    assert placed(Path("/run/tandem-{replica}"), None) == Path("/run/tandem-{replica}")


@pytest.mark.parametrize("replica", ["1", "2/2", "x/2", "-1/2", "1/x"])
def test_what_is_no_number_of_a_replica_is_said(replica: str) -> None:
    with pytest.raises(TandemError, match="write I/N"):
        replica_settings_of(options(replica), {})


@pytest.mark.parametrize("name", ["replica_timeout", "replica_wait"])
@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 1e300])
def test_what_is_no_time_to_wait_is_said(name: str, seconds: float) -> None:
    with pytest.raises(TandemError, match="write a number of seconds, at most 1,000,000"):
        replica_settings_of(options("0/2") | {name: seconds}, {})


def test_hogwild_is_refused_before_anything_is_asked() -> None:
    result = CliRunner().invoke(command, ["--replica", "1/2", "--apply", "streaming", "--hogwild"])
    assert "--hogwild does not go with --replica" in str(result.exception)


def test_rolling_is_refused_where_servers_cannot_pause_in_turn() -> None:
    with pytest.raises(TandemError, match="it goes with --replica I/N"):
        replica_settings_of(options(None) | {"rolling": True}, {})
    result = CliRunner().invoke(command, ["--replica", "1/2", "--apply", "streaming", "--rolling"])
    assert "--rolling does not go with streaming" in str(result.exception)
    rolling = replica_settings_of(options("0/2") | {"rolling": True}, {})
    with pytest.raises(TandemError, match="use --apply burst or factors"):
        check_rolling(rolling, "streaming")
    for way in ("burst", "factors"):
        check_rolling(rolling, way)


@pytest.mark.parametrize(("replica", "environment"), [("0/1", {}), (None, TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"})])
def test_rolling_of_one_replica_is_refused(replica: str | None, environment: dict[str, str]) -> None:
    with pytest.raises(TandemError, match="--replica 0/1 --rolling: one replica has nobody to pause in turn with"):
        replica_settings_of(options(replica) | {"rolling": True}, environment)


def test_rolling_that_the_memory_plan_forbids_names_the_flags_it_would_go_with() -> None:
    """What is named is what the planner takes: --apply factors plans for the row that these two make."""
    rolling = replica_settings_of(options("0/2") | {"rolling": True}, {})
    room = BatchCapacity(sizes_up_to(8192), packed=True, way="streaming", by_factors=1024)
    named = "8,192 tokens a pass only streaming fits .* --apply factors --max-tokens 1024 --max-length 1024, leave"
    with pytest.raises(TandemError, match=named):
        check_rolling(rolling, "streaming", room)
    assert sizes_up_to(room.by_factors)[-1] == room.by_factors
    with pytest.raises(TandemError, match="not even the shortest pass fits"):
        check_rolling(rolling, "streaming", replace(room, by_factors=0))
    check_rolling(rolling, "factors", replace(room, way="factors"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--replica", "0/2", "--rendezvous", "nowhere"], "--rendezvous nowhere: write HOST:PORT"),
        (["--replicas", "2", "--run-dir", "/run/{replica}", "--rendezvous", "here:0"], "--rendezvous here:0: write"),
        (["--replica", "0/65"], "--replica 0/65: write I/N, with N from 2 to 64"),
    ],
)
def test_a_meeting_that_cannot_be_is_refused_before_a_server_is_asked(flags: list[str], said: str) -> None:
    assert said in str(CliRunner().invoke(command, flags).exception)


def test_all_replicas_of_a_host_need_places_of_their_own() -> None:
    here = replica_settings_of(options(None) | {"replicas": 2, "rolling": True}, {})
    assert here is not None and here.here and here.rolling and (here.number, here.count) == (0, 2)
    with pytest.raises(TandemError, match="give one of both"):
        replica_settings_of(options("0/2") | {"replicas": 2}, {})
    check_places(Path("/run/tandem-{replica}"), None)
    with pytest.raises(TandemError, match="/var/lib/tandem would be that of every replica"):
        check_places(Path("/run/tandem-{replica}"), Path("/var/lib/tandem"))
    result = CliRunner().invoke(command, ["--replicas", "2", "--run-dir", "/run/tandem"])
    assert "write {replica} where the number goes" in str(result.exception)


def test_the_flag_that_starts_several_is_not_handed_on() -> None:
    given = ["worker", "--replicas", "2", "--lr", "1e-5", "--replicas=3"]
    assert without_option(given, "--replicas") == ["worker", "--lr", "1e-5"]
