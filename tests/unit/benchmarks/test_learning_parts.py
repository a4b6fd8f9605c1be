"""What benchmarks/learning.py computes by itself: rows that share a prefix, update rules, what it reads off a curve."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from worker.utils import torch_setup

torch_setup.prepare()
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from contenders import LABELS, RULES, Setting, load_model, make  # noqa: E402
from learning import Bench, grid  # noqa: E402
from learning_curves import STUDENT, Curve, difference, interval  # noqa: E402
from learning_tasks import Data, Task, manner, places  # noqa: E402
from own_answers import answered, draw  # noqa: E402
from shapes import write_shape  # noqa: E402
from shared_prefix import Asked, backward, make_rows, score, token_losses  # noqa: E402
from update_rules import Adam, Apollo, RuleOptimizer  # noqa: E402

from worker.apollo import ApolloMini  # noqa: E402
from worker.data.examples import Example, TokenSequence  # noqa: E402

CPU = torch.device("cpu")


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def conversations(count: int) -> list[Example]:
    """Two beginnings, of 9 and 5 tokens, then question and answer of any length."""
    draw = random.Random(5)
    made = []
    for number in range(count):
        begin = [7] * 9 if number % 3 else [11] * 5
        asked, answered = ([draw.randrange(97) for _ in range(draw.randrange(1, 7))] for _ in range(2))
        ids = (*begin, *asked, *answered)
        mask = (False,) * (len(ids) - len(answered)) + (True,) * len(answered)
        made.append(Example(f"e{number}", (TokenSequence(ids, mask),), 1.0, {}))
    return made


def test_rows_that_share_a_prefix_give_the_losses_and_gradients_of_separate_sequences() -> None:
    model, examples = small_model(), conversations(11)
    rows = make_rows(examples, CPU, longest=60)
    assert 1 < len(rows) < len(examples)
    assert sum(row.ids.numel() for row in rows) < 0.7 * sum(example.tokens for example in examples)
    backward(model, examples, CPU)
    packed = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    count = sum(example.trained_tokens for example in examples)
    alone = []
    for example in examples:
        ids, mask = example.sequences[0].ids, torch.tensor(example.sequences[0].mask)
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids)[1:], reduction="none")[mask[1:]]
        (nll.sum() / count).backward()
        alone.append(float(nll.detach().mean()))
    assert score(model, examples, CPU) == pytest.approx(alone, rel=1e-5)
    for parameter, gradient in zip(model.parameters(), packed, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_every_trained_token_stands_in_one_row() -> None:
    examples = conversations(23)
    found: dict[int, list[int]] = {}
    for row in make_rows(examples, CPU, longest=40):
        assert len(token_losses(small_model(), row)) == len(row.targets)
        for owner, target in zip(row.owners.tolist(), row.targets.tolist(), strict=True):
            found.setdefault(owner, []).append(target)
    wanted = {i: [t for t, on in zip(e.sequences[0].ids, e.sequences[0].mask, strict=True) if on]
              for i, e in enumerate(examples)}  # fmt: skip
    assert found == wanted


def gradients(shape: tuple[int, int], steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_the_rules_are_those_of_torch_and_of_the_real_optimizer(shape: tuple[int, int]) -> None:
    """AdamW, and APOLLO-Mini with the same projection, over steps of different sizes."""
    drawn = torch.randn(min(shape), 1, generator=torch.Generator().manual_seed(1))  # as the rule draws at seed 0

    def given(index: int, wanted: tuple[int, int], draw: int) -> torch.Tensor:
        return drawn.view(wanted)

    pairs = [(Adam(), lambda p: torch.optim.AdamW([p], lr=1e-2, weight_decay=0.0)),
             (Apollo(), lambda p: ApolloMini([p], lr=1e-2, projection=given))]  # fmt: skip
    for rule, peer in pairs:
        ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
        optimizer, other = RuleOptimizer([("w", ours)], rule, seed=0), peer(theirs)
        for t, gradient in enumerate(gradients(shape, 9)):
            ours.grad, theirs.grad = gradient * (t + 1), gradient * (t + 1)
            optimizer.step(1e-2)
            other.step()
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-8), rule


@pytest.mark.parametrize("name", [name for name in RULES if name != "sgd"])
def test_every_rule_s_first_step_is_about_as_long_as_adamw_s(name: str) -> None:
    gradient = gradients((64, 48), 1)[0]
    memory = {"seed": 3}
    size = float(RULES[name][1].direction(gradient, memory, 1).square().mean().sqrt())
    assert 0.5 < size < 2 if name != "apollo-1" else size > 0.5  # rank 1: some channel is nearly orthogonal to P
    kept = sum(value.numel() for key, value in memory.items() if torch.is_tensor(value) and key != "p")
    assert kept == RULES[name][1].numbers(64, 48)


def test_a_pulled_and_frozen_contender() -> None:
    model = small_model()
    sources = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    contender = make(Setting("mini", 1e-2, freeze="embeddings", pull=1.0), model, sources)
    backward(model, conversations(3), CPU)
    contender.step(1e-2)
    assert all(torch.equal(parameter, sources[name]) for name, parameter in model.named_parameters())
    contender = make(Setting("adamw", 1e-2, freeze="embeddings"), model, sources)
    backward(model, conversations(3), CPU)
    contender.step(1e-2)
    same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, sources[name])}
    assert same == {"model.embed_tokens.weight"}


def test_settings_have_names_of_their_own() -> None:
    settings = [Setting(name, 1e-5, seed) for name in LABELS for seed in (0, 1)]
    settings += [Setting("mini", 1e-5, pull=0.1), Setting("mini", 1e-5, freeze="mlp"), Setting("mini", 1e-5, batch=40)]
    assert len({setting.key for setting in settings}) == len(settings)
    assert Setting("mini", 1e-5, 1, pull=0.1).key == "mini lr=1e-05 seed=1 pull=0.1"


def test_a_model_with_recurrent_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="recurrent"):
        load_model(write_shape("tiny", tmp_path / "tiny"), CPU)


def test_what_is_trained_is_never_asked(tmp_path: Path) -> None:
    for trained, unseen in (places(), manner()):
        assert len(set(trained) | set(unseen)) == len(trained) + len(unseen)
        assert not {question for question, _ in trained} & {question for question, _ in unseen}
    assert {answer for _, answer in places()[1]} <= {answer for _, answer in places()[0]}


def test_the_source_model_answers_after_each_prompt_as_it_would_alone() -> None:
    """Drawn in one padded batch: an answer's tokens are likely ones of its own prompt, and are what is scored."""
    model, examples = small_model(), conversations(40)
    end = draw(model, examples, 6)[0][2]
    model.generation_config.eos_token_id = end
    answers = draw(model, examples, 6)
    assert answers == draw(model, examples, 6)
    assert any(len(answer) < 6 for answer in answers)
    assert all(end not in answer[:-1] and (len(answer) == 6 or answer[-1] == end) for answer in answers)
    own = [answered(*pair) for pair in zip(examples, answers, strict=True)]
    assert [example.trained_tokens for example in own] == [len(answer) for answer in answers]
    shifted = [answered(*pair) for pair in zip(examples, answers[1:] + answers[:1], strict=True)]
    assert sum(score(model, own, CPU)) < sum(score(model, shifted, CPU)) - 10


def test_the_rise_is_read_where_identity_falls_through_the_level() -> None:
    def scored(identity: float, *held: float) -> dict[str, list[float]]:
        return {"identity": [identity], "facts": [1.0], "held": list(held)}

    key = "mini lr=1e-05 seed=0"
    versions = {"3": scored(0.65, 1.1, 2.0), "5": scored(0.25, 1.3, 2.4)}
    report = {
        "tokens": {"identity": [1], "facts": [1], "held": [30, 10]}, "start": scored(3.0, 1.0, 2.0),
        "runs": {key: {"setting": {"method": "mini", "lr": 1e-5}, "versions": versions, "moved": {}}},
    }  # fmt: skip
    level = Curve(report, list(report["runs"])).at_level()
    assert level is not None
    assert level[0] == pytest.approx(4.0)
    assert level[1] == {0: pytest.approx([0.2, 0.2])}
    assert interval(level[1], [30, 10]).half == pytest.approx(0.0)
    assert interval({0: [0.0, 0.4]}, [30, 10]).mean == pytest.approx(0.1)
    between = Curve(report, list(report["runs"])).at_level("rise", [0.55, 0.45, 0.35])
    assert between is not None
    assert between[1] == {0: pytest.approx([0.2, 0.2])}, "a mean over levels"
    assert Curve(report, list(report["runs"])).at_level("rise", [0.45, 0.2]) is None, "a level that is not reached"
    del report["runs"][key]["versions"]["3"]
    assert Curve(report, list(report["runs"])).at_level() is None, "one scored version is no bracket"


def test_an_interval_is_over_answers_and_over_seeds_and_a_difference_is_taken_seed_by_seed() -> None:
    """Answers that differ by as much in every seed say nothing of seeds, seeds that differ say nothing of answers."""
    one, three = interval({0: [0.0, 1.0]}, [1, 1]), interval({seed: [0.0, 1.0] for seed in range(3)}, [1, 1])
    assert (three.mean, three.answers, three.seeds) == pytest.approx((0.5, one.answers, 0.0))
    seeds = interval({0: [1.0, 1.0], 1: [2.0, 2.0], 2: [3.0, 3.0]}, [1, 1])
    assert (seeds.mean, seeds.answers) == pytest.approx((2.0, 0.0))
    assert seeds.half == pytest.approx(STUDENT[1] / math.sqrt(3))
    assert difference({1: [2.0], 2: [5.0]}, {0: [9.0], 1: [0.5], 2: [1.0]}) == {1: [1.5], 2: [4.0]}


def test_the_divergence_is_that_of_the_distributions_and_what_a_drawn_answer_s_rise_estimates() -> None:
    source, other, examples = small_model(), small_model(), conversations(9)
    asked = Asked(examples, CPU, source)
    assert asked.compare(source) == (pytest.approx(asked.losses(source)), pytest.approx([0.0] * 9, abs=1e-6))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    losses, divergences = asked.compare(other)
    assert losses == pytest.approx(score(other, examples, CPU), rel=1e-5)
    for example, divergence in zip(examples, divergences, strict=True):
        ids, mask = torch.tensor([example.sequences[0].ids]), torch.tensor(example.sequences[0].mask)
        before, after = (model(input_ids=ids).logits[0, :-1][mask[1:]].log_softmax(-1) for model in (source, other))
        wanted = torch.nn.functional.kl_div(after, before, log_target=True, reduction="none").sum(1).mean()
        assert divergence == pytest.approx(float(wanted.detach()), rel=1e-3, abs=1e-6)
    assert min(divergences) > 0


def test_processes_that_share_a_grid_keep_all_their_runs_in_one_file(tmp_path: Path) -> None:
    """Each makes every second run, begins with the same answers, and takes away none of the other's."""
    model = small_model()
    task = Task("identity", conversations(40), conversations(3))
    data = Data((task, Task("places", task.train, task.unseen), Task("manner", task.train, task.unseen)),
                conversations(2), conversations(4), [], "digest")  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    results = tmp_path / "learning.json"
    first, second = (Bench(tmp_path / "model", data, CPU, results, answer_tokens=4) for _ in range(2))
    assert first.report["own"] == second.report["own"]
    first.run(Setting("adamw", 1e-3), [1, 2], None)
    second.run(Setting("sgd", 1e-2), [2], None)
    second.run(Setting("sgd", math.inf, seed=1), [3], None)
    runs = json.loads(results.read_text())["runs"]
    assert list(runs) == ["adamw lr=0.001 seed=0", "sgd lr=0.01 seed=0", "sgd lr=inf seed=1"]
    assert runs["sgd lr=inf seed=1"]["diverged"] == 2
    again = Bench(tmp_path / "model", data, CPU, results, answer_tokens=4)
    again.run(Setting("adamw", 1e-3), [1, 2], None)
    assert again.report["runs"]["adamw lr=0.001 seed=0"]["versions"] == runs["adamw lr=0.001 seed=0"]["versions"]
    again.check([Setting("mini", 1e-5)])
    with pytest.raises(SystemExit, match="mini lr=1e-05 rehearse=2: only 0 other answers"):
        again.check([Setting("adamw", 1e-3), Setting("mini", 1e-5, rehearse=2)])  # the last of many: before any runs
    with pytest.raises(SystemExit, match="rehearse=2"):
        again.run(Setting("mini", 1e-5, rehearse=2), [1], None)


def test_the_grid_asks_for_no_more_other_answers_than_the_demo_has() -> None:
    others = Path(__file__).resolve().parents[3] / "scripts/demo_data/other_answers.jsonl"
    pool = len(others.read_text().splitlines()) - 100  # --held
    assert 0 < max(setting.rehearse for setting in grid()) <= pool
