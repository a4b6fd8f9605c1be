"""What changed between two versions: which batches lie between them, how far the weights moved, what answers became.

Batches come from the journal; weights are made again from checkpoint and journal, both versions in this process's
memory; answers are those that `tandem eval --keep-answers` kept. Must not know: the server.
Invariants: the worker's files are only read; a norm is of the weights themselves, never an estimate.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worker.checkpoint.history import History
from worker.checkpoint.journal import Entry
from worker.checkpoint.visit import make_version, private_weights, visit
from worker.operations.evaluation import answers
from worker.operations.evaluation.answers import Answer
from worker.operations.evaluation.offline import check_memory, lineage_of
from worker.shared_weights.bind import build_model
from worker.utils import torch_setup

_LAYER = re.compile(r"\blayers\.(\d+)\.")
ATTENTION, MLP, OTHER = "attention", "mlp", "other"


@dataclass(frozen=True)
class Between:
    """added: what is in the second version and not in the first, oldest first; removed: the other way round, where a
    rollback lies between. kinds: transcripts by kind of feedback in `added`."""

    added: list[Entry]
    removed: list[Entry]
    kinds: dict[str, int]

    @property
    def jobs(self) -> list[str]:
        """Ids of the transcripts that were trained, in order; what was dropped later is among them."""
        return [id for entry in self.added for id in entry.ids]


@dataclass(frozen=True)
class Moved:
    """A group of tensors. change, size: root mean square of its difference, and of the first version's weights."""

    layer: int | None
    part: str
    elements: int
    change: float
    size: float

    @property
    def relative(self) -> float:
        return self.change / self.size if self.size else 0.0


def between(history: History, a: int, b: int) -> Between:
    """What was trained from `a` to `b`. Raises `OfflineError` for a version that the state directory does not know."""
    for version in (a, b):
        lineage_of(history, version)
    first, second = history.ancestry(a), history.ancestry(b)
    shared = {entry.version for entry in first} & {entry.version for entry in second}
    added = [entry for entry in second if entry.version not in shared]
    kinds = Counter[str]()
    for entry in added:
        for kind, count in kinds_of(entry).items():
            kinds[kind] += count
    return Between(added, [entry for entry in first if entry.version not in shared], dict(kinds))


def kinds_of(entry: Entry) -> dict[str, int]:
    """Transcripts by kind, as the manifest has them; one without the field is of demonstrations alone."""
    if "kinds" in entry.manifest:
        return {kind: int(one["jobs"]) for kind, one in entry.manifest["kinds"].items()}
    return {"demonstration": len(entry.ids)} if entry.ids else {}


def read_between(state: Path, model_dir: Path, a: int, b: int) -> Between:
    """`between`, of the state directory as it is now."""
    with visit(state, model_dir) as history:
        return between(history, a, b)


def moved(state: Path, model_dir: Path, tokenizer: Any, a: int, b: int) -> list[Moved]:
    """How far each group of tensors moved from `a` to `b`: layers in order, then what belongs to none.

    Raises what making a version raises, and `OfflineError` where two models do not fit into memory.
    """
    torch_setup.prepare()
    with visit(state, model_dir) as history:
        for version in (a, b):
            check_memory(history, version, model_dir, models=2)
        first, second = (_weights(history, model_dir, tokenizer, version) for version in (a, b))
    return norms(first, second)


@torch.no_grad()
def norms(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> list[Moved]:
    """The same of two sets of tensors of the same names and shapes; sums are fp64."""
    sums: dict[tuple[int | None, str], list[float]] = {}
    for name, before in first.items():
        one = sums.setdefault(_group(name), [0, 0.0, 0.0])
        was = before.double()
        one[0] += before.numel()
        one[1] += float((second[name].double() - was).square().sum())
        one[2] += float(was.square().sum())
    order = sorted(sums, key=lambda group: (group[0] is None, group[0] or 0, group[1]))
    return [Moved(*at, int(sums[at][0]), *((total / sums[at][0]) ** 0.5 for total in sums[at][1:])) for at in order]


def _group(name: str) -> tuple[int | None, str]:
    layer = _LAYER.search(name)
    if layer is None:
        return None, name.removeprefix("model.").removesuffix(".weight")
    part = ATTENTION if "attn" in name else MLP if ".mlp." in name else OTHER
    return int(layer[1]), part


def _weights(history: History, model_dir: Path, tokenizer: Any, version: int) -> dict[str, torch.Tensor]:
    weights = private_weights(history, model_dir, version)
    make_version(history, weights, build_model(model_dir, weights.tensors), tokenizer, version)
    return {name: tensor.detach() for name, tensor in weights.tensors.items()}


def said(state: Path, a: int, b: int, names: Iterable[str]) -> Iterator[tuple[str, Answer, Answer]]:
    """(set, answer at `a`, answer at `b`) of each conversation whose answers were kept at both, and are not the same.

    Raises `AnswersError`.
    """
    for name in names:
        first, second = answers.find(state, name, a), answers.find(state, name, b)
        if first is None or second is None or first.digest != second.digest:
            continue
        for one, other in zip(first.answers, second.answers, strict=True):
            if one.answer != other.answer:
                yield name, one, other
