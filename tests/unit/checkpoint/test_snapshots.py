"""Checkpoints of live weights, against real files: exact, whole or absent, and checked before they are used."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from producer.progress import Progress
from worker.checkpoint import model_directory
from worker.checkpoint.snapshots import HalfRemoved, SnapshotError, Snapshots, Trained
from worker.checkpoint.state_dir import StateDir, StateError

WHO = Trained({"a": 1, "b": 7}, {"b": 7})


@pytest.fixture
def tensors(tiny_model: Path) -> dict[str, torch.Tensor]:
    """The tiny model's text tensors as a server shares them: A_log in fp32, with bits that bf16 cannot hold."""
    found = {}
    with safe_open(tiny_model / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name).to(torch.float32 if name.endswith("A_log") else torch.bfloat16)
            text = name.replace("model.language_model.", "model.", 1)
            found[text] = tensor + 0.123456789 if name.endswith("A_log") else tensor * 1.5
    return found


@pytest.fixture
def state() -> torch.Tensor:
    return torch.arange(256, dtype=torch.int64).to(torch.uint8)


@pytest.fixture
def snapshots(tmp_path: Path, tiny_model: Path) -> Snapshots:
    (tmp_path / "checkpoints").mkdir()
    return Snapshots(tmp_path / "checkpoints", tiny_model)


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 9) for name, tensor in tensors.items()}


def test_what_is_restored_is_what_was_written_bit_for_bit(
    snapshots: Snapshots, tensors: dict[str, torch.Tensor], state: torch.Tensor
) -> None:
    snapshots.write(7, "b" * 32, tensors, state, WHO)
    found, area = blank(tensors), torch.zeros_like(state)
    said = snapshots.check(7)
    snapshots.restore(7, found, area)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors) and torch.equal(area, state)
    assert any(name.endswith("A_log") for name in tensors), "or the fp32 tensors were not tried"
    assert (said.version, said.lineage) == (7, "b" * 32) and snapshots.trained(7) == WHO


def test_writing_and_checking_say_how_far_they_are(
    snapshots: Snapshots, tensors: dict[str, torch.Tensor], state: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, float, float | None]] = []
    monkeypatch.setattr(Progress, "__exit__", lambda one, *_: shown.append((one.label, one.done, one.total)))
    monkeypatch.setattr(Progress, "__enter__", lambda one: one)
    snapshots.write(7, "b" * 32, tensors, state, WHO)
    snapshots.check(7)
    (written, done, total), (checked, files, all_files) = shown
    assert written == "checkpoint of version 7" and total and 0.9 < done / total < 1.1
    assert checked == "checking the checkpoint of version 7" and files == all_files == len(snapshots.describe(7).files)


def test_a_checkpoint_loads_like_its_source(
    snapshots: Snapshots, tensors: dict[str, torch.Tensor], state: torch.Tensor, tiny_model: Path
) -> None:
    snapshots.write(7, "b" * 32, tensors, state, WHO)
    model, _ = model_directory.load(snapshots.path(7))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(dict(model.named_parameters())[name].detach(), tensors[name])
    names = {path.name for path in snapshots.path(7).iterdir()}
    assert names - {"tandem"} == {path.name for path in tiny_model.iterdir()}
    new, old = (load_file(folder / "model.safetensors") for folder in (snapshots.path(7), tiny_model))
    assert {name: tensor.dtype for name, tensor in new.items()} == {name: tensor.dtype for name, tensor in old.items()}


def test_version_zero_is_the_source_and_takes_no_room(
    snapshots: Snapshots, tensors: dict[str, torch.Tensor], state: torch.Tensor, tiny_model: Path
) -> None:
    found, area = blank(tensors), state.clone()
    snapshots.restore(0, found, area)
    assert torch.equal(found["model.norm.weight"], (tensors["model.norm.weight"] / 1.5)) and not area.any()
    assert snapshots.versions() == []


def test_every_file_is_checked(snapshots: Snapshots, tensors: dict[str, torch.Tensor], state: torch.Tensor) -> None:
    snapshots.write(7, "b" * 32, tensors, state, WHO)
    snapshots.check(7)
    files = [path for path in snapshots.path(7).rglob("*") if path.is_file()]
    assert {"model.safetensors", "config.json", "meta.msgpack", "ledger.msgpack"} <= {path.name for path in files}
    for path in files:
        whole = path.read_bytes()
        for broken in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
            path.write_bytes(broken)
            with pytest.raises(SnapshotError, match="damaged"):
                snapshots.check(7)
        path.write_bytes(whole)
        path.rename(path.with_suffix(".away"))
        with pytest.raises(SnapshotError, match="damaged"):
            snapshots.check(7)
        path.with_suffix(".away").rename(path)
    snapshots.check(7)


def test_a_half_written_one_is_removed_and_told(
    snapshots: Snapshots, tensors: dict[str, torch.Tensor], state: torch.Tensor
) -> None:
    snapshots.write(7, "b" * 32, tensors, state, WHO)
    half = snapshots.folder / ".8.xyz"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    again = Snapshots(snapshots.folder, snapshots.source)
    assert again.versions() == [7] and not half.exists() and again.notices == [HalfRemoved(half)]


def test_a_version_is_never_written_over(
    snapshots: Snapshots, tensors: dict[str, torch.Tensor], state: torch.Tensor
) -> None:
    snapshots.write(7, "b" * 32, tensors, state, WHO)
    snapshots.write(7, "c" * 32, blank(tensors), state, Trained({}, {}))
    assert snapshots.check(7).lineage == "b" * 32 and snapshots.trained(7) == WHO


def test_pruning_spares_what_is_named_and_what_is_marked(
    snapshots: Snapshots, tensors: dict[str, torch.Tensor], state: torch.Tensor
) -> None:
    for version in (1, 2, 3, 4):
        snapshots.write(version, "b" * 32, tensors, state, WHO)
    (snapshots.path(2) / "tandem" / "mark").write_text("good\n")
    assert snapshots.prune({4}) == [1, 3]
    assert snapshots.versions() == [2, 4] and sorted(p.name for p in snapshots.folder.iterdir()) == ["2", "4"]
    snapshots.check(2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, room for one checkpoint of the tiny model; skipped where mounting is not allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    small_disk: Path, tiny_model: Path, tensors: dict[str, torch.Tensor], state: torch.Tensor
) -> None:
    snapshots = Snapshots(small_disk, tiny_model)
    snapshots.write(1, "b" * 32, tensors, state, WHO)
    with pytest.raises(SnapshotError, match=r"MB are needed in .* are free.*--state-dir"):
        snapshots.write(2, "b" * 32, tensors, state, WHO)
    assert [path.name for path in small_disk.iterdir()] == ["1"]
    snapshots.check(1)


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing_behind(
    small_disk: Path, tiny_model: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else took the room after it was checked: the check is told of a larger disk."""
    monkeypatch.setattr("worker.checkpoint.snapshots.free_bytes", lambda folder: 1 << 40)
    snapshots = Snapshots(small_disk, tiny_model)
    with pytest.raises(SnapshotError, match="could not be written"):
        snapshots.write(2, "b" * 32, tensors, torch.zeros(5 << 20, dtype=torch.uint8), WHO)
    assert list(small_disk.iterdir()) == []


def test_a_read_only_directory_is_refused_by_name(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StateError, match=r"small.* cannot be written.*--state-dir"):
        StateDir(small_disk / "state").open()


def test_a_state_directory_has_one_user_at_a_time_and_is_private(tmp_path: Path) -> None:
    with StateDir(tmp_path / "state") as first:
        with pytest.raises(StateError, match=r"in use by process \d+"):
            StateDir(tmp_path / "state").open()
        assert {p.stat().st_mode & 0o777 for p in (first.path, first.journal, first.checkpoints)} == {0o700}
        assert (first.path / "lock").stat().st_mode & 0o777 == 0o600
    StateDir(tmp_path / "state").open().close()
