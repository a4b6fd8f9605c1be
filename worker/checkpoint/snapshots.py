"""Checkpoints of live weights: a model directory a version, with what it takes to go on training beside the weights.

    VERSION/*.safetensors, config ...   as the source model has them: `vllm serve` and `from_pretrained` load it
    VERSION/tandem/state.safetensors    the optimizer's state; tensors that the source keeps less exactly
    VERSION/tandem/ledger.msgpack       transcript id -> version, dropped ids
    VERSION/tandem/meta.msgpack         version, lineage, digests of all files; VERSION/tandem/mark: keep it

Must not know: Redis, the server. Version 0 is the source model itself and is never copied.
Invariants: a checkpoint appears whole or not at all, and is never written over; what is restored was checked first,
byte for byte; a checkpoint is written between updates by the only writer of the weights.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import msgpack
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from producer.errors import TandemError
from producer.progress import BYTES, progress
from worker.checkpoint import model_directory, record_file, records
from worker.checkpoint.file_digests import fingerprint, sha256
from worker.checkpoint.state_dir import free_bytes
from worker.checkpoint.stored_optimizer import STATE, StoredOptimizer
from worker.utils.fault_injection import point

_EXTRA = "tandem"


class SnapshotError(TandemError):
    """A checkpoint cannot be written or is not what was written; the message names it and says what to do."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint says of itself."""

    version: int
    lineage: str
    time: float
    source: str
    files: dict[str, str]
    """Path in the checkpoint -> SHA-256 of the file."""


@dataclass(frozen=True)
class Trained:
    """Which ids were ever trained (id -> version), and which were taken out again for ever (id -> version)."""

    ledger: dict[str, int]
    dropped: dict[str, int]


@dataclass(frozen=True)
class HalfRemoved:
    """The half-written checkpoint `path`, which a crash left, was removed; those before it are untouched."""

    path: Path


@dataclass(frozen=True)
class NoFiles:
    """The server's weights came from no files of `source`: there can be no checkpoints."""

    source: Path


class Snapshots:
    """The checkpoints in `folder`, of the model in directory `source`."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source
        self.fingerprint = fingerprint(source)
        self.has_layout = any(source.glob("*.safetensors"))
        """Whether there are files whose names and layout a checkpoint can take over."""
        self._check_formats()
        self.notices: list[HalfRemoved | NoFiles] = []
        for half in folder.glob(".[0-9]*"):
            shutil.rmtree(half, ignore_errors=True)
            self.notices.append(HalfRemoved(half))
        if not self.has_layout:
            self.notices.append(NoFiles(source))

    def _check_formats(self) -> None:
        """Before anything is pruned: what a later Tandem wrote is neither read nor deleted. Raises `SnapshotError`."""
        for version in self.versions():
            try:
                meta = record_file.read(self._meta(version), 0)
            except TandemError:
                continue  # damaged: reported when it is needed
            try:
                records.check_format(meta, self.path(version))
            except TandemError as error:
                raise SnapshotError(f"checkpoint {error}") from None

    def _meta(self, version: int) -> Path:
        return self.path(version) / _EXTRA / "meta.msgpack"

    def versions(self) -> list[int]:
        """Versions that have a checkpoint, oldest first, checked or not."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit() and path.is_dir())

    def marked(self) -> set[int]:
        """Versions whose checkpoint is never deleted by `prune`."""
        return {version for version in self.versions() if (self.path(version) / _EXTRA / "mark").exists()}

    def path(self, version: int) -> Path:
        """The model directory of `version`."""
        return self.folder / str(version) if version else self.source

    def write(
        self, version: int, lineage: str, tensors: dict[str, torch.Tensor], state: torch.Tensor, trained: Trained
    ) -> float:
        """Write `tensors` (text name -> shared view) and the optimizer's `state` as `version`; the seconds it took.

        Raises `SnapshotError`, with nothing left of it. Does nothing for a version that has one.
        """
        started = time.monotonic()
        if version in self.versions():
            return 0.0
        folder = None
        try:
            self._check_room(tensors, state)
            folder = Path(tempfile.mkdtemp(prefix=f".{version}.", dir=self.folder))
            both = 2 * (model_directory.directory_bytes(self.source) + state.nbytes)  # written, then read
            with progress(f"checkpoint of version {version}", both, BYTES) as shown:
                model_directory.write_layout(tensors, self.source, folder, shown.advance)
                (folder / _EXTRA).mkdir(mode=0o700)
                extra = {STATE: state.cpu().clone()} | _more_exact(tensors, folder, self.source)
                save_file(extra, folder / _EXTRA / "state.safetensors")
                shown.advance(state.nbytes)
                plain = {"ledger": trained.ledger, "dropped": trained.dropped}
                (folder / _EXTRA / "ledger.msgpack").write_bytes(msgpack.packb(plain))
                files = {}
                for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                    files[str(path.relative_to(folder))] = sha256(path)
                    shown.advance(path.stat().st_size)
            meta = {
                "kind": records.CHECKPOINT,
                "format": records.CHECKPOINT_FORMAT,
                "version": version,
                "lineage": lineage,
            }
            meta |= {"files": files, "time": time.time(), "source": self.fingerprint}
            (folder / _EXTRA / "meta.msgpack").write_bytes(record_file.pack(meta))
            point("checkpointing")
            model_directory.publish(folder, self.folder / str(version))
        except SnapshotError:
            raise
        except Exception as error:  # safetensors raises a type of its own for a full disk
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise SnapshotError(
                f"the checkpoint of version {version} could not be written to {self.folder} ({error}): nothing of it"
                " was kept, the older ones and the journal are untouched"
            ) from error
        return time.monotonic() - started

    def check(self, version: int) -> Snapshot:
        """Read what a checkpoint says of itself and compare every file's digest. Raises `SnapshotError`."""
        found = self.describe(version)
        with progress(f"checking the checkpoint of version {version}", len(found.files), "files") as shown:
            for name, digest in found.files.items():
                self._check_file(version, name, digest)
                shown.advance()
        return found

    def describe(self, version: int) -> Snapshot:
        """What the checkpoint says of itself, its files unread. Raises `SnapshotError`."""
        path = self._meta(version)
        try:
            meta = record_file.read(path, 0)
            said = Snapshot(meta["version"], meta["lineage"], meta["time"], meta["source"], meta["files"])
        except (TandemError, KeyError, TypeError) as error:
            raise SnapshotError(f"checkpoint {path.parents[1]} is damaged: its meta.msgpack cannot be read") from error
        if said.source != self.fingerprint:
            raise SnapshotError(f"checkpoint {path.parents[1]} is of another model than {self.source}")
        return said

    def trained(self, version: int) -> Trained:
        """Who was trained up to `version`. Raises `SnapshotError`; checks what it reads."""
        name = f"{_EXTRA}/ledger.msgpack"
        self._check_file(version, name, self.describe(version).files.get(name))
        plain = msgpack.unpackb((self.path(version) / name).read_bytes(), raw=False)
        return Trained(plain["ledger"], plain["dropped"])

    def _check_file(self, version: int, name: str, digest: str | None) -> None:
        path = self.path(version) / name
        try:
            sound = path.is_file() and sha256(path) == digest
        except OSError:
            sound = False
        if not sound:
            raise SnapshotError(f"checkpoint {self.path(version)} is damaged: {name} is not what was written")

    def check_layout(self, version: int, tensors: dict[str, torch.Tensor], state: torch.Tensor) -> None:
        """The checkpoint has all that `restore` needs, in the right shapes; from its files' headers. Raises
        `SnapshotError`."""
        parts = model_directory.parts_of(self.path(version), tensors, self.source)
        wrong = set(tensors) - {part.name for part in parts.values()}
        for file in sorted(self.path(version).glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                for name in parts.keys() & set(stored.keys()):
                    if tuple(stored.get_slice(name).get_shape()) != tuple(parts[name].view.shape):
                        wrong.add(parts[name].name)
        if version:
            with safe_open(self._state_file(version), framework="pt") as extra:
                if tuple(extra.get_slice(STATE).get_shape()) != tuple(state.shape):
                    wrong.add("the optimizer's state")
        if wrong:
            raise SnapshotError(
                f"{self.path(version)} does not fit the server's weights: {', '.join(sorted(wrong))} is missing or has"
                " another shape. Serve the model that it was made of"
            )

    def optimizer(self, version: int) -> StoredOptimizer:
        """What the checkpoint's state says of the optimizer."""
        return StoredOptimizer(self._state_file(version) if version else None)

    def _state_file(self, version: int) -> Path:
        return self.path(version) / _EXTRA / "state.safetensors"

    @torch.no_grad()
    def restore(self, version: int, tensors: dict[str, torch.Tensor], state: torch.Tensor) -> None:
        """Write the weights of `version` into `tensors`, and the optimizer's into `state`.

        `check` and `check_layout` must have passed.
        """
        parts = model_directory.parts_of(self.path(version), tensors, self.source)
        if missing := set(tensors) - {part.name for part in parts.values()}:
            raise SnapshotError(f"{self.path(version)} has no tensor for {', '.join(sorted(missing))}")
        for file in sorted(self.path(version).glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                for name in parts.keys() & set(stored.keys()):
                    parts[name].view.copy_(stored.get_tensor(name))
        if version == 0:
            state.zero_()
            return
        with safe_open(self._state_file(version), framework="pt") as extra:
            for name in extra.keys():  # noqa: SIM118 (safe_open is no mapping)
                target = state if name == STATE else tensors[name.removeprefix("exact.")]
                target.copy_(extra.get_tensor(name))

    def prune(self, keep: set[int]) -> list[int]:
        """Delete all but those of `keep` and the marked ones; returns their versions."""
        gone = [version for version in self.versions() if version not in keep | self.marked()]
        for version in gone:
            # Renamed first: a name of its own never stands for half a checkpoint.
            doomed = self.folder / f".{version}.gone"
            self.path(version).rename(doomed)
            shutil.rmtree(doomed)
        return gone

    def set_aside(self, version: int) -> Path:
        """Rename the checkpoint of `version`, so that it counts no more; where it is now. Nothing is deleted."""
        aside = self.folder / f"{version}.aside-{time.time_ns()}"
        self.path(version).rename(aside)
        return aside

    def _check_room(self, tensors: dict[str, torch.Tensor], state: torch.Tensor) -> None:
        needed = model_directory.directory_bytes(self.source) + state.nbytes
        free = free_bytes(self.folder)
        if free < needed * 1.05:
            raise SnapshotError(
                f"no checkpoint was written: {needed / 1e6:,.1f} MB are needed in {self.folder} and"
                f" {free / 1e6:,.1f} MB are free; the older ones and the journal are untouched. Make room, or name"
                " another --state-dir"
            )


def _more_exact(tensors: dict[str, torch.Tensor], folder: Path, source: Path) -> dict[str, torch.Tensor]:
    """Tensors whose shared dtype is not the source's (A_log is fp32 in vLLM): only these lose bits in its layout."""
    parts, extra = model_directory.parts_of(folder, tensors, source), {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in parts.keys() & set(stored.keys()):
                text = parts[name].name
                if stored.get_tensor(name).dtype != tensors[text].dtype:
                    extra[f"exact.{text}"] = tensors[text].detach().cpu().contiguous()
    return extra
