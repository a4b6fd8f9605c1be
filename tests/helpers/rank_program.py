"""Test program: some ranks of tensor parallelism, each a process, over gloo.

usage: python rank_program.py RANKS FOLDER MODEL_DIR SCENARIO...

A scenario may name another model: SCENARIO@MODEL_DIR. "attached" takes a server's run directory in its place.

Each rank runs the same scenarios and leaves what it found in FOLDER/SCENARIO-RANK.pt. What a scenario does on one
process, the test that started this does itself, with the same functions.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.distributed as dist
from patience import PATIENCE, until
from safetensors.torch import load_file
from shard_parts import divide

from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example, TokenSequence
from worker.memory.plan import Way
from worker.model.head_blocks import After
from worker.model.loss import head_loss
from worker.model.shard_group import ShardGroup
from worker.model.sharded import build_sharded
from worker.model.soft_targets import teacher_targets
from worker.model.vocabulary_shard import VocabularyShard
from worker.shared_weights import bind
from worker.shared_weights.attach import attach
from worker.trainer.factory import make_trainer
from worker.trainer.trainer import Trainer

STEPS = 20
H = Hyperparameters(lr=1e-4, max_length=64)
ROW = tuple(i * 37 % 1000 for i in range(1, 41))
WORDS, CUT = 1000, 512
"""A vocabulary whose parts are of different sizes, and where the second begins."""
TARGETS = (0, 1, CUT - 1, CUT, CUT + 1, WORDS - 1, 7, 600, 700, 3, 900, 511)


class Tokenizer:
    pad_token_id = 0


def examples(step: int = 0) -> list[Example]:
    """Two rows of words from the whole vocabulary, the second of them a dislike."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for number, length in enumerate((17, 40)):
        ids = torch.randint(0, 1024, (length,), generator=generator).tolist()
        sequence = TokenSequence(tuple(ids), (False, *[True] * (length - 1)))
        made.append(Example(f"{step}-{number}", (sequence,), 1.0 + number, {}))
    return made


def every_kind() -> list[Example]:
    """One example of each loss: imitated, disliked, corrected, with a teacher."""
    generator = torch.Generator().manual_seed(7)

    def sequence(length: int, rejected: bool = False) -> TokenSequence:
        ids = torch.randint(0, WORDS, (length,), generator=generator).tolist()
        return TokenSequence(tuple(ids), (*[False] * 5, *[True] * (length - 5)), rejected=rejected)

    return [
        Example("liked", (sequence(30),), 1.0, {}),
        Example("disliked", (sequence(20),), 0.5, {}, "disliked"),
        Example("corrected", (sequence(25), sequence(22, True)), 1.0, {}, "correction"),
        Example("commented", (sequence(18),), 1.0, {}, "comment", (sequence(18),)),
    ]


def whole_weights(model: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The checkpoint's, spread out: with fresh ones every answer is alike."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: tensor.to(dtype) for name, tensor in sorted(load_file(model / "model.safetensors").items())}
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[1] ** 0.5)
        elif name.endswith(("norm.weight", "dt_bias", "conv1d.weight")):
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return tensors


def whole_trainer(model: Path, dtype: torch.dtype, way: Way = "burst") -> Trainer:
    built = bind.build_model(model, whole_weights(model, dtype))
    return make_trainer(built, built.named_parameters(), Tokenizer(), H, state=None, way=way)


def sharded_trainer(model: Path, dtype: torch.dtype, way: Way = "burst") -> Trainer:
    group = ShardGroup()
    tensors, shards = divide(whole_weights(model, dtype), bind.text_config(model), group.rank, group.ranks)
    built = build_sharded(model, tensors, shards, group)
    named = list(built.named_parameters())
    return make_trainer(built, named, Tokenizer(), H, state=None, way=way, shards=shards, sum_over_shards=group.add_up)


def gradients_of(trainer: Trainer, batch: Sequence[Example]) -> dict[str, Any]:
    found = trainer.begin(batch)
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return {"loss": found.loss, "nll": found.nll, "gradients": grads, "norm": trainer.gradient_norm()}


def steps_of(trainer: Trainer, steps: int = STEPS) -> dict[str, Any]:
    losses = []
    for step in range(steps):
        losses.append(trainer.begin(examples(step)).loss)
        said = trainer.apply()
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    return {"losses": losses, "weights": weights, "said": said}


def head(weight: torch.Tensor, bias: torch.Tensor, **divided: Any) -> dict[str, Any]:
    """Losses of both kinds and their gradients, for a head with a scale, a cap and a bias."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(12, 32, generator=generator).requires_grad_()
    teacher = torch.randn(5, 32, generator=generator)
    targets = torch.tensor(TARGETS)
    factors = torch.rand(12, generator=generator) - 0.2
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    after = After(0.5, 20.0, bias)
    soft = teacher_targets(teacher, weight, After(0.5, 20.0, bias.detach()), **divided)
    soft = soft.at(torch.tensor([1, 4, 5, 8, 11]), torch.arange(5))
    plain = head_loss(hidden, weight, targets, factors, after=after, **divided)
    plain.loss.backward()
    found = {"nll": plain.nll, "to_hidden": hidden.grad, "to_weight": weight.grad, "to_bias": bias.grad}
    hidden.grad = weight.grad = bias.grad = None
    taught = head_loss(hidden, weight, targets, factors, soft=soft, after=after, **divided)
    taught.loss.backward()
    found |= {"divergence": taught.divergence, "moved": taught.moved, "log_q": soft.log_q, "ids": soft.ids}
    found |= {f"taught_{name}": x.grad for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias))}
    return {name: tensor.detach().clone() for name, tensor in found.items() if tensor is not None}


def head_parts() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(WORDS, 32, generator=generator), torch.randn(WORDS, generator=generator)


def vocabulary(model: Path) -> dict[str, Any]:
    group = ShardGroup()
    first, rows = ((0, CUT), (CUT, WORDS - CUT))[group.rank]
    weight, bias = (part[first : first + rows] for part in head_parts())
    return head(weight, bias, vocabulary=VocabularyShard(first, rows, WORDS, group))


def attached(run_dir: Path) -> dict[str, Any]:
    """On a live server: is each part the checkpoint's; then, with weights that are spread out, the loss of ROW before
    and after a few steps, written where the server reads them."""
    group = ShardGroup()
    weights = attach(run_dir, rank=group.rank)
    stored = load_file(weights.model_path / "model.safetensors")
    expected = {name: weights.shards[name].of(t) if name in weights.shards else t for name, t in stored.items()}
    same = sorted(name for name, tensor in weights.tensors.items() if torch.equal(tensor, expected[name]))
    parts, _ = divide(
        whole_weights(weights.model_path, torch.bfloat16), bind.text_config(weights.model_path), group.rank, group.ranks
    )
    for name, tensor in weights.tensors.items():
        tensor.copy_(parts[name])
    built = build_sharded(weights.model_path, weights.tensors, weights.shards, group)
    trainer = make_trainer(
        built, built.named_parameters(), Tokenizer(), replace(H, lr=1e-3), state=weights.state,
        shards=weights.shards, sum_over_shards=group.add_up,
    )  # fmt: skip
    row = Example("row", (TokenSequence(ROW, (False, *[True] * (len(ROW) - 1))),), 1.0, {})
    dist.barrier()
    before = trainer.token_nll(row)
    ask_server(run_dir, group, "before")
    for _ in range(5):
        trainer.begin([row])
        trainer.apply()
    dist.barrier()
    after = trainer.token_nll(row)
    return {
        "same": same,
        "shards": {name: shard.plain() for name, shard in weights.shards.items()},
        "before": before,
        "after": after,
        "steps": trainer.optimizer.step_count,
    }


def ask_server(run_dir: Path, group: ShardGroup, name: str) -> None:
    """Say that the weights are written, and wait until the test has asked the server about them."""
    if group.rank == 0:
        (run_dir / f"{name}.ready").touch()
        until((run_dir / f"{name}.seen").exists, "the test asks the server")
    dist.barrier()


SCENARIOS: dict[str, Any] = {
    "gradients": lambda model: gradients_of(sharded_trainer(model, torch.float32), examples()),
    "kinds": lambda model: gradients_of(sharded_trainer(model, torch.float32), every_kind()),
    "steps": lambda model: steps_of(sharded_trainer(model, torch.float32)),
    "streaming": lambda model: steps_of(sharded_trainer(model, torch.float32, "streaming"), 3),
    "vocabulary": vocabulary,
    "attached": attached,
}


def run(rank: int, ranks: int, folder: Path, model: Path, scenarios: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no other address of this machine
    limit = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", f"file://{folder}/meeting", limit, rank=rank, world_size=ranks)
    for scenario in scenarios:
        name, _, other = scenario.partition("@")
        torch.save(SCENARIOS[name](Path(other) if other else model), folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def main() -> int:
    ranks, folder, model, *scenarios = sys.argv[1:]
    children = []
    for rank in range(int(ranks)):  # forked before torch computes anything: its imports are paid for once
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(rank, int(ranks), Path(folder), Path(model), scenarios)
                code = 0
            finally:
                if code:
                    import traceback

                    traceback.print_exc()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = []
    while children:
        child, status = os.wait()
        children.remove(child)
        codes.append(status)
        if status:  # the others would wait for it
            for other in children:
                os.kill(other, 9)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
