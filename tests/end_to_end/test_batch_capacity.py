"""What a trainer takes at once, known before: a batch too large for the worker that would replay it changes nothing.

Redis is real; the server is the stand-in, whose memory and sockets are real (tests/helpers/stand_in.py).
A trainer on a GPU packs sequences; here it is made on a CPU, which can pack them as well.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from durable_parts import Site, transcripts
from hypothesis import given
from hypothesis import strategies as st
from test_packing import example
from transformers import AutoTokenizer

from producer.errors import TandemError
from producer.transcript import Transcript
from worker.checkpoint import model_directory, record_file
from worker.checkpoint.ancestry import RebuildError
from worker.checkpoint.batch_codec import Ready, ReplayError, pack_batch
from worker.checkpoint.manager import CheckpointManager
from worker.checkpoint.records import UpdateRecord
from worker.checkpoint.replay import CapacityOf, check_fits, plain_hyperparameters
from worker.checkpoint.snapshots import Trained
from worker.checkpoint.state_dir import StateDir
from worker.cli import rollback, train
from worker.config.hyperparameters import Hyperparameters
from worker.config.retention import Policy
from worker.data.batch_capacity import BatchCapacity, capacity_for
from worker.data.packing import BatchError
from worker.memory.plan import Way
from worker.orchestrator import session as sessions
from worker.orchestrator.agreement import agree
from worker.orchestrator.live_update import LiveUpdate
from worker.orchestrator.recovery import mend_weights
from worker.orchestrator.reports import sentence
from worker.orchestrator.rollback import roll_back
from worker.orchestrator.session import Session, open_session
from worker.serving.control_client import ServerControl
from worker.shared_weights.attach import attach
from worker.shared_weights.header import APPLYING, CLEAN
from worker.trainer.device import choose_way
from worker.trainer.factory import make_trainer
from worker.trainer.trainer import Trainer

H = Hyperparameters(lr=3e-4, max_length=512)
ROW = 512
"""Tokens of the longest packed row of the trainers here."""
STREAMING = partial(capacity_for, packed=True, way="streaming", budget=ROW)
pytestmark = pytest.mark.usefixtures("as_it_was")


# A room is its trainer's


@pytest.fixture(scope="module")
def padding(tiny_model: Path) -> Trainer:
    model, tokenizer = model_directory.load(tiny_model)
    return make_trainer(model, model.named_parameters(), tokenizer, H, state=None)


def as_on_a_gpu(trainer: Trainer, sizes: tuple[int, ...] = (ROW,), *, way: Way = "streaming") -> Trainer:
    """Another on the same model and optimizer, that packs."""
    return Trainer(trainer.model, trainer.optimizer, pad_id=0, lr=trainer.lr, sizes=sizes, packed=True, way=way)


@given(
    lengths=st.lists(st.lists(st.integers(2, 80), min_size=1, max_size=3), min_size=1, max_size=4),
    packed=st.booleans(),
    way=st.sampled_from(["burst", "factors", "streaming"]),
)
def test_a_room_holds_what_its_trainer_takes(
    padding: Trainer, lengths: list[list[int]], packed: bool, way: Way
) -> None:
    examples = [example(f"e{i}", some) for i, some in enumerate(lengths)]
    trainer = Trainer(padding.model, padding.optimizer, pad_id=0, lr=1.0, sizes=(32, 64), packed=packed, way=way)
    if trainer.room.holds(examples):
        passes = len(trainer._batches(examples))
        assert passes == 1 or not (packed and way != "burst")
        return
    with pytest.raises(BatchError):
        trainer.begin(examples)
    if packed:  # what it needs is enough
        trainer.sizes = (32, trainer.room.needs(examples))
        assert trainer.room.holds(examples) and trainer._batches(examples)


def test_a_room_is_known_before_its_trainer(padding: Trainer) -> None:
    assert padding.room == capacity_for(H, packed=False, way="burst")
    assert padding.room == BatchCapacity((128, 256, 512), packed=False, way="burst")
    assert capacity_for(H, packed=True, way="streaming").longest == 8192
    assert capacity_for(replace(H, max_length=16384), packed=True, way="streaming").longest == 16384
    # What memory was planned for is the bound, also for a batch of a day of longer conversations.
    assert capacity_for(replace(H, max_length=16384), packed=True, way="burst", budget=1024).longest == 1024


# What is refused


NOBODY = frozenset[str]()


def step_of(version: int, lengths: list[int]) -> UpdateRecord:
    """A journaled batch: an example of one sequence for each length."""
    batch = pack_batch(Ready(example(f"e{i}", [length]), {}) for i, length in enumerate(lengths))
    return UpdateRecord(version, "b" * 32, 0, 0, [], batch, {}, h=plain_hyperparameters(H))


def refusal(steps: list[UpdateRecord], room: CapacityOf) -> str:
    with pytest.raises(ReplayError) as refused:
        check_fits(steps, NOBODY, room)
    return str(refused.value)


def test_the_refusal_names_what_needs_the_most_and_a_way_that_is_not_refused_again() -> None:
    steps = [step_of(4, [300, 200]), step_of(5, [300, 300]), step_of(6, [500, 300]), step_of(7, [510, 3])]
    said = refusal(steps, STREAMING)
    assert said.startswith("version 6 ") and "its batch has 800 tokens" in said and "takes 512 at most" in said
    assert "nothing was changed" in said and "--apply burst, or --max-tokens 800" in said
    check_fits(steps, NOBODY, partial(STREAMING, budget=800))
    check_fits(steps, NOBODY, partial(STREAMING, way="burst"))
    check_fits(steps, NOBODY, partial(capacity_for, packed=False, way="streaming"))  # a CPU takes several passes
    check_fits(steps, frozenset({"e0"}), STREAMING)


def test_a_sequence_that_is_longer_than_any_row_fits_in_no_way() -> None:
    steps = [step_of(1, [300, 300]), step_of(2, [600])]
    said = refusal(steps, partial(STREAMING, way="burst"))
    assert "version 2 " in said and "a sequence of its batch has 600 tokens" in said
    assert "Use --max-tokens 600" in said and "burst" not in said
    said = refusal(steps, STREAMING)
    assert "--max-tokens 600" in said and "burst" not in said, "burst would be refused too"
    check_fits(steps, NOBODY, partial(STREAMING, budget=600))
    cpu = refusal(steps, partial(capacity_for, packed=False, way="burst"))
    assert "version 2 " in cpu and "--" not in cpu, "no flag makes a CPU's rows longer than the record's --max-length"


# Recovery and rollback


def teach(session: Session) -> int:
    """Two versions by bursts, the second of more tokens than a row, which are returned."""
    step = LiveUpdate(session)
    session.manager.adopt(0, session.weights.header.lineage, Trained({}, {}))
    tokens = 0
    for prefix, times in (("x", 1), ("y", 24)):
        sent = transcripts(prefix, 2)
        for item in sent:
            item["messages"][0]["content"] *= times
        batch = [step.prepare(item["id"], Transcript.from_dict(item)) for item in sent]
        tokens = sum(ready.tokens for ready in batch)
        assert (tokens > ROW) == (prefix == "y")
        step.run(batch)
    assert session.weights.header.version == 2
    return tokens


@contextlib.contextmanager
def streaming_keeper(site: Site) -> Iterator[CheckpointManager]:
    """Of a worker that attaches anew, as on a GPU with room for streaming alone: see `open_session`."""
    weights = attach(site.run_dir)
    model, tokenizer = weights.build_model(), AutoTokenizer.from_pretrained(weights.model_path)
    make = partial(make_trainer, model, list(model.named_parameters()), tokenizer, state=weights.state)
    with StateDir(site.state) as state:
        manager = CheckpointManager(state, weights, lambda h: as_on_a_gpu(make(h)), STREAMING, Policy())
        with contextlib.closing(manager):
            yield manager


@pytest.mark.parametrize("found", [CLEAN, APPLYING])
def test_a_recovery_that_would_not_fit_changes_nothing(site: Site, found: str) -> None:
    with open_session(site.run_dir, "test", H, state_dir=site.state) as session:
        tokens, taught = teach(session), site.everything()
        if found == APPLYING:
            session.control.pause()
            session.weights.header.begin(session.control.fence)  # as a worker does that then dies
    if found == APPLYING:
        site.is_torn()
    else:
        site.restart_server()
    before, header, served = site.everything(), site.header(), site.served()
    assert header["state"] == found
    with streaming_keeper(site) as manager, ServerControl(site.run_dir, "next") as control:
        with pytest.raises(RebuildError, match=f"version 2 .*{tokens} tokens.* 512 .*burst, or --max-tokens {tokens}"):
            mend_weights(manager, control, None)
        assert site.header() == header and site.everything() == before
    assert site.served() == served, "nor was it paused"
    with open_session(site.run_dir, "test", H, state_dir=site.state):  # as the message says: in burst
        assert site.everything() == taught and site.served()["state"] == "serving"


def test_a_rollback_that_would_not_fit_changes_nothing(site: Site) -> None:
    with open_session(site.run_dir, "test", H, state_dir=site.state) as session:
        tokens, manager = teach(session), session.manager
        before, header, served = site.everything(), site.header(), site.served()
        trainer, rebuilder = session.trainer, manager.rebuilder
        make, room = rebuilder.make_trainer, rebuilder.room
        rebuilder.make_trainer, rebuilder.room = (lambda h: as_on_a_gpu(make(h))), STREAMING
        with pytest.raises(RebuildError, match=f"version 2 .*{tokens} tokens.* 512 .*burst, or --max-tokens {tokens}"):
            roll_back(site.redis, session, 2, ("x-0",))
        assert site.header() == header and site.everything() == before and site.served() == served
        assert manager.history.latest() == (2, header["lineage"]) and session.trainer is trainer
        assert rebuilder.plan(1).steps and rebuilder.plan(2, frozenset({"y-0"})).steps, (
            "without one of them it would fit"
        )
        rebuilder.make_trainer, rebuilder.room = make, room
        agree(site.redis, session)
        said = roll_back(site.redis, session, 2, ("x-0",))
        assert any("version 3 is live: it is version 2 without x-0" in text for text in map(sentence, said))


def test_a_command_plans_for_as_many_tokens_as_it_is_told(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tandem rollback` and `tandem train --attach`, as the worker. A CPU needs no plan: the call for it is watched."""
    asked = []

    def watched(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments[4], arguments[3].memory))
        return choose_way(*arguments, **options)

    monkeypatch.setattr(sessions, "choose_way", watched)
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in transcripts("x", 2)))
    where = ["--run-dir", str(site.run_dir), "--state-dir", str(site.state)]
    more = ["--max-tokens", "12000", "--memory", "30"]
    trained = [str(file), "--attach", "--plot", str(tmp_path / "loss.png"), *where]
    back = ["0", "--redis", site.store.url, *where]
    site.work("--max-jobs", "1")
    for command, arguments in ((train.command, trained), (rollback.command, back)):
        for options in (more, []):
            result = CliRunner().invoke(command, [*arguments, *options])
            assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    assert asked == [(12000, 30.0), (8192, None)] * 2


# The optimizer's steps, and what a checkpoint holds


def rewrite(site: Site, version: int, **change: Any) -> None:
    """As of another state directory: the record of `version` in the journal says something else."""
    for path in (site.state / "journal").glob("*.journal"):
        records = [record for _, record in record_file.scan(path, last=False).records]
        changed = [r | change if r["kind"] == "update" and r["version"] == version else r for r in records]
        path.write_bytes(b"".join(map(record_file.pack, changed)))


def test_steps_that_do_not_follow_on_each_other_are_found_before_the_first_write(site: Site) -> None:
    with open_session(site.run_dir, "test", H, state_dir=site.state) as session:
        teach(session)
        agree(site.redis, session)
    rewrite(site, 2, step=7)
    before, header = site.everything(), site.header()
    with open_session(site.run_dir, "test", H, state_dir=site.state) as session:  # whole: nothing to replay
        served = site.served()
        with pytest.raises(RebuildError, match=r"version 2 was step 7 of the optimizer.*stand at 1.*nothing was"):
            roll_back(site.redis, session, 2, ("x-0",))
        assert session.manager.history.latest() == (2, header["lineage"]), "nor was it journaled"
        assert site.everything() == before and site.header() == header and site.served() == served
    site.restart_server()
    fresh, header = site.everything(), site.header()
    with (
        pytest.raises(RebuildError, match="version 2 was step 7"),
        open_session(site.run_dir, "test", H, state_dir=site.state),
    ):
        raise AssertionError("what was learnt cannot be made again")
    assert site.everything() == fresh and site.header() == header and site.served()["state"] == "serving"


def test_a_checkpoint_of_other_steps_or_another_shape_is_found_before_the_first_write(site: Site) -> None:
    """Its bytes are those that were written: no digest finds this."""
    with open_session(site.run_dir, "test", H, state_dir=site.state) as session:
        teach(session)
        agree(site.redis, session)
        history, weights, rebuilder = session.manager.history, session.weights, session.manager.rebuilder
        state = weights.state.clone()
        state[8] = 5  # the step count: apollo/state_layout.py
        history.snapshots.write(1, weights.header.lineage, weights.tensors, state, history.trained(1))
        with pytest.raises(RebuildError, match="version 2 was step 1 of the optimizer, which would stand at 5"):
            rebuilder.plan(2)
        short = dict(weights.tensors)
        name = max(short)
        weights.tensors[name] = torch.zeros(3, 5)
        with pytest.raises(RebuildError, match=f"does not fit the server's weights: {name}"):
            rebuilder.plan(1)
        weights.tensors[name] = short[name]


# train --attach


def test_a_file_with_a_batch_that_does_not_fit_trains_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = transcripts("x", 6)
    for item in sent[-2:]:
        item["messages"][0]["content"] *= 24
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in sent))

    @contextlib.contextmanager
    def on_a_gpu(*arguments: Any, **options: Any) -> Iterator[Session]:
        with open_session(*arguments, **options) as session:
            session.trainer = as_on_a_gpu(session.trainer)
            yield session

    monkeypatch.setattr(sessions, "open_session", on_a_gpu)
    before = site.digest()
    with pytest.raises(TandemError, match=r"nothing was trained: a batch has \d+ tokens.* 512 at most.*--max-tokens"):
        train.train_attached(str(file), site.run_dir, H, count=1, batch=6, state_dir=site.state)
    assert site.header()["version"] == 0 and site.digest() == before
