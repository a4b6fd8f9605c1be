"""What an older Tandem left of a mixture of experts: refused in one sentence, by the journal or by the checkpoint.

To its optimizer a layer's experts were one tensor. Nothing is changed.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from worker.apollo.state_layout import Layout, StateArea
from worker.checkpoint.ancestry import RebuildError
from worker.checkpoint.history import History
from worker.checkpoint.journal import Journal
from worker.checkpoint.rebuild import Rebuilder
from worker.checkpoint.records import UpdateRecord
from worker.checkpoint.replay import plain_hyperparameters
from worker.checkpoint.snapshots import Snapshots, Trained
from worker.checkpoint.visit import private_weights
from worker.config.hyperparameters import Hyperparameters
from worker.data.batch_capacity import capacity_for

SENTENCE = r"an older Tandem trained it, to whose optimizer a layer's experts were one tensor.*tandem serve DIRECTORY"
H = plain_hyperparameters(Hyperparameters().settled())
OLDER = {name: value for name, value in H.items() if name != "router"}


@pytest.fixture
def architecture_name() -> str:
    return "qwen3_moe"


@pytest.fixture
def left(tmp_path: Path, architecture: Callable[[str], Path], architecture_name: str) -> Iterator[tuple[History, Path]]:
    """What the directory of a model's worker knows, nothing yet; and the model."""
    for name in ("journal", "checkpoints"):
        (tmp_path / name).mkdir()
    model = architecture(architecture_name)
    snapshots = Snapshots(tmp_path / "checkpoints", model)
    with contextlib.closing(Journal(tmp_path / "journal", snapshots.fingerprint)) as journal:
        yield History(journal, snapshots), model


def update(h: dict[str, Any], version: int = 1) -> UpdateRecord:
    return UpdateRecord(
        version, "b" * 32, version - 1, version - 1, ["a"], [], {"loss": 1.0}, h=h, facts={"threads": 1}
    )


def rebuilder(history: History, model: Path) -> Rebuilder:
    weights = private_weights(history, model, 0)
    return Rebuilder(history, weights, lambda h: pytest.fail("no trainer is made"),
                     partial(capacity_for, packed=False, way="burst"))  # fmt: skip


def test_an_older_journal(left: tuple[History, Path]) -> None:
    history, model = left
    history.journal.append(update(OLDER))
    with pytest.raises(RebuildError, match=SENTENCE):
        rebuilder(history, model).plan(1)


def test_ours_is_read(left: tuple[History, Path]) -> None:
    history, model = left
    history.journal.append(update(H))
    assert rebuilder(history, model).plan(1).version == 1


def test_an_older_checkpoint(left: tuple[History, Path]) -> None:
    history, model = left
    made = rebuilder(history, model)
    tensors = made.weights.tensors
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    names = ["apollo" if len(shape) == 2 else "adamw" for shape in shapes]
    layout = Layout.of(shapes, names)
    area = torch.zeros(layout.total, dtype=torch.uint8)
    StateArea(area, layout)
    for tensor in tensors.values():
        tensor.zero_()
    history.journal.append(update(OLDER))
    history.snapshots.write(1, "b" * 32, tensors, area, Trained({"a": 1}, {}))
    with pytest.raises(RebuildError, match=SENTENCE):
        made.plan(1)


@pytest.mark.parametrize("architecture_name", ["llama"])
def test_a_dense_model_s_older_journal_is_read(left: tuple[History, Path]) -> None:
    history, model = left
    history.journal.append(update(OLDER))
    assert rebuilder(history, model).plan(1).steps[0].h == OLDER
