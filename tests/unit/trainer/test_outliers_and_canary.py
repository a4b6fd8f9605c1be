"""Guards: outliers set aside, the canary set, a paused training, rehearsal. Real tiny models, a real Redis."""

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import redis
import torch
from click.testing import CliRunner
from drain_parts import Lines, Weights, start
from hypothesis import given
from hypothesis import strategies as st

from producer import Producer, Transcript, keys
from producer.errors import TandemError
from worker.checkpoint import model_directory
from worker.checkpoint.ancestry import RebuildError
from worker.cli.pause import command as pause_command
from worker.cli.resume import command as resume_command
from worker.config.guard_options import GuardSettings, NamedBound, NamedSet, guard_options, settings_of
from worker.config.hyperparameters import Hyperparameters
from worker.config.protocol import TornWeightsError, UnavailableError
from worker.data.examples import Example, ExampleBuilder
from worker.data.replay_buffer import PREFIX, ReplayBuffer
from worker.orchestrator import canary
from worker.orchestrator.canary import Canary, CanaryError, CanarySet, CanaryStep
from worker.orchestrator.reports import Report
from worker.trainer.factory import make_trainer
from worker.trainer.grad_norm import gradient_norm
from worker.trainer.losses import Answers
from worker.trainer.outliers import Guards, History
from worker.trainer.trainer import Trainer
from worker.versions import ledger, pause_switch

WORDS = ("red", "green", "blue", "one", "two", "three")


def conversation(index: int, words: tuple[str, ...] = WORDS) -> Transcript:
    dice = random.Random(index)
    said = [" ".join(dice.choices(words, k=8)) for _ in range(2)]
    messages = [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
    return Transcript.from_dict({"messages": messages})


@pytest.fixture(scope="module")
def room(tiny_model: Path) -> Iterator[tuple[Trainer, ExampleBuilder]]:
    """A trainer on a model that has learnt the few words above, and its builder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = model_directory.load(tiny_model)
    builder = ExampleBuilder(tokenizer, max_tokens=512)
    trainer = make_trainer(model, model.named_parameters(), tokenizer, Hyperparameters(lr=3e-3), state=None)
    for step in range(30):
        trainer.begin([builder.build(conversation(8 * step + i), f"warm-{8 * step + i}") for i in range(8)])
        trainer.apply()
    yield trainer, builder
    torch.set_num_threads(threads)


def weights_of(trainer: Trainer) -> torch.Tensor:
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return torch.cat([p.detach().flatten().float() for p in parameters])


# Outliers


def test_nothing_is_refused_before_enough_is_known_and_equal_values_leave_room() -> None:
    history = History(k=8, minimum=10, window=100)
    history.add([2.0] * 9 + [math.nan, math.inf])
    assert history.bound() == math.inf and len(history.values) == 9
    history.add([2.0])
    assert history.bound() == pytest.approx(2.0 + 8 * 0.05 * 2.0)
    assert History(k=0, minimum=1, window=5).bound() == math.inf


@pytest.mark.parametrize("outliers", [0, 1, 20])
def test_outliers_in_the_history_hardly_move_the_bound(outliers: int) -> None:
    dice = random.Random(3)
    history = History(k=8, minimum=10, window=1000)
    history.add(dice.gauss(2.0, 0.2) for _ in range(200))
    history.add([1e6] * outliers)
    assert 3.0 < history.bound() < 4.5


def test_a_restart_remembers_from_manifests_as_the_journal_and_as_redis_have_them() -> None:
    first, dice = Guards(minimum=8, window=64), random.Random(1)
    losses = [{f"t{i}": dice.gauss(3, 1) for i in range(4)} for _ in range(12)]
    manifests = [Guards.measures(nll, dice.gauss(9, 1), 50.0) for nll in losses]
    first.remember(manifests)
    from_journal, from_redis = Guards(minimum=8, window=64), Guards(minimum=8, window=64)
    from_journal.remember(manifests)
    from_redis.remember({name: str(ledger.flat(value)) for name, value in kept.items()} for kept in manifests)
    assert first.loss_limit() == from_journal.loss_limit() == from_redis.loss_limit() < math.inf
    refusals = [guards.norm_refusal(100.0) for guards in (first, from_journal, from_redis)]
    assert refusals[0] is not None and len(set(refusals)) == 1 and first.norm_refusal(9.0) is None
    from_redis.remember([{"losses": "[not json", "gradient_norm": "?", "effective_tokens": "?"}, {"losses": None}, {}])
    assert from_redis.loss_limit() == first.loss_limit()


def test_a_strange_transcript_is_an_outlier_to_a_model_that_learnt_others(
    room: tuple[Trainer, ExampleBuilder],
) -> None:
    trainer, builder = room
    guards = Guards(k=8, minimum=32)
    known = trainer.score([builder.build(conversation(1000 + i), f"k{i}") for i in range(32)])
    guards.remember([Guards.measures(known)])
    strange = builder.build(conversation(1, words=("qzx", "0x7f", "}{][", "ÿþ", "%%@", "WvWv")), "strange")
    usual = builder.build(conversation(2000), "usual")
    losses = trainer.score([usual, strange])
    assert losses["usual"] <= guards.loss_limit() < losses["strange"]
    assert "set aside" in guards.loss_reason(losses["strange"]) and guards.refused == 1


def test_gradient_norm_is_that_of_all_gradients_together(room: tuple[Trainer, ExampleBuilder]) -> None:
    trainer, builder = room
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    trainer.optimizer.zero_grad(set_to_none=True)
    assert gradient_norm(parameters) == 0.0
    before = weights_of(trainer)
    trainer.begin([builder.build(conversation(5), "five")])
    expected = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in parameters if p.grad is not None))
    assert expected > 0 and gradient_norm(parameters) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(before, weights_of(trainer))
    guards = Guards(minimum=16)
    guards.remember([Guards.measures({}, expected, 8.0)] * 4)
    assert guards.norm_refusal(1.2 * expected) is None and "norm" in str(guards.norm_refusal(50 * expected))
    trainer.optimizer.zero_grad(set_to_none=True)


def test_a_small_batch_may_have_a_larger_gradient() -> None:
    guards, dice = Guards(minimum=16), random.Random(2)
    guards.remember({"gradient_norm": dice.gauss(4, 0.3), "effective_tokens": 100} for _ in range(40))
    assert guards.norm_refusal(9.6) is not None and guards.norm_refusal(9.6, 100) is not None
    assert guards.norm_refusal(9.6, 25) is None, "half the noise of four times the tokens"
    assert guards.norm_refusal(40.0, 25) is not None and guards.norm_refusal(9.6, 400) is not None


def test_a_new_fact_after_easy_ones_is_learnt_and_what_is_worse_than_a_guess_is_not() -> None:
    """Seen with an earlier rule: 6.6 nats a token after easy transcripts, where the limit was .83."""
    dice = random.Random(4)
    guards, blind = Guards(words=49152), Guards()
    for _ in range(40):
        manifest = Guards.measures({f"t{i}": dice.gauss(0.3, 0.05) for i in range(4)}, dice.gauss(1.0, 0.1), 100.0)
        guards.remember([manifest])
        blind.remember([manifest])
    assert blind.loss_limit() < 1 and 6.6 < guards.loss_limit() == pytest.approx(math.log(49152))
    assert guards.norm_refusal(12.0, 100, 6.6) is None, "its loss explains its gradient"
    assert guards.norm_refusal(12.0, 100, 0.3) is not None, "nothing explains it"
    assert guards.norm_refusal(60.0, 100, 6.6) is not None and guards.norm_refusal(12.0, 100) is not None
    guards.remember([Guards.measures({f"h{i}": 9.0 + i % 3 for i in range(600)})])
    assert guards.loss_limit() > 11, "where hard ones are usual, they are judged by those"


def test_what_a_comment_turns_round_altogether_is_refused() -> None:
    guards, far, near = (
        Guards(),
        Answers(9, -1.0, divergence=9.0, moved=0.95),
        Answers(9, -1.0, divergence=1, moved=0.5),
    )
    for kind, said in (("comment", "shown the comment"), ("distilled", "shown the demonstration")):
        assert said in str(guards.refusal(kind, far)) and guards.refusal(kind, near) is None  # type: ignore[arg-type]
    assert guards.refusal("disliked", far) is None and Guards(0).refusal("comment", far) is None


def test_what_the_guard_refuses_by_kind_is_left_out_and_the_rest_trained(room: tuple[Trainer, ExampleBuilder]) -> None:
    trainer, builder = room

    class NoComments(Guards):
        def refusal(self, kind: Any, answers: Answers) -> str | None:
            return f"{kind} of {answers.tokens} words" if kind == "comment" else None

    asked = conversation(6).to_dict()
    examples = [
        builder.build(Transcript.from_dict(asked | fields), id)
        for id, fields in (("c", {"comment": "one two"}), ("d", {"rating": -1}), ("e", {}))
    ]
    found = trainer.begin(examples, NoComments())
    trainer.forget()
    alone = trainer.begin(examples[1:])
    trainer.forget()
    assert found.rejected == {"c": f"comment of {examples[0].trained_tokens} words"}
    assert found.nll == alone.nll and found.shares == alone.shares and sum(found.shares.values()) == pytest.approx(1)


def test_norms_of_the_first_rule_are_forgotten() -> None:
    """They were smaller by the weights: with all at .5, every gradient of today would be an outlier, for ever."""
    guards = Guards(minimum=16)
    guards.remember({"gradient_norm": 2.0, "trained_tokens": 100, "losses": [1.0]} for _ in range(40))
    assert guards.norm_refusal(4.0, 100) is None and len(guards.losses.values) == 40


def test_bad_settings_are_refused() -> None:
    for settings in ({"k": -1.0}, {"minimum": 3}, {"minimum": 64, "window": 10}):
        with pytest.raises(TandemError, match="outliers"):
            Guards(**settings)


# The canary set and the hold


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


def events(connection: redis.Redis) -> list[str]:
    return [entry[b"kind"].decode() for _, entry in connection.xrange(keys.EVENTS)]


def test_the_canary_set_is_read_and_bad_lines_are_named(room: tuple[Trainer, ExampleBuilder], tmp_path: Path) -> None:
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


def make_canary(
    room: tuple[Trainer, ExampleBuilder], bound: float | None, every: int = 2, more: Sequence[CanarySet] = ()
) -> Canary:
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
    room: tuple[Trainer, ExampleBuilder], connection: redis.Redis
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
    CanaryStep(make_canary(room, None), connection).take(4)
    assert connection.hget(keys.STATE, "canary_good") == b"4", "a set without a bound is only watched"
    assert not connection.exists(keys.manifest(4)), "no manifest is made of a canary alone"


def test_a_passing_canary_says_its_loss_and_changes_nothing(
    room: tuple[Trainer, ExampleBuilder], connection: redis.Redis
) -> None:
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


def test_a_version_is_scored_once_also_over_a_restart(
    room: tuple[Trainer, ExampleBuilder], connection: redis.Redis
) -> None:
    """A worker that ended between a version and its canary: the next one scores it; one that is judged is not again."""
    counted = CanaryStep(make_canary(room, bound=100.0), connection)
    counted.take(2)
    told: list[Report] = []
    CanaryStep(make_canary(room, bound=100.0), connection, tell=told.append).take(2)
    assert told == []
    CanaryStep(make_canary(room, bound=100.0), connection, tell=told.append).take(4)
    assert len(told) == 1 and events(connection) == ["canary", "canary"]


def test_a_failing_canary_holds_training_and_rolls_back_to_the_last_good_version(
    room: tuple[Trainer, ExampleBuilder], connection: redis.Redis
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
    room: tuple[Trainer, ExampleBuilder], connection: redis.Redis, good: int | None
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
    room: tuple[Trainer, ExampleBuilder], connection: redis.Redis, error: Exception
) -> None:
    def rollback(version: int) -> int:
        raise error

    connection.hset(keys.STATE, "canary_good", 3)
    with pytest.raises(type(error)):
        CanaryStep(make_canary(room, bound=1e-6), connection, rollback).take(8)
    assert "version 8" in (pause_switch.pause_reason(connection) or "")
    assert connection.hget(keys.STATE, "canary_version") is None, "the next worker judges it again"


def test_a_canary_that_cannot_be_scored_does_not_pass(
    room: tuple[Trainer, ExampleBuilder], connection: redis.Redis
) -> None:
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


def test_training_on_hold_loses_no_job_and_goes_on_when_resumed(redis_url: str, tmp_path: Path) -> None:
    connection, producer, weights, lines = (
        redis.Redis.from_url(redis_url),
        Producer(redis_url),
        Weights(tmp_path),
        Lines(),
    )
    good = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "good"}]
    ids = [producer.enqueue(good, id=f"t{i}").id for i in range(6)]

    class HoldsOnce(Lines):
        def on_version(self, line: dict[str, Any]) -> None:
            if line["version"] == 2:
                pause_switch.pause(connection, "the canary died")

    def check(burst: bool = True, said: Any = lines.say) -> None:
        pause_switch.wait(connection, burst=burst, stopping=lambda: False, tell=said, poll=0.01)

    with pytest.raises(UnavailableError, match="the canary died; `tandem resume`"):
        start(connection, weights, hooks=[HoldsOnce()], max_jobs=1, check=check).work(burst=True)
    assert len(weights.trained) == 2 and connection.llen(f"rq:queue:{keys.QUEUE}") == 4
    assert {producer.status(i).state for i in ids} == {"finished", "queued"}

    told: list[str] = []

    def resumed_by_a_person(sentence: str) -> None:
        told.append(sentence)
        if "paused" in sentence:
            answer = CliRunner().invoke(resume_command, ["--redis", redis_url])
            assert answer.exit_code == 0 and "it was paused: the canary died" in answer.output

    worker = start(connection, weights, hooks=[], max_jobs=1, check=lambda: check(False, resumed_by_a_person))
    worker.work(burst=True)
    assert sorted(weights.trained) == ids and told[-1] == "training goes on" and len(told) == 2
    assert {"held", "resumed"} <= set(events(connection))
    assert "not paused" in CliRunner().invoke(resume_command, ["--redis", redis_url]).output


def test_a_person_pauses_training_and_says_why(redis_url: str) -> None:
    connection = redis.Redis.from_url(redis_url)
    answer = CliRunner().invoke(pause_command, ["--redis", redis_url, "--reason", "an evaluation runs"])
    assert answer.exit_code == 0 and "tandem resume" in answer.output
    assert pause_switch.pause_reason(connection) == "an evaluation runs"
    assert "an evaluation runs" in CliRunner().invoke(resume_command, ["--redis", redis_url]).output
    assert pause_switch.pause_reason(connection) is None


def test_a_worker_on_hold_can_be_stopped(connection: redis.Redis) -> None:
    pause_switch.pause(connection, "by hand")
    answers = iter([False, False, True])
    pause_switch.wait(connection, burst=False, stopping=lambda: next(answers), tell=lambda said: None, poll=0.001)
    assert pause_switch.pause_reason(connection) == "by hand" and next(answers, None) is None


# Rehearsal


def renamed(example: Example, id: str) -> Example:
    return replace(example, id=id)


def some(names: range, builder: ExampleBuilder) -> list[Example]:
    return [builder.build(conversation(i), f"t{i}") for i in names]


def test_what_is_rehearsed_repeats_is_marked_and_is_never_of_the_batch(room: tuple[Trainer, ExampleBuilder]) -> None:
    trainer, builder = room
    old, new = some(range(20), builder), some(range(15, 25), builder)
    first, second = ReplayBuffer(0.5, renamed, seed=4), ReplayBuffer(0.5, renamed, seed=4)
    for rehearsal in (first, second):
        rehearsal.add(old)
    picked = first.pick(7, new)
    assert picked == second.pick(7, new) and len(picked) == 5
    assert first.pick(8, new) != picked != ReplayBuffer(0.5, renamed, seed=5).pick(7, new)
    assert {e.id for e in picked} <= {PREFIX + f"t{i}" for i in range(15)}
    assert ReplayBuffer.record([*new, *picked]) == {"rehearsed": [e.id.removeprefix(PREFIX) for e in picked]}
    assert ReplayBuffer.record(new) == {}
    first.add(picked)
    assert len(first.known) == 20, "what was rehearsed is not a new transcript"
    nll = trainer.begin([*new, *picked]).nll
    assert set(nll) == {e.id for e in [*new, *picked]}
    trainer.optimizer.zero_grad(set_to_none=True)


def test_the_share_holds_on_average_and_the_sample_stays_uniform(room: tuple[Trainer, ExampleBuilder]) -> None:
    _, builder = room
    old = some(range(200), builder)
    rehearsal = ReplayBuffer(0.3, renamed, capacity=50, seed=1)
    rehearsal.add(old)
    assert len(rehearsal.known) == 50 == len({e.id for e in rehearsal.known})
    late = sum(int(e.id[1:]) >= 100 for e in rehearsal.known)
    assert 12 <= late <= 38, "about half of a uniform sample is from the later half"
    counts = [len(rehearsal.pick(version, old[:1])) for version in range(1000)]
    assert set(counts) == {0, 1} and 240 <= sum(counts) <= 360
    assert ReplayBuffer(0.0, renamed).pick(1, old) == [] == ReplayBuffer(1.0, renamed).pick(1, old)
    with pytest.raises(TandemError, match="rehearse"):
        ReplayBuffer(-0.1, renamed)
