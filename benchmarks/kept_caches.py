"""What keeping old caches costs in truth: answers over old keys, values and states, beside answers computed afresh.

    python benchmarks/kept_caches.py FILE.jsonl --model DIR --out results     # any model directory that Tandem trains
    python benchmarks/kept_caches.py FILE.jsonl --out results                 # a tiny Qwen3.5, taught first

The context of each of some held-out conversations is computed under the start's weights. The model then learns the
others, one conversation a version, by the defaults. After 1, 10 and 50 versions each conversation's answer is scored
twice under the new weights: over the context's old caches, as a request that ran through all these updates goes on, and
with all of it computed again. Reported for each number of versions, in nats per token, means over all answers' tokens:

    kept        KL(computed again || over old caches): what `--running keep` costs
    learnt      KL(new weights || start), both computed afresh: how far the versions moved the model at all
    rounding    KL(a token at a time || all in one pass), the same weights: what bf16's order of sums makes by itself

That is the worst case: a real request's caches are as old as its context only for what the context holds, and younger
for every token it has made since. CPU; repeatable.
"""

import copy
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import click
import outputs
import torch
from finetune import LENGTH, length, pretrain
from rich.progress import track
from texts import text_builder

from worker.checkpoint import model_directory
from worker.cli.train import load_examples
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example, ExampleBuilder
from worker.testing.tiny_model import make_tiny
from worker.trainer.factory import make_trainer
from worker.utils import torch_setup


class Context:
    """A held-out conversation: its context's caches under the weights of now, and the answer that is scored later.

    The answer is fed a token at a time, as it is served: transformers' delta net takes its state over for one token
    alone.
    """

    def __init__(self, model: torch.nn.Module, example: Example, answer: int) -> None:
        sequence = max(example.sequences, key=lambda one: sum(one.mask))
        first = sequence.mask.index(True)
        self.ids = torch.tensor([sequence.ids[: first + answer]])  # [1, context + answer]
        self.first = first
        self._caches = model(input_ids=self.ids[:, : first - 1], use_cache=True).past_key_values

    @property
    def answer(self) -> int:
        """Tokens that are scored."""
        return self.ids.shape[1] - self.first

    def stepwise(self, model: torch.nn.Module, caches: Any = None) -> torch.Tensor:
        """[answer, vocabulary]: log-probabilities of what comes next under the weights of now, over `caches` [default:
        the context's old ones, which stay as they are]."""
        caches = copy.deepcopy(self._caches) if caches is None else caches
        rows = []
        for at in range(self.first - 1, self.ids.shape[1] - 1):
            rows.append(model(input_ids=self.ids[:, at : at + 1], past_key_values=caches, use_cache=True).logits[0, 0])
        return torch.stack(rows).float().log_softmax(-1)

    def at_once(self, model: torch.nn.Module) -> torch.Tensor:
        """As `again`, context and answer in one pass."""
        logits = model(input_ids=self.ids[:, :-1], use_cache=False).logits[0, self.first - 1 :]
        return logits.float().log_softmax(-1)

    def again(self, model: torch.nn.Module) -> torch.Tensor:
        """As `stepwise`, over caches of the weights of now: as serving goes on after a recomputation."""
        caches = model(input_ids=self.ids[:, : self.first - 1], use_cache=True).past_key_values
        return self.stepwise(model, caches)


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """[tokens]: KL(p || q) of log-probabilities [tokens, vocabulary]."""
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def compare(model: torch.nn.Module, contexts: list[Context], start: list[torch.Tensor]) -> dict[str, float]:
    """The figures under the weights of now; start: `again` of each context under the start's."""
    kept, learnt, agree, rounding = [], [], [], []
    for context, before in zip(contexts, start, strict=True):
        fresh, old = context.again(model), context.stepwise(model)
        kept.append(divergence(fresh, old))
        learnt.append(divergence(fresh, before))
        rounding.append(divergence(fresh, context.at_once(model)))
        agree.append((fresh.argmax(-1) == old.argmax(-1)).float())
    every = torch.cat(kept)
    return {
        "kept": every.mean().item(),
        "kept_p99": every.quantile(0.99).item(),
        "learnt": torch.cat(learnt).mean().item(),
        "rounding": torch.cat(rounding).mean().item(),
        "same_likeliest_token": torch.cat(agree).mean().item(),
    }


def taught_tiny(file: str, steps: int) -> tuple[Any, Any, list[Example]]:
    """(a tiny Qwen3.5 in bf16 that has learnt half of `file`, its tokenizer, the other half)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = make_tiny(Path(folder) / "tiny")
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    examples = load_examples(file, ExampleBuilder(tokenizer, max_tokens=8 * LENGTH).build)
    examples = sorted((one for one in examples if length(one) <= LENGTH), key=length)
    pretrain(model, examples[::2], tokenizer.pad_token_id or 0, steps)
    return model.to(torch.bfloat16), tokenizer, examples[1::2]


@click.command()
@click.argument("file")
@click.option("--model", "directory", type=click.Path(path_type=Path, exists=True), help="A model directory.")
@click.option("--versions", default="1,10,50", show_default=True, help="After which to compare, comma-separated.")
@click.option("--held", default=4, show_default=True, help="Conversations that are scored and not learnt.")
@click.option("--answer", default=64, show_default=True, help="Most tokens of an answer that are scored.")
@click.option("--max-length", default=LENGTH, show_default=True, help="Longer conversations are left out.")
@click.option("--pretrain-steps", default=100, show_default=True, help="Of the tiny model.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(
    file: str,
    directory: Path | None,
    versions: str,
    held: int,
    answer: int,
    max_length: int,
    pretrain_steps: int,
    out: Path,
) -> None:
    """Compare answers over old caches with answers computed again."""
    outputs.folder(out)
    torch_setup.prepare()
    h = Hyperparameters(max_length=max_length)
    if directory is None:
        model, tokenizer, examples = taught_tiny(file, pretrain_steps)
    else:
        model, tokenizer = model_directory.load(directory)
        examples = load_examples(file, text_builder(directory).build)
        examples = [one for one in examples if length(one) <= max_length]
    model.eval()
    train, kept = examples[held:], examples[:held]
    with torch.no_grad():
        contexts = [Context(model, one, answer) for one in kept]
        start = [context.again(model) for context in contexts]
    trainer = make_trainer(model, model.named_parameters(), tokenizer, h, state=None)
    wanted = [int(part) for part in versions.split(",")]
    found: dict[str, Any] = {}
    report = {
        "model": str(directory.name if directory else "tiny Qwen3.5, taught"),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "lr": h.rate,
        "context_tokens": [context.first for context in contexts],
        "answer_tokens": [context.answer for context in contexts],
        "learnt_tokens": [sum(len(s.ids) for s in one.sequences) for one in train],
        "versions": found,
    }
    path = out / f"kept_caches_{'real' if directory else 'tiny'}.json"
    for version in track(range(1, max(wanted) + 1), "versions"):
        trainer.begin([train[(version - 1) % len(train)]])
        trainer.apply()
        if version in wanted:
            found[str(version)] = compare(model, contexts, start)
            print(version, json.dumps(found[str(version)]), flush=True)
            path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
