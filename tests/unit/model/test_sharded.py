"""Two ranks, each with its part of the tiny Qwen3.5, compute what one process computes.

The tiny model has one key head: both ranks hold it, and its gradient is the sum of theirs.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import rank_program as ranks
import torch
from shard_parts import divide, make_grouped, part_of, run_ranks
from transformers import Gemma2Config

from worker.model import ModelError
from worker.model.shard_group import ShardGroup
from worker.model.sharded import build_sharded, divided
from worker.shared_weights import bind
from worker.trainer.factory import make_trainer
from worker.utils.shard import Shard, assemble


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_grouped(tmp_path_factory.mktemp("grouped"))


@pytest.fixture(scope="module")
def found(tiny_model: Path, grouped: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the ranks found, all in one start of their processes."""
    scenarios = ("gradients", "steps", "streaming", "vocabulary", f"kinds@{grouped}")
    return run_ranks(tmp_path_factory.mktemp("ranks"), tiny_model, *scenarios)


def whole(model: Path, name: str, shape: torch.Size, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensor of which each rank has a part; what both have in full is the same, bit for bit."""
    parts = [part_of(name, shape, bind.text_config(model), rank, len(tensors)) for rank in range(len(tensors))]
    if parts[0] is None:
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors), name
    return assemble(zip(tensors, parts, strict=True))


def test_loss_and_gradients_are_one_process_s(tiny_model: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """In fp32, up to the order of sums: 2e-5 of a gradient at most (A_log's, behind a solve) where it was written; 8e-5
    below, where one process's own gradient moves as far when its weights change by 1e-7."""
    one = ranks.gradients_of(ranks.whole_trainer(tiny_model, torch.float32), ranks.examples())
    check_gradients(tiny_model, one, found["gradients"])


def check_gradients(model: Path, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert two[0]["loss"] == two[1]["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert two[0]["nll"] == two[1]["nll"] == pytest.approx(one["nll"], rel=1e-6)
    assert two[0]["norm"] == two[1]["norm"] == pytest.approx(one["norm"], rel=1e-4)
    assert one["gradients"].keys() == two[0]["gradients"].keys()
    for name, expected in one["gradients"].items():
        gradient = whole(model, name, expected.shape, [rank["gradients"][name] for rank in two])
        assert (gradient - expected).norm() <= 3e-4 * expected.norm(), name
        assert expected.norm() > 0, name


def test_every_loss_of_a_model_with_more_key_heads(grouped: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """And with biases, a tied table whose parts are of different sizes, and a word without a gradient."""
    one = ranks.gradients_of(ranks.whole_trainer(grouped, torch.float32), ranks.every_kind())
    check_gradients(grouped, one, found["kinds"])


def test_after_twenty_steps_the_parts_put_together_are_one_process_s(
    tiny_model: Path, found: dict[str, list[dict[str, Any]]]
) -> None:
    """In fp32: they moved by .0075 of their size at most, and are apart by a thousandth of that way at most (seen:
    2e-5)."""
    start = ranks.whole_weights(tiny_model, torch.float32)
    one, two = ranks.steps_of(ranks.whole_trainer(tiny_model, torch.float32)), found["steps"]
    assert two[0]["losses"] == two[1]["losses"] == pytest.approx(one["losses"], abs=1e-4)
    for name, expected in one["weights"].items():
        weight = whole(tiny_model, name, expected.shape, [rank["weights"][name] for rank in two])
        assert (weight - expected).norm() <= 1e-3 * (expected - start[name]).norm(), name
    three = ranks.steps_of(ranks.whole_trainer(tiny_model, torch.float32, "streaming"), 3)
    streamed = found["streaming"]
    assert streamed[0]["losses"] == streamed[1]["losses"] == pytest.approx(three["losses"], abs=1e-4)
    for name, expected in three["weights"].items():
        weight = whole(tiny_model, name, expected.shape, [rank["weights"][name] for rank in streamed])
        assert (weight - expected).norm() <= 1e-3 * (expected - start[name]).norm(), name
    for key, value in one["said"].items():
        assert two[0]["said"][key] == two[1]["said"][key] == pytest.approx(value, rel=1e-3), key


def test_the_divided_vocabulary_s_loss_is_the_whole_s(found: dict[str, list[dict[str, Any]]]) -> None:
    """Of tokens with and without a teacher, with a scale, a cap and a bias, over parts of different sizes."""
    one, two = ranks.head(*ranks.head_parts()), found["vocabulary"]
    for key, expected in one.items():
        by_rows = key.endswith(("weight", "bias"))
        results = [torch.cat([rank[key] for rank in two])] if by_rows else [rank[key] for rank in two]
        for result in results:
            torch.testing.assert_close(
                result, expected, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key} {text}"
            )


def test_the_divided_vocabulary_s_loss_is_that_of_float64(found: dict[str, list[dict[str, Any]]]) -> None:
    """Written out, in double precision."""
    weight, bias = (part.double() for part in ranks.head_parts())
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(12, 32, generator=generator).double().requires_grad_()
    torch.randn(5, 32, generator=generator)
    targets = torch.tensor(ranks.TARGETS)
    factors = torch.rand(12, generator=generator).double() - 0.2
    weight.requires_grad_(), bias.requires_grad_()
    logits = 20 * torch.tanh((hidden @ weight.T + bias) * 0.5 / 20)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (nll * factors).sum().backward()
    two = found["vocabulary"]
    for rank in two:
        torch.testing.assert_close(rank["nll"].double(), nll.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank["to_hidden"].double(), hidden.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([r["to_weight"] for r in two]).double(), weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([r["to_bias"] for r in two]).double(), bias.grad, rtol=1e-5, atol=1e-5)


class OneRank(ShardGroup):
    """A group of two of which only this rank is there: for what is refused before anything is computed."""

    def __init__(self) -> None:
        self.rank, self.ranks = 0, 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads 3 of the model does not divide by 2 ranks"),
        ({"num_key_value_heads": 3}, "3 key heads do not divide over 2 ranks"),
    ],
)
def test_models_that_do_not_divide_are_refused(tiny_model: Path, change: dict[str, Any], message: str) -> None:
    config = bind.text_config(tiny_model)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ModelError, match=message):
        divided(config, 2, 512)


def test_other_models_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="a gemma2 that is divided over ranks is not known"):
        divided(Gemma2Config(), 2, 512)


def test_a_part_whose_use_is_not_known_is_refused_by_name(tiny_model: Path) -> None:
    """A norm over heads that is divided, as other models have it, would need the mean over all ranks."""
    tensors, shards = divide(ranks.whole_weights(tiny_model, torch.float32), bind.text_config(tiny_model), 0, 2)
    name = "model.layers.3.self_attn.q_norm.weight"
    shards[name] = Shard((128,), 0, ((0, 64),))
    with pytest.raises(ModelError, match=f"{name} is divided over ranks"):
        build_sharded(tiny_model, tensors, shards, OneRank())
    del shards[name], shards["lm_head.weight"]
    with pytest.raises(ModelError, match="not divided by rows, and alike"):
        build_sharded(tiny_model, tensors, shards, OneRank())


def test_factors_are_refused(tiny_model: Path) -> None:
    tensors, shards = divide(ranks.whole_weights(tiny_model, torch.float32), bind.text_config(tiny_model), 0, 2)
    model = build_sharded(tiny_model, tensors, shards, OneRank())
    for way, tokens in (("factors", 0), ("burst", 64)):
        with pytest.raises(ModelError, match="--apply burst or streaming"):
            make_trainer(
                model, model.named_parameters(), ranks.Tokenizer(), ranks.H, state=None, way=way,
                by_factors=tokens, shards=shards, sum_over_shards=lambda tensors: None,
            )  # fmt: skip


def test_the_configuration_of_a_rank(tiny_model: Path) -> None:
    before = json.loads((tiny_model / "config.json").read_text())
    config = divided(bind.text_config(tiny_model), 2, 500)
    assert config.num_attention_heads * 2 == before["num_attention_heads"] and config.num_key_value_heads == 1
    assert config.head_dim == before["head_dim"] and config.vocab_size == 500
    assert config.linear_num_value_heads * 2 == before["linear_num_value_heads"]
