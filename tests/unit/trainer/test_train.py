"""`tandem train` on a directory, and the trainer's own promises: weighting, what is left out, warm-up."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from stack_parts import transcripts
from transformers import AutoTokenizer

from producer.transcript import Transcript
from worker.checkpoint import model_directory
from worker.cli.train import command
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example
from worker.memory.plan import Way
from worker.model.layers import layers_of
from worker.testing.tiny_model import make_tiny
from worker.trainer.factory import make_builder, make_trainer
from worker.trainer.kernel_warmup import warm_up
from worker.trainer.trainer import Trainer
from worker.trainer.weighting import RULES, unscaled
from worker.utils import torch_setup

H = Hyperparameters(lr=1e-3, max_length=256)


@pytest.fixture(scope="module")
def examples(tiny_model: Path) -> list[Example]:
    torch_setup.prepare()
    builder = make_builder(AutoTokenizer.from_pretrained(tiny_model), tiny_model, H)
    return [builder.build(Transcript.from_dict(item), item["id"]) for item in transcripts("train", 4)]


def fresh(
    model_dir: Path, h: Hyperparameters = H, dtype: torch.dtype = torch.float32, *, way: Way = "burst"
) -> Trainer:
    model, tokenizer = model_directory.load(model_dir, dtype)
    return make_trainer(model, model.named_parameters(), tokenizer, h, state=None, way=way)


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("vision", [False, True])
def test_a_trained_directory_has_the_source_s_layout_and_other_values(tmp_path: Path, vision: bool) -> None:
    source, out = make_tiny(tmp_path / "source", vision=vision), tmp_path / "out"
    file = write(tmp_path / "lines.jsonl", transcripts("file", 4))
    arguments = [str(file), "--model", str(source), "--out", str(out), "--epochs", "3", "--batch", "2", "--lr", "1e-3"]
    result = CliRunner().invoke(command, [*arguments, "--max-length", "256"])
    assert result.exit_code == 0, result.output
    assert "6 steps" in result.output and (out / "loss.png").stat().st_size > 1000
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype and before[n].shape == after[n].shape for n in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("mlp.up_proj" in name for name in changed) and any("embed_tokens" in name for name in changed)
    assert not any("visual" in name for name in changed)
    model_directory.load(out)  # transformers takes it
    assert {f.name for f in source.iterdir()} | {"loss.png"} == {f.name for f in out.iterdir()}


def test_what_cannot_be_trained_or_written_is_said_before_any_work(tmp_path: Path, tiny_model: Path) -> None:
    good = transcripts("file", 1)
    file = write(tmp_path / "lines.jsonl", [*good, {"messages": []}])

    def error(*arguments: str) -> str:
        return str(CliRunner().invoke(command, list(arguments)).exception)

    out = str(tmp_path / "out")
    assert "line 2" in error(str(file), "--model", str(tiny_model), "--out", out)
    assert "--model" in error(str(file), "--model", str(tmp_path), "--out", out)
    assert "exists" in error(str(file), "--model", str(tiny_model), "--out", str(tmp_path))
    assert "--attach" in error(str(file))
    curve = ["--plot", str(tmp_path / "none" / "loss.png")]
    assert f"--plot: the folder {tmp_path / 'none'} does not exist" in error(str(file), "--attach", *curve)
    inside = error(str(file), "--model", str(tiny_model), "--out", out, "--plot", f"{out}/curve.png")
    assert "line 2" in inside, "OUT is made by this command"
    ratings = str(Path(__file__).parents[2] / "data" / "client_logs" / "preference_formats.jsonl")
    assert "preference pairs" in error(ratings, "--model", str(tiny_model), "--out", out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_is_burst(tiny_model: Path, examples: list[Example], dtype: torch.dtype) -> None:
    """One forward pass: the same weights and the same state, bit for bit, step after step; no gradient is kept."""
    burst, streaming = fresh(tiny_model, dtype=dtype), fresh(tiny_model, dtype=dtype, way="streaming")
    for batch in (examples[:1], examples[1:2], examples[:1]):
        assert len(burst._batches(batch)) == 1
        before = {name: p.detach().clone() for name, p in streaming.model.named_parameters()}
        begun = streaming.begin(batch)
        assert not gradients(streaming)
        assert all(torch.equal(p, before[name]) for name, p in streaming.model.named_parameters())
        assert begun == burst.begin(batch)
        assert streaming.apply() == pytest.approx(burst.apply())
        assert not gradients(streaming) and streaming.optimizer.step_count == burst.optimizer.step_count
    for (name, ours), theirs in zip(streaming.model.named_parameters(), burst.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(streaming.optimizer.area.memory, burst.optimizer.area.memory)


def test_streaming_over_several_forward_passes_is_one_step(tiny_model: Path, examples: list[Example]) -> None:
    burst, streaming = fresh(tiny_model), fresh(tiny_model, way="streaming")
    for trainer in (burst, streaming):
        trainer.budget = max(trainer.sizes)
        assert len(trainer._batches([*examples, *examples])) > 1
        trainer.begin(examples)
        trainer.apply()
        assert trainer.optimizer.step_count == 1
    for (name, ours), theirs in zip(streaming.model.named_parameters(), burst.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5, msg=name)


def test_streaming_leaves_out_what_is_not_finite_before_any_write(tiny_model: Path, examples: list[Example]) -> None:
    trainer = fresh(tiny_model, way="streaming")
    own = [set().union(*(s.ids for s in example.sequences)) for example in examples[:2]]
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[next(iter(own[1] - own[0]))] = math.nan
    assert list(trainer.begin(examples[:2]).rejected) == [examples[1].id]
    assert list(trainer.begin([examples[1]]).rejected) == [examples[1].id]
    with pytest.raises(AssertionError, match="without begin"):
        trainer.apply()


def test_warm_up_changes_nothing(tiny_model: Path, examples: list[Example]) -> None:
    """Not a bit of weights, state or gradients; the next step is the first one."""
    trainer, other = fresh(tiny_model), fresh(tiny_model)
    told: list[tuple[int, int, str]] = []
    report = warm_up(trainer, lambda done, all, what: told.append((done, all, what)))
    assert [what for _, _, what in told] == ["256 tokens", "128 tokens", "optimizer", "again", "ready"]
    assert list(report.seconds) == ["256 tokens", "128 tokens", "optimizer", "again"] and "warm-up took" in str(report)
    assert not gradients(trainer) and trainer.optimizer.step_count == 0
    for one in (trainer, other):
        one.begin(examples)
        one.apply()
    for (name, ours), theirs in zip(trainer.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(trainer.optimizer.area.memory, other.optimizer.area.memory)


@pytest.mark.parametrize(
    ("way", "within", "launched"),
    [("burst", (128, 256), 4), ("streaming", (128,), 4), ("factors", (128,), 8), ("streaming", (256,), 8)],
)
def test_the_warm_up_of_rows_that_take_less_than_the_longest_one_runs_a_few_layers(
    tmp_path: Path, way: Way, within: tuple[int, ...], launched: int
) -> None:
    """One of each kind at least; by factors all, for all are wanted. What may take more runs through all."""
    torch_setup.prepare()
    trainer = fresh(make_tiny(tmp_path / "m", layers=8), way=way)
    ran: dict[str, set[int]] = {}

    def tell(done: int, every: int, what: str) -> None:
        ran[what] = set()

    for number, layer in enumerate(layers_of(trainer.model)):
        layer.register_forward_hook(lambda *_, number=number: ran[list(ran)[-1]].add(number))
    warm_up(trainer, tell, within_longest=within)
    every = set(range(8))
    assert ran == {
        "256 tokens": every, "128 tokens": set(range(launched)), "optimizer": set(), "again": every, "ready": set()
    }  # fmt: skip


def weighing(example: Example, weight: float) -> Example:
    return dataclasses.replace(example, weight=weight)


def moved(trainer: Trainer, batch: list[Example]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """How far one step on `batch` moves every parameter, in fp64, and what `apply` says of it."""
    before = {name: p.detach().double() for name, p in trainer.model.named_parameters()}
    trainer.begin(batch)
    measured = trainer.apply()
    return {name: p.detach().double() - before[name] for name, p in trainer.model.named_parameters()}, measured


@pytest.mark.parametrize("way", ["burst", "factors", "streaming"])
def test_a_lone_transcript_of_half_the_weight_moves_the_weights_half_as_far(
    tiny_model: Path, examples: list[Example], way: Way
) -> None:
    """In fp32, and on the second step too, when the limiter and the moments remember the first."""
    runs = {}
    for weight in (1.0, 0.5, 1e-6):
        trainer = fresh(tiny_model, dataclasses.replace(H, weight_decay=0.1), way=way)
        lone = [weighing(examples[0], weight)]
        runs[weight] = [moved(trainer, [examples[1]]), moved(trainer, lone)][-1]
    whole, full = runs[1.0]
    half, halved = runs[0.5]
    for name, change in whole.items():
        assert change.abs().max() > 0, name
        assert float((half[name] - change / 2).norm()) < 1e-3 * float(change.norm()), name
    assert halved["step_scale"] == 0.5 and halved["update_rms"] == pytest.approx(full["update_rms"] / 2, rel=1e-5)
    assert runs[1e-6][1]["update_rms"] == pytest.approx(full["update_rms"] * 1e-6, rel=1e-5)


def test_the_gradient_is_that_of_the_weighted_mean_however_small_the_weights(
    tiny_model: Path, examples: list[Example]
) -> None:
    """So that a guard on its norm judges the transcripts, and no weight slips below the bound."""
    trainer = fresh(tiny_model)
    alone = [(trainer.begin([one]), gradients(trainer)) for one in examples]
    for weight in (0.5, 1e-6, 1e-300):
        found = trainer.begin([weighing(examples[0], weight)])
        assert found.loss == pytest.approx(alone[0][0].loss, rel=1e-6) and found.step_scale == weight
        assert found.effective_tokens == pytest.approx(found.trained_tokens)
        assert all(torch.allclose(gradients(trainer)[n], g, rtol=1e-4, atol=1e-9) for n, g in alone[0][1].items())
    weights = [1.0, 0.5, 0.25, 1e-6]
    together = trainer.begin([weighing(*pair) for pair in zip(examples, weights, strict=True)])
    shares = [w * one.trained_tokens for w, one in zip(weights, examples, strict=True)]
    tokens = sum(one.trained_tokens for one in examples)
    loss = sum(s * a.loss for s, (a, _) in zip(shares, alone, strict=True)) / sum(shares)
    assert together.loss == pytest.approx(loss)
    assert together.step_scale == pytest.approx(sum(shares) / tokens) and together.trained_tokens == tokens
    found_all = torch.cat([g.flatten() for g in gradients(trainer).values()]).double()
    flat = [torch.cat([g.flatten() for g in one.values()]).double() for _, one in alone]
    wanted = sum(s * g for s, g in zip(shares, flat, strict=True)) / sum(shares)
    assert float((found_all - wanted).norm()) < 1e-4 * float(wanted.norm())
    one_heavy = trainer.begin([examples[0], *(weighing(one, 1e-9) for one in examples[1:])])
    assert one_heavy.effective_tokens == pytest.approx(examples[0].trained_tokens, rel=1e-6)


def test_what_was_trained_by_the_first_rule_is_repeated_by_it(tiny_model: Path, examples: list[Example]) -> None:
    """The first rule changed the gradient's size with the weight, and the step hardly; weights of 1 mean the same."""
    trainer = fresh(tiny_model)
    whole = trainer.begin(examples[:1], rule=unscaled)
    full = gradients(trainer)
    halved = trainer.begin([weighing(examples[0], 0.5)], rule=unscaled)
    assert halved.loss == pytest.approx(whole.loss / 2, rel=1e-6) and halved.step_scale == whole.step_scale == 1.0
    assert all(torch.allclose(gradients(trainer)[n], g / 2, rtol=1e-4, atol=1e-9) for n, g in full.items())
    by_rule = [fresh(tiny_model) for _ in RULES]
    for one, rule in zip(by_rule, RULES.values(), strict=True):
        for batch in (examples[:3], examples[1:]):
            one.begin(batch, rule=rule)
            one.apply()
    first = by_rule[0]
    for other in by_rule[1:]:
        for (name, ours), theirs in zip(first.model.named_parameters(), other.model.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
        assert torch.equal(first.optimizer.area.memory, other.optimizer.area.memory)


def test_loss_of_a_batch_is_the_mean_over_all_trained_tokens(tiny_model: Path, examples: list[Example]) -> None:
    trainer = fresh(tiny_model)
    together = trainer.begin(examples)
    alone = [trainer.begin([example]) for example in examples]
    total = sum(one.trained_tokens for one in alone)
    assert together.trained_tokens == total
    assert together.loss == pytest.approx(sum(one.loss * one.trained_tokens for one in alone) / total, rel=1e-5)


def test_an_example_whose_loss_is_not_finite_is_left_out(tiny_model: Path, examples: list[Example]) -> None:
    """A poisoned embedding row: only the example that holds that token is hit."""
    trainer = fresh(tiny_model)
    own = [set().union(*(s.ids for s in example.sequences)) for example in examples[:2]]
    token = next(iter(own[1] - own[0]))
    embedding = trainer.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[token] = math.nan
    found = trainer.begin(examples[:2])
    assert list(found.rejected) == [examples[1].id] and list(found.nll) == [examples[0].id]
    assert all(torch.isfinite(gradient).all() for gradient in gradients(trainer).values())


def test_warm_up_rises_with_the_optimizer_s_own_count(tiny_model: Path, examples: list[Example]) -> None:
    trainer = fresh(tiny_model, dataclasses.replace(H, warmup=4))
    rates = []
    for _ in range(6):
        trainer.begin(examples[:1])
        rates.append(trainer.apply()["lr"])
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_frozen_embeddings_stay_and_the_rest_learns(tiny_model: Path, examples: list[Example]) -> None:
    trainer = fresh(tiny_model, dataclasses.replace(H, embeddings="frozen"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.begin(examples)
    trainer.apply()
    same = {name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])}
    assert same == {"model.embed_tokens.weight", "lm_head.weight"}


def test_stochastic_rounding_follows_fp32_where_nearest_does_not(tiny_model: Path, examples: list[Example]) -> None:
    """Twelve small steps: what each kind of weights has learnt of what fp32 weights learn."""
    learnt = {}
    for name, dtype, rounding in (
        ("fp32", torch.float32, "nearest"),
        ("stochastic", torch.bfloat16, "stochastic"),
        ("nearest", torch.bfloat16, "nearest"),
    ):
        trainer = fresh(tiny_model, dataclasses.replace(H, lr=1e-5, rounding=rounding), dtype)
        first = trainer.begin(examples).loss
        for _ in range(12):
            trainer.apply()
            last = trainer.begin(examples).loss
        learnt[name] = first - last
    assert learnt["fp32"] > 0
    assert learnt["stochastic"] > 0.7 * learnt["fp32"]
    assert learnt["nearest"] < 0.6 * learnt["fp32"], learnt
