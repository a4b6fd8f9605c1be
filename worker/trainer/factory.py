"""What trains a model and what builds its examples, made from hyper-parameters.

Must not know: Redis, vLLM, the header, versions.
Invariant: the order of parameters, and with it the layout of the optimizer's state and every random draw, follows from
their names alone.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from worker.apollo import ApolloMini
from worker.apollo.parameters import SumOverShards
from worker.config.hyperparameters import Hyperparameters
from worker.config.optimizers import MATRICES
from worker.data.batch_capacity import capacity_for
from worker.data.examples import ExampleBuilder
from worker.memory.plan import Way
from worker.model import freeze_routers
from worker.trainer.trainer import Trainer
from worker.utils.shard import Shard


def make_builder(
    tokenizer: Any,
    model_dir: Path,
    h: Hyperparameters,
    chat_template: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> ExampleBuilder:
    """The examples of the model in `model_dir`, rendered as its server does: see `ServerControl.rendering`."""
    ends: Any = ()
    if (model_dir / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(model_dir).eos_token_id or ()
    return ExampleBuilder(
        tokenizer,
        max_tokens=h.max_length,
        overlong=h.overlong,
        chat_template=chat_template,
        template_kwargs=template_kwargs,
        end_ids=[ends] if isinstance(ends, int) else ends,
    )


def make_trainer(
    model: torch.nn.Module,
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    tokenizer: Any,
    h: Hyperparameters,
    *,
    state: torch.Tensor | None,
    way: Way = "burst",
    by_factors: int = 0,
    places: int = 0,
    budget: int | None = None,
    shards: Mapping[str, Shard] | None = None,
    sum_over_shards: SumOverShards | None = None,
    kind: Callable[..., Trainer] = Trainer,
) -> Trainer:
    """The trainer over all text parameters, frozen ones included; `state` holds the optimizer's, None: its own memory.

    budget: tokens of one forward pass; by default 4,096 on a CPU and `h.max_length`, at least 8,192, on a GPU, whose
    model must be fused (`worker.model`); `capacity_for` says what that holds. The order of parameters, and with it the
    layout of `state` and every random draw, depends on the names alone, so it is the same whatever `h.embeddings` and
    `h.router` say: frozen ones never have a gradient. Raises `ModelError` where the router is not found that is frozen.
    shards, sum_over_shards: of a model that is divided over processes (`worker.model.sharded`), which parameters are
    parts of a whole, and what adds up over them. kind: makes the trainer of what `Trainer` takes.
    """
    named = sorted(parameters, key=lambda item: item[0])
    for name, parameter in named:
        is_table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        parameter.requires_grad_(not (is_table and h.embeddings == "frozen"))
    if h.router == "frozen":
        freeze_routers(model)
    divided = {"shards": [shards.get(name) for name, _ in named]} if shards else {}
    optimizer = ApolloMini(
        [{"params": named, **divided}],
        lr=h.rate,
        matrices=MATRICES[h.rule],
        scale=h.scale_value(),
        weight_decay=h.weight_decay,
        rounding=h.rounding,
        seed=h.seed,
        state=state,
        sum_over_shards=sum_over_shards,
    )
    room = capacity_for(h, packed=named[0][1].is_cuda, way=way, budget=budget)
    return kind(
        model,
        optimizer,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,  # masked out either way
        lr=h.rate,
        warmup=h.warmup,
        sizes=room.sizes,
        budget=budget or 4096,
        packed=room.packed,
        way=way,
        by_factors=by_factors,
        places=places,
    )
