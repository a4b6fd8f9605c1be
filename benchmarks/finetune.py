"""How much learning survives the rounding to bf16, and which learning rate, scale and embeddings to use by default.

A tiny Qwen3.5 is first taught on one part of real transcripts in fp32 (so that fine-tuning starts from weights that
mean something), then fine-tuned on the other part with APOLLO-Mini, each time from the same start:

  rounding   fp32 weights (the reference), bf16 stochastic, bf16 nearest, over several learning rates
  choices    scale, embeddings and warm-up x learning rate, in bf16 stochastic, by training and held-out loss

    python benchmarks/finetune.py FILE.jsonl [--steps 60] [--out benchmarks/results]

Writes finetune.json and finetune.png. CPU; the losses are repeatable, no time is measured.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import outputs
import torch
from matplotlib.figure import Figure
from rich.progress import track

from worker.apollo import ApolloMini
from worker.cli.train import epochs, load_examples
from worker.config.hyperparameters import Hyperparameters
from worker.data.batch_capacity import widths_up_to
from worker.data.examples import Example, ExampleBuilder
from worker.data.packing import make_batches
from worker.testing.tiny_model import make_tiny
from worker.trainer.factory import make_trainer
from worker.trainer.trainer import Trainer
from worker.utils import torch_setup

LENGTH = 1024
KINDS = (
    ("fp32 weights", torch.float32, "nearest"),
    ("bf16 stochastic", torch.bfloat16, "stochastic"),
    ("bf16 nearest", torch.bfloat16, "nearest"),
)
CHOICES = (("auto", "apollo", 0), ("auto", "frozen", 0), ("4", "apollo", 0), ("auto", "apollo", 20))
"""scale, embeddings, warm-up steps: each with every rate but the first."""
RATES = (1e-5, 3e-5, 1e-4, 3e-4)


def pretrain(model: torch.nn.Module, examples: list[Example], pad_id: int, steps: int) -> None:
    """Plain fp32 AdamW over all tokens of `examples`, so that the start of fine-tuning means something."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    order = _cycle(examples, steps)
    for batch in track(order, "teaching the start"):
        for rows in make_batches(batch, pad_id=pad_id, widths=widths_up_to(LENGTH), budget=4 * LENGTH):
            logits = model(input_ids=rows.input_ids, use_cache=False).logits[:, :-1]  # [B, T-1, V]
            there = torch.arange(1, rows.input_ids.shape[1])[None] < rows.lengths[:, None]  # [B, T-1]
            torch.nn.functional.cross_entropy(logits[there], rows.input_ids[:, 1:][there]).backward()
        optimizer.step()
        optimizer.zero_grad()


def _cycle(examples: list[Example], steps: int) -> list[list[Example]]:
    per_epoch = -(-len(examples) // 7)
    return list(epochs(examples, count=-(-steps // per_epoch), batch=7, seed=1))[:steps]


def finetune(start: torch.nn.Module, dtype: torch.dtype, train: list[Example], held: list[Example], tokenizer: Any,
             h: Hyperparameters, steps: int) -> dict[str, Any]:  # fmt: skip
    """Loss of every step, and of `train` and `held` at the end, from a copy of `start`."""
    model = copy.deepcopy(start).to(dtype)
    trainer: Trainer = make_trainer(model, model.named_parameters(), tokenizer, h, state=None)
    assert isinstance(trainer.optimizer, ApolloMini)
    losses, ratios = [], []
    for _ in range(steps):
        losses.append(trainer.begin(train).loss)
        update = trainer.apply()
        ratios.append(update["update_rms"] / update["weight_rms"])
    return {"losses": losses, "train": _mean(trainer.score(train), train), "held": _mean(trainer.score(held), held),
            "update_over_weight_rms": sorted(ratios)[len(ratios) // 2]}  # fmt: skip


def length(example: Example) -> int:
    """Tokens of its longest sequence."""
    return max(len(sequence.ids) for sequence in example.sequences)


def _mean(nll: dict[str, float], examples: list[Example]) -> float:
    return sum(nll[e.id] * e.trained_tokens for e in examples) / sum(e.trained_tokens for e in examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pretrain-steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    outputs.folder(arguments.out)
    torch_setup.prepare()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = make_tiny(Path(folder) / "tiny")
        tokenizer = AutoTokenizer.from_pretrained(path)
        start = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    examples = load_examples(arguments.file, ExampleBuilder(tokenizer, max_tokens=8 * LENGTH).build)
    examples = sorted((e for e in examples if length(e) <= LENGTH), key=length)
    train, held, base = examples[:6:3] + examples[1:6:3], examples[2:6:3], examples[6:]
    pretrain(start, base, tokenizer.pad_token_id or 0, arguments.pretrain_steps)
    report: dict[str, Any] = {"torch": torch.__version__, "steps": arguments.steps, "rounding": [], "choices": []}
    for lr in track(RATES[:3], "rounding"):
        for label, dtype, rounding in KINDS:
            h = Hyperparameters(lr=lr, rounding=rounding, max_length=LENGTH)
            report["rounding"].append({"lr": lr, "weights": label}
                                      | finetune(start, dtype, train, held, tokenizer, h, arguments.steps))  # fmt: skip
    for scale, embeddings, warmup in track(CHOICES, "choices"):
        for lr in RATES[1:]:
            h = Hyperparameters(lr=lr, scale=scale, embeddings=embeddings, warmup=warmup, max_length=LENGTH)
            run = finetune(start, torch.bfloat16, train, held, tokenizer, h, arguments.steps)
            run.pop("losses")
            chosen = {"lr": lr, "scale": scale, "embeddings": embeddings, "warmup": warmup}
            report["choices"].append(chosen | run)
    (arguments.out / "finetune.json").write_text(json.dumps(report, indent=1))
    plot(report, arguments.out / "finetune.png")
    for row in report["rounding"] + report["choices"]:
        print({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items() if k != "losses"})


def plot(report: dict[str, Any], path: Path) -> None:
    """Loss over steps for the three kinds of weights, one panel a learning rate."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    styles = {"fp32 weights": "k-", "bf16 stochastic": "C0--", "bf16 nearest": "C3-"}
    for axes, lr in zip(panels, (1e-5, 3e-5, 1e-4), strict=True):
        for run in report["rounding"]:
            if run["lr"] == lr:
                axes.plot(run["losses"], styles[run["weights"]], label=run["weights"], linewidth=1.6)
        axes.set(title=f"lr {lr:g}", xlabel="step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats per trained token)")
    panels[0].legend()
    figure.suptitle("APOLLO-Mini fine-tune of a tiny Qwen3.5: rounding decides whether bf16 weights learn")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
