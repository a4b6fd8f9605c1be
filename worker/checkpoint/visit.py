"""A version made again beside a running server and worker: on the CPU, in memory of this process, from their files.

    with visit(state_dir, model_dir) as (history, weights): ...   # nothing there is changed or locked
    rebuilt = make_version(history, weights, tokenizer, 118)

The journal is read from a copy, checkpoints through links: opening them repairs what a crash left, and that is for the
worker to do. Must not know: Redis, the server.
Invariants: nothing in the state directory is written, moved or deleted; the worker's lock is not needed.
"""

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from worker.apollo import state_bytes
from worker.checkpoint import replay
from worker.checkpoint.ancestry import RebuildError
from worker.checkpoint.history import History
from worker.checkpoint.journal import Journal
from worker.checkpoint.rebuild import Rebuilder, Rebuilt
from worker.checkpoint.records import UpdateRecord
from worker.checkpoint.snapshots import Snapshots
from worker.config.optimizers import DEFAULT, MATRICES, OPTIMIZERS, Optimizer
from worker.data.batch_capacity import capacity_for
from worker.shared_weights.attach import AttachedWeights
from worker.shared_weights.batch_record import RecordArea
from worker.shared_weights.bind import text_shapes
from worker.shared_weights.header import HEADER_BYTES, Header
from worker.shared_weights.slices import FLOAT32_PARAMETERS
from worker.trainer.factory import make_trainer

NO_RECORD_BYTES = 64


@contextlib.contextmanager
def visit(state: Path, model_dir: Path) -> Iterator[History]:
    """What the state directory `state` knows of the model in `model_dir`, as it is now.

    Raises `RebuildError` where it is no state directory, and `JournalError`.
    """
    if not (state / "journal").is_dir():
        raise RebuildError(f"{state} is no state directory: name the worker's with --state-dir")
    with tempfile.TemporaryDirectory(prefix="tandem-visit-") as name:
        folder = Path(name)
        checkpoints = folder / "checkpoints"
        checkpoints.mkdir()
        for path in (state / "checkpoints").glob("[0-9]*"):
            if path.name.isdigit():
                (checkpoints / path.name).symlink_to(path.absolute())
        (folder / "journal").mkdir()
        for path in sorted((state / "journal").glob("*.journal")):
            with contextlib.suppress(FileNotFoundError):  # the worker has pruned it meanwhile
                shutil.copyfile(path, folder / "journal" / path.name)
        snapshots = Snapshots(checkpoints, model_dir)
        with contextlib.closing(Journal(folder / "journal", snapshots.fingerprint)) as journal:
            yield History(journal, snapshots)


def private_weights(history: History, model_dir: Path, version: int) -> AttachedWeights:
    """Empty weights of the model's shapes in this process, with room for the optimizer that made `version`."""
    optimizer = optimizer_of(history, version)
    shapes = text_shapes(model_dir)
    tensors = {
        name: torch.empty(shape, dtype=torch.float32 if _is_float32(name) else torch.bfloat16)
        for name, shape in sorted(shapes.items())
    }
    area = torch.zeros(state_bytes(list(shapes.values()), matrices=MATRICES[optimizer]), dtype=torch.uint8)
    header = Header(torch.zeros(HEADER_BYTES, dtype=torch.uint8))
    header.adopt(uuid.uuid4().hex, 0)
    record = RecordArea(torch.zeros(NO_RECORD_BYTES, dtype=torch.uint8))
    return AttachedWeights(header, record, area, tensors, [], model_dir, {"optimizer": optimizer})


def _is_float32(name: str) -> bool:
    return name.rpartition(".")[2] in FLOAT32_PARAMETERS


def optimizer_of(history: History, version: int) -> Optimizer:
    """Which one trained `version`, by the journal; where that has no update up to it, by a checkpoint."""
    for entry in reversed(history.ancestry(version)):
        if entry.kind == UpdateRecord.kind:
            record = history.journal.read(entry.version)
            assert isinstance(record, UpdateRecord)
            return replay.hyperparameters(record.h).rule
    shapes = sorted(text_shapes(history.snapshots.source).items())
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes}
    for base in reversed([one for one in history.snapshots.versions() if one <= version]):
        kept = history.snapshots.optimizer(base).matrices(tensors)
        return next((name for name in OPTIMIZERS if MATRICES[name] == kept), DEFAULT)
    return DEFAULT


def make_version(history: History, weights: AttachedWeights, model: Any, tokenizer: Any, version: int) -> Rebuilt:
    """Make `weights`, on which `model` stands, those of `version`. Raises `RebuildError`, and what training raises."""
    replay.make_deterministic(weights.state.device)
    named = list(model.named_parameters())
    make = partial(make_trainer, model, named, tokenizer, state=weights.state)
    room = partial(capacity_for, packed=False, way="burst")
    rebuilder = Rebuilder(history, weights, make, room)
    plan = rebuilder.plan(version)
    weights.header.begin(weights.header.fence)
    return rebuilder.rebuild(plan, weights.header.lineage, version)
