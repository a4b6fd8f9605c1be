"""A version that is not live: made again from checkpoint and journal, and asked on the CPU of this machine.

Its figures are transformers' on a CPU: they differ from a live server's in the last digits, and where two words are
nearly as likely, a greedy answer may differ. Must not know: the server.
Invariants: nothing that the worker or the server uses is changed; what is missing to make a version is said before the
work begins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from producer.errors import TandemError
from worker.checkpoint.history import History
from worker.checkpoint.model_directory import directory_bytes
from worker.checkpoint.rebuild import Rebuilt
from worker.checkpoint.visit import make_version, private_weights, visit
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example, TokenSequence
from worker.operations.evaluation.cases import Case, same_answer, trained
from worker.operations.evaluation.found import SPARE, At, Found
from worker.shared_weights.bind import build_model
from worker.trainer.factory import make_trainer
from worker.utils import torch_setup
from worker.versions.evaluations import Score

OVERHEAD = 1_000_000_000
"""Bytes that torch, transformers and one conversation take beside weights and gradients."""


class OfflineError(TandemError):
    """A version cannot be evaluated here; the message says what is needed."""


@dataclass(frozen=True)
class Made:
    """found: the cases in order. rebuilt: from what the version was made."""

    found: list[Found]
    rebuilt: Rebuilt


def measure(
    version: int,
    cases: Sequence[Case],
    state_dir: Path,
    model_dir: Path,
    tokenizer: Any,
    decode: Callable[[Sequence[int]], str],
    *,
    answers: bool = True,
    tell: Callable[[int], object] = lambda done: None,
) -> Made:
    """Every case at `version`, in order. decode: tokens to text.

    Raises `OfflineError`, `RebuildError`, `JournalError` and `SnapshotError`.
    """
    torch_setup.prepare()
    with visit(state_dir, model_dir) as history:
        lineage = lineage_of(history, version)
        check_memory(history, version, model_dir)
        weights = private_weights(history, model_dir, version)
        model = build_model(model_dir, weights.tensors)
        rebuilt = make_version(history, weights, model, tokenizer, version)
    longest = max(len(one.ids) for case in cases for one in (*case.asked, *case.rejected))
    h = Hyperparameters(max_length=max(16, longest)).settled()
    trainer = make_trainer(model, list(model.named_parameters()), tokenizer, h, state=None)
    model.eval()
    found = []
    for case in cases:
        scores = trainer.score([_example(name, side) for name, side in _sides(case)])
        answer, exact = _answer(model, decode, case) if answers else (None, None)
        margin = scores["rejected"] - scores["asked"] if case.rejected else None
        score = Score(scores["asked"] * case.tokens, case.tokens, exact, margin)
        found.append(Found(At(version, lineage), score, answer))
        tell(len(found))
    return Made(found, rebuilt)


def lineage_of(history: History, version: int) -> str:
    """Of which lineage `version` is, by the journal or its checkpoint; of version 0, which is the source model, that
    of the first that follows it. Raises `OfflineError`."""
    entries, snapshots = history.journal.entries, history.snapshots
    if version in entries:
        return entries[version].lineage
    if version in snapshots.versions():
        return snapshots.describe(version).lineage
    if version == 0:
        first = min(entries, default=None)
        return entries[first].lineage if first is not None else "0" * 32
    known = sorted({0, *entries, *snapshots.versions()})
    span = f"it knows versions up to {known[-1]}" if known[-1] else "it knows none but version 0, the model itself"
    raise OfflineError(f"the state directory does not know version {version}: {span}")


def _sides(case: Case) -> list[tuple[str, tuple[TokenSequence, ...]]]:
    return [("asked", case.asked), *([("rejected", case.rejected)] if case.rejected else [])]


def _example(name: str, sequences: tuple[TokenSequence, ...]) -> Example:
    return Example(name, sequences, 1.0, {"trained_tokens": trained(sequences)})


@torch.no_grad()
def _answer(model: Any, decode: Callable[[Sequence[int]], str], case: Case) -> tuple[tuple[int, ...], bool]:
    """The greedy answer, and whether it is the reference."""
    end = case.reference[-1]
    made = model.generate(
        torch.tensor([case.context]),
        attention_mask=torch.ones(1, len(case.context), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=2 * len(case.reference) + SPARE,
        eos_token_id=end,
        pad_token_id=end,
    )
    tokens = tuple(made[0, len(case.context) :].tolist())
    ended = bool(tokens) and tokens[-1] == end
    answer = tokens[:-1] if ended else tokens
    return answer, ended and same_answer(decode, answer, case.reference[:-1])


def check_memory(history: History, version: int, model_dir: Path, models: int = 1) -> None:
    """`models` times the weights, and where batches are trained again gradients, fit into free memory. Raises
    `OfflineError`."""
    weights = directory_bytes(model_dir)
    steps = 0 if version == 0 or version in history.snapshots.versions() else 1
    needed = weights * (models + steps) + OVERHEAD
    free = _available()
    if needed > free:
        raise OfflineError(
            f"version {version} is made again in this machine's memory: about {needed / 1e9:.1f} GB are needed, and"
            f" {free / 1e9:.1f} GB are free. Run it on a machine with more memory that sees the"
            " state directory and the model (--state-dir, --model), or evaluate versions while they are live"
        )


def _available() -> int:
    """Bytes that a new process may have without swapping, as Linux estimates it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
