"""Factors in place of gradients: the bits of burst and streaming, and a norm that is known before the first write."""

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from stack_parts import transcripts
from test_packing import example
from transformers import AutoTokenizer

from producer.transcript import Transcript
from worker.apollo import NonFiniteGradientError
from worker.checkpoint import model_directory
from worker.config.hyperparameters import Hyperparameters
from worker.config.update_options import ApplySettings
from worker.data.batch_capacity import BatchCapacity
from worker.data.examples import Example
from worker.memory.plan import Way
from worker.model.factors import Factors, Product, Rows
from worker.trainer.device import choose_way
from worker.trainer.factory import make_builder, make_trainer
from worker.trainer.grad_norm import gradient_norm
from worker.trainer.outliers import ToldLimit
from worker.trainer.trainer import Trainer
from worker.utils import torch_setup

H = Hyperparameters(lr=1e-3, max_length=256)


@pytest.fixture(scope="module")
def examples(tiny_model: Path) -> list[Example]:
    torch_setup.prepare()
    builder = make_builder(AutoTokenizer.from_pretrained(tiny_model), tiny_model, H)
    return [builder.build(Transcript.from_dict(item), item["id"]) for item in transcripts("train", 4)]


def fresh(model_dir: Path, way: Way, dtype: torch.dtype = torch.bfloat16, h: Hyperparameters = H) -> Trainer:
    model, tokenizer = model_directory.load(model_dir, dtype)
    return make_trainer(model, model.named_parameters(), tokenizer, h, state=None, way=way)


def same(ours: Trainer, theirs: Trainer) -> None:
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(ours.optimizer.area.memory, theirs.optimizer.area.memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_streaming_bit_for_bit(tiny_model: Path, examples: list[Example], dtype: torch.dtype) -> None:
    """One forward pass: losses, weights and optimizer's state, step after step; a matrix never has a gradient."""
    factors, streaming = fresh(tiny_model, "factors", dtype), fresh(tiny_model, "streaming", dtype)
    for batch in (examples[:1], examples[1:2], examples[:1]):
        assert factors.begin(batch) == streaming.begin(batch)
        for name, parameter in factors.model.named_parameters():
            assert (parameter.grad is None) == factors.sweep.factors.takes(parameter), name
        assert factors.apply() == pytest.approx(streaming.apply())
    same(factors, streaming)


@pytest.mark.parametrize("bucket_bytes", [0, 300_000])
def test_over_several_forward_passes_they_are_a_burst(
    tiny_model: Path, examples: list[Example], bucket_bytes: int
) -> None:
    factors, burst = fresh(tiny_model, "factors"), fresh(tiny_model, "burst")
    factors.sweep.bucket_bytes = bucket_bytes
    for trainer in (factors, burst):
        trainer.budget = max(trainer.sizes)
        assert len(trainer._batches([*examples, *examples])) > 1
        trainer.begin([*examples, *examples])
        trainer.apply()
    same(factors, burst)


def test_frozen_tables_keep_nothing(tiny_model: Path, examples: list[Example]) -> None:
    h = Hyperparameters(lr=1e-3, max_length=256, embeddings="frozen")
    factors, burst = fresh(tiny_model, "factors", h=h), fresh(tiny_model, "burst", h=h)
    for trainer in (factors, burst):
        trainer.begin(examples)
        assert trainer.gradient_norm() == pytest.approx(trainer.gradient_norm(), rel=1e-3)
        trainer.apply()
    assert factors.sweep.factors.of(factors.head.weight) is None
    same(factors, burst)


def test_the_norm_is_that_of_the_gradients(tiny_model: Path, examples: list[Example]) -> None:
    factors, burst = fresh(tiny_model, "factors"), fresh(tiny_model, "burst")
    for batch in (examples[:1], examples):
        factors.begin(batch)
        burst.begin(batch)
        found = factors.gradient_norm()
        assert found == pytest.approx(gradient_norm(burst.parameters()), rel=2e-3)
        assert all(parameter.grad is None or parameter.dim() != 2 for parameter in factors.parameters())


def test_norms_that_came_with_the_factors_are_taken_as_they_are(tiny_model: Path, examples: list[Example]) -> None:
    """As a replay leaves them: those of the layers; the others are measured. What is not finite is named as ever."""
    trainer = fresh(tiny_model, "factors")
    trainer.begin(examples)
    expected = trainer.gradient_norm()
    parameters, squares = trainer.sweep.squares(trainer.body.layers.parameters())
    assert squares is not None and 0 < len(parameters) < len(trainer.parameters())
    trainer.sweep.factors.known = parameters, squares
    assert trainer.gradient_norm() == pytest.approx(expected, rel=1e-6)
    squares[0] += 3 * expected**2
    assert trainer.gradient_norm() == pytest.approx(2 * expected, rel=1e-6)
    squares[1] = math.nan
    with pytest.raises(NonFiniteGradientError, match=re.escape(trainer.optimizer.name_of(parameters[1]))):
        trainer.gradient_norm()
    trainer.forget()
    assert trainer.sweep.factors.known is None


def test_nothing_is_replayed_on_a_cpu(tiny_model: Path, examples: list[Example]) -> None:
    """No graphs are chosen, and none are looked for."""
    trainer = fresh(tiny_model, "factors")
    chosen = choose_way(trainer.model, tiny_model, H, ApplySettings(graphs="auto"), 8192, torch.device("cpu"))
    assert chosen.replayed == () and len(trainer.rows) == 0
    trainer.begin(examples[:1])
    assert not trainer.replayed


def random_factors(tokens: int, height: int, width: int, *, split: int = 0, looked_up: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(tokens + height)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    right = draw(tokens, width)
    cuts = [0, split, height] if split else [0, height]
    products = [Product(draw(tokens, b - a), right, a) for a, b in pairwise(cuts)]
    ids = torch.randint(0, height, (looked_up,), generator=generator)
    # As the head's own gradient of those rows, so that the two have an inner product that counts.
    gradient = torch.cat([product.left for product in products], 1).T[ids] @ right if looked_up else draw(0, width)
    rows = [Rows.of(ids, gradient, None)] if looked_up else []
    return Factors(torch.empty(height, width, dtype=torch.bfloat16), [(products, rows)])


@pytest.mark.parametrize("split,looked_up", [(0, 0), (100, 0), (100, 9), (0, 16)])
def test_a_norm_from_gram_matrices_is_that_of_the_product(split: int, looked_up: int) -> None:
    """A linear layer's, a head's in two blocks, a tied table's."""
    factors = random_factors(12, 300, 200, split=split, looked_up=looked_up)
    squares = factors.squares()
    assert squares is not None
    out = torch.empty(300, 200, dtype=torch.bfloat16)
    factors.write(out)
    assert math.sqrt(float(squares)) == pytest.approx(float(out.double().norm()), rel=1e-3)


def test_terms_that_cancel_are_summed_in_fp32() -> None:
    """A gradient far smaller than its tokens' shares of it: Gram matrices in bf16 would give noise. In fp32 errors of a
    millionth are .004 of squares that cancel 900 times: .002 of the norm on one CPU, less than .001 on another."""
    factors, more = random_factors(16, 300, 200), random_factors(16, 301, 200)
    product, rest = factors.passes[0][0][0], more.passes[0][0][0].left[:, :300]
    left = torch.cat([product.left, rest / 64 - product.left])
    cancelling = Factors(factors.weight, [([Product(left, product.right.repeat(2, 1))], [])])
    exact = float((left.double().T @ product.right.repeat(2, 1).double()).norm())
    assert exact < float((product.left.double().T @ product.right.double()).norm()) / 30
    squares = cancelling.squares()
    assert squares is not None and math.sqrt(float(squares)) == pytest.approx(exact, rel=0.01)


def test_where_the_product_is_cheaper_there_is_no_gram_matrix() -> None:
    assert random_factors(500, 30, 20).squares() is None


@pytest.mark.parametrize("name", ["mlp.up_proj", "linear_attn.norm", "embed_tokens"])
def test_what_is_not_finite_is_refused_before_anything_is_written(
    tiny_model: Path, examples: list[Example], name: str
) -> None:
    trainer, other = fresh(tiny_model, "factors"), fresh(tiny_model, "burst")
    trainer.begin(examples)
    parameter = next(p for n, p in trainer.model.named_parameters() if name in n)
    kept = trainer.sweep.factors.of(parameter)
    if kept is None:
        assert parameter.grad is not None
        parameter.grad[0] = math.inf
    elif kept.passes[0][0]:
        kept.passes[0][0][0].left[0, 0] = math.nan
    else:
        kept.passes[0][1][0].values[0, 0] = math.inf
    with pytest.raises(NonFiniteGradientError, match=name):
        trainer.gradient_norm()
    trainer.forget()
    same(trainer, other)
    for one in (trainer, other):
        one.begin(examples)
        one.apply()
    same(trainer, other)


def test_nothing_is_kept_after_a_step_or_by_a_score(tiny_model: Path, examples: list[Example]) -> None:
    trainer = fresh(tiny_model, "factors")
    trainer.begin(examples)
    trainer.score(examples)
    trainer.apply()
    assert all(trainer.sweep.factors.of(parameter) is None for parameter in trainer.parameters())
    trainer.score(examples)
    assert all(trainer.sweep.factors.of(parameter) is None for parameter in trainer.parameters())


def test_a_micro_batch_of_which_nothing_is_left_is_prepared_all_the_same(
    tiny_model: Path, examples: list[Example]
) -> None:
    """As the worker does: what was refused is known only then."""
    trainer = fresh(tiny_model, "factors")
    refused = trainer.begin(examples[:1], limit=ToldLimit(0.0, 0.0))
    assert not refused.nll and trainer.begun == "factors"
    trainer.prepare()
    trainer.begin(examples[:1])
    trainer.apply()


def test_layers_computed_again_keep_their_inputs_once(tiny_model: Path, examples: list[Example]) -> None:
    plain, again = fresh(tiny_model, "factors"), fresh(tiny_model, "factors")
    again.model.train()
    again.model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for trainer in (plain, again):
        trainer.begin(examples[:1])
        kept = [trainer.sweep.factors.of(p) for p in trainer.parameters()]
        assert all(len(one.passes) == 1 for one in kept if one is not None)
        assert all(len(one.passes[0][0]) + len(one.passes[0][1]) <= 2 for one in kept if one is not None)
        trainer.apply()
    same(plain, again)


@pytest.mark.parametrize(
    ("lengths", "way"),
    [
        ([400], "factors"),
        ([300, 212], "factors"),
        ([513], "streaming"),
        ([300, 213], "streaming"),
        ([2000], "streaming"),
    ],
)
def test_short_micro_batches_go_by_factors_and_long_ones_are_streamed(lengths: list[int], way: Way) -> None:
    """By the row that holds all of a micro-batch; the other ways, and rows that are padded, have no second one."""
    ones = [example(str(i), [length]) for i, length in enumerate(lengths)]
    mixed = BatchCapacity((512, 1024, 2048), packed=True, way="streaming", by_factors=512)
    assert mixed.way_of(ones) == way
    assert replace(mixed, by_factors=0).way_of(ones) == "streaming"
    assert replace(mixed, way="burst").way_of(ones) == "burst"
    assert replace(mixed, way="factors").way_of(ones) == "factors"
    assert replace(mixed, packed=False).way_of(ones) == "streaming"


def test_a_row_of_more_sequences_than_the_graphs_have_places_is_streamed_where_only_they_go_by_factors() -> None:
    mixed = BatchCapacity((512, 1024), packed=True, way="streaming", by_factors=512)
    few, many = [example("a", [20] * 15)], [example("a", [20] * 8), example("b", [20] * 8)]
    assert mixed.way_of(many) == "factors", "any number, where they fit launched as well"
    assert replace(mixed, places=15).way_of(few) == "factors"
    assert replace(mixed, places=15).way_of(many) == "streaming"
