"""Canary sets: read, scored, told of, and what follows one that fails. A real tiny model, a real Redis."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import redis
import torch
from drain_parts import events
from few_words import Room, conversation, weights_of
from hypothesis import given
from hypothesis import strategies as st

from producer import keys
from producer.errors import TandemError
from worker.checkpoint.ancestry import RebuildError
from worker.config.guard_options import GuardSettings, NamedBound, NamedSet, guard_options, settings_of
from worker.config.protocol import TornWeightsError, UnavailableError
from worker.orchestrator import canary
from worker.orchestrator.canary import Canary, CanaryError, CanarySet, CanaryStep
from worker.orchestrator.reports import Report
from worker.versions import pause_switch


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


def test_the_canary_set_is_read_and_bad_lines_are_named(room: Room, tmp_path: Path) -> None:
    _, builder = room
    file = tmp_path / "canary.jsonl"
    file.write_text("".join(json.dumps(conversation(i).to_dict()) + "\n" for i in range(3)))
    assert [example.id for example in canary.load(file, builder)] == ["canary-1", "canary-2", "canary-3"]
    file.write_text(json.dumps(conversation(0).to_dict()) + '\n{"messages": 3}\n')
    with pytest.raises(CanaryError, match="line 2"):
        canary.load(file, builder)
    file.write_text(json.dumps(conversation(0).to_dict() | {"rating": -1}) + "\n")
    with pytest.raises(CanaryError, match="line 1: is disliked; a canary set holds answers to keep"):
        canary.load(file, builder)
    file.write_text("")
    with pytest.raises(CanaryError, match="no conversations"):
        canary.load(file, builder)
    with pytest.raises(CanaryError, match="canary-every"):
        Canary([], lambda examples: {}, every=0)


def make_canary(room: Room, bound: float | None, every: int = 2, more: Sequence[CanarySet] = ()) -> Canary:
    trainer, builder = room
    examples = [builder.build(conversation(i), f"c{i}") for i in range(5)]
    return Canary([CanarySet("canary", examples, bound), *more], trainer.score, every=every)


def canary_of(arguments: list[str]) -> GuardSettings:
    """What a command with the guards' flags makes of `arguments`. Raises `TandemError`, or click's refusal."""
    found: list[GuardSettings] = []

    @click.command()
    @guard_options
    def command(**options: Any) -> None:
        found.append(settings_of(options))

    command.main(arguments, standalone_mode=False)
    return found[0]


def test_canary_sets_have_names_and_bounds_of_their_own() -> None:
    flags = ["--canary", "facts=a.jsonl", "--canary", "b=c.jsonl", "--canary-bound", "2", "--canary-bound", "facts=1.5"]
    found = canary_of(flags)
    assert found.canary == (("facts", Path("a.jsonl")), ("b", Path("c.jsonl")))
    assert (found.bound_of("facts"), found.bound_of("b")) == (1.5, 2.0)
    plain = canary_of(["--canary", "dir/x=y.jsonl"])
    assert plain.canary == (("canary", Path("dir/x=y.jsonl")),) and plain.bound_of("canary") is None
    assert canary_of(["--canary", "x", "--canary-bound", "3", "--canary-bound", "4"]).bound_of("canary") == 4.0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--canary", "a", "--canary", "b"], "give each its own, --canary NAME=FILE"),
        (["--canary-bound", "1"], "name one with --canary FILE"),
        (["--canary", "a=b", "--canary-bound", "c=1"], "there is no --canary c=FILE"),
        (["--canary", "a=b", "--auto-rollback"], "--canary-bound"),
        (["--canary", "a="], "names no file"),
        (["--canary", "a=b", "--canary-bound", "a=x"], "'x' is not a number above 0"),
        (["--canary", "a=b", "--canary-bound", "nan"], "'nan' is not a number above 0"),
    ],
)
def test_canary_flags_that_make_no_sense_are_refused(flags: list[str], says: str) -> None:
    with pytest.raises((TandemError, click.ClickException), match=re.escape(says)):
        canary_of(flags)


names = st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True)


@given(names, st.text(st.characters(exclude_characters="\0"), min_size=1).filter(lambda text: not text.startswith("-")))
def test_any_name_and_file_come_through(name: str, file: str) -> None:
    assert NamedSet().convert(f"{name}={file}", None, None) == (name, Path(file))
    assert NamedSet().convert(f"./{file}", None, None) == ("canary", Path(f"./{file}"))
    assert NamedBound().convert(f"{name}=0.5", None, None) == (name, 0.5)


def test_each_set_has_its_loss_in_the_manifest_and_the_first_beyond_its_bound_is_named(
    room: Room, connection: redis.Redis
) -> None:
    trainer, builder = room
    other = [builder.build(conversation(9), "other-1")]
    connection.hset(keys.manifest(2), mapping={"version": 2})
    more = [CanarySet("style", other), CanarySet("tone", other, 1e-6)]
    CanaryStep(make_canary(room, 100.0, more=more), connection).take(2)
    losses = json.loads(connection.hget(keys.manifest(2), "canary"))
    assert list(losses) == ["canary", "style", "tone"] and losses["style"] == losses["tone"] != losses["canary"]
    assert losses["style"] == pytest.approx(trainer.score(other)["other-1"])
    reason = pause_switch.pause_reason(connection) or ""
    assert reason.startswith("the canary set tone's loss at version 2 is ") and "1e-06" not in reason
    assert connection.hget(keys.STATE, "canary_good") is None, "one set that fails is enough"
    assert json.loads(connection.hget(keys.STATE, "canary_losses")) == losses
    told = [entry for _, entry in connection.xrange(keys.EVENTS) if entry[b"kind"] == b"canary"]
    assert [json.loads(entry[b"failed"]) for entry in told] == [["tone"]]
    CanaryStep(make_canary(room, None), connection).take(4)
    assert connection.hget(keys.STATE, "canary_good") == b"4", "a set without a bound is only watched"
    assert not connection.exists(keys.manifest(4)), "no manifest is made of a canary alone"


def test_a_passing_canary_says_its_loss_and_changes_nothing(room: Room, connection: redis.Redis) -> None:
    trainer, _ = room
    before = weights_of(trainer)
    found, told = make_canary(room, bound=100.0), list[Report]()
    step = CanaryStep(found, connection, tell=told.append)
    for version in (1, 2, 2, 3):
        step.take(version)
    examples = found.sets[0].examples
    losses = trainer.score(examples)
    weighed = sum(losses[e.id] * e.trained_tokens for e in examples) / sum(e.trained_tokens for e in examples)
    state = connection.hgetall(keys.STATE)
    assert float(state[b"canary_loss"]) == pytest.approx(weighed) and state[b"canary_good"] == b"2"
    assert events(connection) == ["canary"] and pause_switch.pause_reason(connection) is None
    assert [(report.version, report.bound) for report in told] == [(2, 100.0)]
    assert torch.equal(before, weights_of(trainer))


def test_a_version_is_scored_once_also_over_a_restart(room: Room, connection: redis.Redis) -> None:
    """A worker that ended between a version and its canary: the next one scores it; one that is judged is not again."""
    counted = CanaryStep(make_canary(room, bound=100.0), connection)
    counted.take(2)
    told: list[Report] = []
    CanaryStep(make_canary(room, bound=100.0), connection, tell=told.append).take(2)
    assert told == []
    CanaryStep(make_canary(room, bound=100.0), connection, tell=told.append).take(4)
    assert len(told) == 1 and events(connection) == ["canary", "canary"]


def test_a_failing_canary_holds_training_and_rolls_back_to_the_last_good_version(
    room: Room, connection: redis.Redis
) -> None:
    asked: list[int] = []

    def rollback(version: int) -> int:
        assert pause_switch.pause_reason(connection) is not None, "nothing may be trained meanwhile"
        asked.append(version)
        return 9

    CanaryStep(make_canary(room, bound=100.0), connection, rollback).take(4)
    CanaryStep(make_canary(room, bound=1e-6), connection, rollback).take(8)
    assert asked == [4]
    assert (
        "version 8" in (reason := pause_switch.pause_reason(connection) or "")
        and "version 9 is version 4 again" in reason
    )
    assert events(connection) == ["canary", "held", "held", "canary"]
    assert connection.hget(keys.STATE, "canary_good") == b"4"


@pytest.mark.parametrize("good", [None, 3])
def test_a_rollback_that_cannot_be_leaves_training_on_hold(
    room: Room, connection: redis.Redis, good: int | None
) -> None:
    def rollback(version: int) -> int:
        raise RebuildError("the journal does not go back so far")

    if good is not None:
        connection.hset(keys.STATE, "canary_good", good)
    CanaryStep(make_canary(room, bound=1e-6), connection, rollback).take(8)
    reason = pause_switch.pause_reason(connection) or ""
    assert "version 8" in reason and ("does not go back" in reason) == (good is not None)


@pytest.mark.parametrize(
    "error", [TornWeightsError("broke off"), UnavailableError("not resumed"), RuntimeError("the device is lost")]
)
def test_what_goes_wrong_after_a_rollback_s_first_write_is_not_swallowed(
    room: Room, connection: redis.Redis, error: Exception
) -> None:
    def rollback(version: int) -> int:
        raise error

    connection.hset(keys.STATE, "canary_good", 3)
    with pytest.raises(type(error)):
        CanaryStep(make_canary(room, bound=1e-6), connection, rollback).take(8)
    assert "version 8" in (pause_switch.pause_reason(connection) or "")
    assert connection.hget(keys.STATE, "canary_version") is None, "the next worker judges it again"


def test_a_canary_that_cannot_be_scored_does_not_pass(room: Room, connection: redis.Redis) -> None:
    def broken(examples: Any) -> dict[str, float]:
        raise RuntimeError("device lost while scoring a secret conversation")

    canary = Canary(make_canary(room, bound=1.0).sets, broken, every=2)
    step = CanaryStep(canary, connection, lambda version: pytest.fail("nobody knows that it failed"))
    step.take(4)
    step.take(4)
    reason = pause_switch.pause_reason(connection) or ""
    assert "could not be scored at version 4 (RuntimeError" in reason and "secret" not in reason
    assert connection.hget(keys.STATE, "canary_good") is None and events(connection) == ["held"]
    CanaryStep(make_canary(room, bound=100.0), connection).take(4)
    assert connection.hget(keys.STATE, "canary_good") == b"4", "the next worker could score it"


def test_a_server_that_goes_away_meanwhile_says_nothing_of_the_version(room: Room, connection: redis.Redis) -> None:
    """The canary asks it how many requests run. Training must not wait for a person because it was started again."""

    def alone(examples: Any) -> dict[str, float]:
        raise UnavailableError("the server has gone")

    with pytest.raises(UnavailableError):
        CanaryStep(Canary(make_canary(room, bound=1.0).sets, alone, every=2), connection).take(4)
    assert pause_switch.pause_reason(connection) is None
    CanaryStep(make_canary(room, bound=100.0), connection).take(4)
    assert connection.hget(keys.STATE, "canary_good") == b"4", "the next worker scores it"
