"""Whether a model can be trained here, from its config.json alone: in which way, with how many bytes, and why not.

    answer = check_model(folder, gpu_bytes, "apollo-mini")     # plain data
    table([answer, ...])                                       # the table of docs/models.md

No weight is read: transformers builds the model on the meta device, where it has shapes and no data. What a start
proves with weights (`worker.trainer.proof`, the server's mapping) is not asked, nor whether vLLM serves the model; what
is known to be refused there (`UNSHARED`) is said.

Must not know: Redis.
Invariant: what is refused here is refused at a start too, for the same reason; the converse does not hold.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from producer.errors import TandemError
from worker.apollo import state_bytes
from worker.config.optimizers import MATRICES, Optimizer
from worker.config.update_options import MAX_TOKENS
from worker.memory.optimizer_memory import state_bytes as planned_state_bytes
from worker.memory.plan import gigabytes
from worker.memory.planner import weight_bytes
from worker.memory.traced_sizes import NOT_SEEN, has_run
from worker.model.layer_trace import sizes_of
from worker.model.output_head import head_of
from worker.serving.memory_share import default_plan, flags_for, with_graphs
from worker.shared_weights.bind import compute_buffers
from worker.shared_weights.slices import FLOAT32_PARAMETERS
from worker.utils import torch_setup

CPU_TOKENS = 4096
"""Of one forward pass on a CPU, padding included: `make_trainer`'s default."""
UNSHARED = {
    "phi": "vLLM serves it by its Transformers backend, which computes with the bias of the head while it loads, so"
    " that the weights cannot be shared with a trainer; `tandem train --model` trains it without a server"
}
"""model_type -> why no server's weights can be trained in place, as seen with vLLM 0.32 (docs/models.md)."""
COLUMNS = ("model", "type", "parameters", "on a CPU", "on a GPU", "after the head")


class CheckError(TandemError):
    """The directory has no configuration that transformers reads."""


def check_model(folder: Path, gpu_bytes: int, optimizer: Optimizer) -> dict[str, Any]:
    """Of the model whose config.json is in `folder`, in JSON's types. gpu_bytes: of the device, server included.

    {"model", "type", "parameters", "head", "cpu": {"trainable", "reason"} or {"trainable", "way", "tokens", "bytes"},
    "gpu": the same, with "seen": whether a GPU has trained such a model}. Raises `CheckError`.
    """
    torch_setup.prepare()  # before transformers looks at torchvision
    from transformers import AutoConfig

    try:
        whole = AutoConfig.from_pretrained(folder)
    except Exception as error:  # of several unrelated types
        said = " ".join(str(error).split())
        raise CheckError(f"{folder}/config.json: transformers does not read it ({said})") from None
    config = whole.get_text_config()
    answer: dict[str, Any] = {"model": folder.name, "type": config.model_type, "parameters": None, "head": None}
    try:
        model = _meta_model(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in sorted(model.named_parameters())}
        answer["parameters"] = sum(math.prod(shape) for shape in shapes.values())
        if getattr(whole, "quantization_config", None) or getattr(config, "quantization_config", None):
            raise CheckError("its weights are quantized: training in place needs bf16 weights")
        after = head_of(model).after
        answer["head"] = {"scale": after.scale, "cap": after.cap, "bias": after.bias is not None}
        compute_buffers(model, torch.device("cpu"))
    except TandemError as error:
        return answer | {"cpu": _refused(error), "gpu": _refused(error)}
    unshared = UNSHARED.get(config.model_type)
    if unshared:
        return answer | {"cpu": _refused(unshared), "gpu": _refused(unshared)}
    return answer | {"cpu": _cpu(shapes, optimizer), "gpu": _gpu(folder, gpu_bytes, optimizer)}


def _refused(error: object) -> dict[str, Any]:
    return {"trainable": False, "reason": str(error)}


def _meta_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (ValueError, KeyError, ImportError, AttributeError) as error:
        raise CheckError(f"transformers has no causal language model of it ({str(error).splitlines()[0]})") from None


def _cpu(shapes: dict[str, tuple[int, ...]], optimizer: Optimizer) -> dict[str, Any]:
    """By burst: weights (in the server), gradients, the optimizer's state; activations come on top."""
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    exact = sum(count for name, count in size.items() if name.rpartition(".")[2] in FLOAT32_PARAMETERS)
    weights = 2 * sum(size.values()) + 2 * exact
    state = state_bytes(list(shapes.values()), matrices=MATRICES[optimizer])
    parts = {"weights": weights, "gradients": weights, "optimizer": state}
    return {"trainable": True, "way": "burst", "tokens": CPU_TOKENS, "bytes": parts | {"total": sum(parts.values())}}


def _gpu(folder: Path, total: int, optimizer: Optimizer) -> dict[str, Any]:
    """As `tandem serve` plans it beside a server that takes the rest of `total` bytes."""
    try:
        config = sizes_of(folder)
        plan = with_graphs(default_plan(config, total, optimizer), config, total, optimizer)
        weights, state = weight_bytes(config), planned_state_bytes(config, optimizer)
        flags_for(total, weights + state, plan.total, plan.title())
    except TandemError as error:
        return _refused(str(error).removeprefix(f"{folder / 'config.json'}: "))
    parts = {"weights": weights, "optimizer": state, "trainer": plan.total}
    found = {"trainable": True, "way": plan.way, "tokens": MAX_TOKENS, "seen": has_run(config)}
    return found | {"bytes": parts | {"total": sum(parts.values())}}


def sentences(answer: dict[str, Any], gpu_bytes: int) -> list[str]:
    """What a person is told of one answer."""
    count = answer["parameters"]
    lines = [f"{answer['model']}: {answer['type']}, {_count(count)} parameters"]
    for device, where in (("cpu", "on a CPU"), ("gpu", f"on a GPU of {gigabytes(gpu_bytes)}")):
        found = answer[device]
        if not found["trainable"]:
            lines.append(f"  {where}: no: {found['reason']}")
            continue
        size = found["bytes"]
        parts = ", ".join(f"{name} {gigabytes(part)}" for name, part in size.items() if name != "total")
        lines.append(
            f"  {where}: yes, by {found['way']}, up to {found['tokens']:,} tokens a pass; {gigabytes(size['total'])}"
            f" ({parts}{'; activations come on top' if device == 'cpu' else ''})"
            f"{'' if found.get('seen', True) else f'; {NOT_SEEN}'}"
        )
    return lines


def table(answers: Sequence[dict[str, Any]]) -> str:
    """In Markdown, one row a model."""
    rows = [[answer["model"], answer["type"], _count(answer["parameters"]), _cell(answer["cpu"]), _cell(answer["gpu"]),
             _after(answer["head"])] for answer in answers]  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)) + "\n"


def _cell(found: dict[str, Any]) -> str:
    if found["trainable"]:
        seen = "" if found.get("seen", True) else "; not run yet"
        return f"{found['way']}, {gigabytes(found['bytes']['total'])}, {found['tokens']:,} tokens{seen}"
    return f"no: {found['reason']}"


def _after(head: dict[str, Any] | None) -> str:
    if head is None:
        return ""
    said = [f"times {head['scale']:g}"] if head["scale"] != 1 else []
    said += [f"cap {head['cap']:g}"] if head["cap"] else []
    said += ["bias"] if head["bias"] else []
    return ", ".join(said) or "-"


def _count(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e9:.2f} billion"
