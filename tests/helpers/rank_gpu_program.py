"""Test program: the ranks of a divided trainer on GPUs, each a process with a card of its own, over NCCL.

usage: python rank_gpu_program.py RANKS FOLDER MODEL_DIR

Each leaves what it found in FOLDER/RANK.pt. What one process finds on one card, the test that started this computes
with the same functions.
"""

import multiprocessing
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from patience import PATIENCE
from rank_program import Tokenizer, every_kind, whole_weights
from shard_parts import divide

from worker.config.hyperparameters import Hyperparameters
from worker.distributed.rank_processes import meet
from worker.memory.plan import Way
from worker.model import fuse
from worker.model.shard_group import ShardGroup
from worker.model.sharded import build_sharded
from worker.shared_weights import bind
from worker.shared_weights.slices import FLOAT32_PARAMETERS
from worker.trainer.factory import make_trainer
from worker.trainer.trainer import Trainer
from worker.utils.shard import Shard

H = Hyperparameters(lr=1e-4, max_length=512)
STEPS = 4


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    """As vLLM keeps them, on the host."""
    exact = {name: name.rpartition(".")[2] in FLOAT32_PARAMETERS for name in whole_weights(model, torch.bfloat16)}
    return {n: t.float() if exact[n] else t for n, t in whole_weights(model, torch.bfloat16).items()}


def trainer_on(
    device: torch.device, model: Path, way: Way, kept: int = 2, group: ShardGroup | None = None
) -> tuple[Trainer, Mapping[str, Shard]]:
    """Of the whole model, or of a rank's part of it; kept: layers that are not recomputed."""
    tensors, shards = weights_of(model), dict[str, Shard]()
    more: dict[str, Any] = {}
    if group is not None:
        tensors, shards = divide(tensors, bind.text_config(model), group.rank, group.ranks)
        more = {"shards": shards, "sum_over_shards": group.add_up}
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    built: Any = bind.build_model(model, tensors) if group is None else build_sharded(model, tensors, shards, group)
    fuse(built, lambda tokens: kept)
    named = list(built.named_parameters())
    return make_trainer(built, named, Tokenizer(), H, state=None, way=way, budget=512, **more), shards


def found_on(device: torch.device, model: Path, group: ShardGroup | None = None) -> dict[str, Any]:
    """Losses and gradients of one batch of every kind; then weights after steps in both ways, and the order in which
    gradients came."""
    trainer, shards = trainer_on(device, model, "burst", group=group)
    begun = trainer.begin(every_kind())
    result: dict[str, Any] = {"shards": {name: shard.plain() for name, shard in shards.items()}}
    result["losses"], result["norm"] = begun.losses, trainer.gradient_norm()
    named = dict(trainer.model.named_parameters())
    result["gradients"] = {name: p.grad.float().cpu() for name, p in named.items() if p.grad is not None}
    trainer.forget()
    names = {id(parameter): name for name, parameter in named.items()}
    order: list[str] = []
    hooks = [p.register_post_accumulate_grad_hook(lambda p: order.append(names[id(p)])) for p in named.values()]
    trainer.dry_run(every_kind())
    for hook in hooks:
        hook.remove()
    result["order"] = order
    for way in ("burst", "streaming"):
        trainer, _ = trainer_on(device, model, way, kept=0, group=group)  # type: ignore[arg-type]
        losses = []
        for _ in range(STEPS):
            losses.append(trainer.begin(every_kind()).loss)
            said = trainer.apply()
        trainer.optimizer.check()
        weights = {name: p.detach().float().cpu() for name, p in trainer.model.named_parameters()}
        result[way] = {"losses": losses, "weights": weights, "update_rms": said["update_rms"]}
    return result


def run(rank: int, ranks: int, folder: str, model: str) -> None:
    """One rank's process."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.set_num_threads(4)
    meet({"seconds": PATIENCE, "store": f"{folder}/meeting", "rank": rank, "ranks": ranks}, device)
    torch.save(found_on(device, Path(model), ShardGroup()), f"{folder}/{rank}.pt")


def main() -> int:
    ranks, folder, model = sys.argv[1:]
    context = multiprocessing.get_context("spawn")
    work = [(rank, int(ranks), folder, model) for rank in range(int(ranks))]
    children = [context.Process(target=run, args=one) for one in work]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return int(any(child.exitcode for child in children))


if __name__ == "__main__":
    sys.exit(main())
