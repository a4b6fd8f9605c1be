"""Rehearsal: which old transcripts are trained again."""

from dataclasses import replace

import pytest
from few_words import Room, conversation

from producer.errors import TandemError
from worker.data.examples import Example, ExampleBuilder
from worker.data.replay_buffer import PREFIX, ReplayBuffer


def renamed(example: Example, id: str) -> Example:
    return replace(example, id=id)


def some(names: range, builder: ExampleBuilder) -> list[Example]:
    return [builder.build(conversation(i), f"t{i}") for i in names]


def test_what_is_rehearsed_repeats_is_marked_and_is_never_of_the_batch(room: Room) -> None:
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


def test_the_share_holds_on_average_and_the_sample_stays_uniform(room: Room) -> None:
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
