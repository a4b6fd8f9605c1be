"""The journal's files: what a crash, a full disk and a bad disk do to them."""

import contextlib
import errno
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.checkpoint import journal as journal_module
from worker.checkpoint import record_file, state_dir
from worker.checkpoint.journal import Journal, JournalError, TornTail
from worker.checkpoint.records import UpdateRecord

SOURCE = "a" * 32


def update(version: int, *ids: str, batch: list[dict[str, Any]] | None = None) -> UpdateRecord:
    empty = [{"id": id, "transcript": {"messages": []}, "weight": 1.0, "sequences": []} for id in ids]
    return UpdateRecord(version, "b" * 32, version - 1, version - 1, list(ids), batch or empty, {"loss": 1.0})


def filled(folder: Path, count: int) -> Journal:
    journal = Journal(folder, SOURCE)
    for version in range(1, count + 1):
        journal.append(update(version, f"job-{version}"))
    return journal


def test_what_was_appended_is_there_after_a_restart(tmp_path: Path) -> None:
    filled(tmp_path, 3).close()
    again = Journal(tmp_path, SOURCE)
    assert sorted(again.entries) == [1, 2, 3] and again.notices == []
    assert again.read(2).batch[0]["id"] == "job-2" and again.last.version == 3
    again.append(update(4, "job-4"))
    assert Journal(tmp_path, SOURCE).entries[4].ids == ["job-4"]


def test_a_tail_cut_anywhere_costs_only_the_last_record(tmp_path: Path) -> None:
    path = filled(tmp_path, 3)._path
    whole = path.read_bytes()
    start = Journal(tmp_path, SOURCE).entries[3].offset
    for end in range(start + 1, len(whole)):
        path.write_bytes(whole[:end])
        journal = Journal(tmp_path, SOURCE)
        assert sorted(journal.entries) == [1, 2] and path.stat().st_size == start
        assert journal.notices == [TornTail(path, end - start)]
        journal.append(update(3, "other"))
        assert Journal(tmp_path, SOURCE).entries[3].ids == ["other"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_never_read_as_a_record(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flip")
    path = filled(folder, 4)._path
    whole = bytearray(path.read_bytes())
    last = Journal(folder, SOURCE).entries[4].offset
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    if at < last:
        with pytest.raises(JournalError, match=rf"{path.name} is damaged at byte \d+.*backup"):
            Journal(folder, SOURCE)
        assert path.read_bytes() == whole, "nothing is cut away that other records lie behind"
    else:
        journal = Journal(folder, SOURCE)
        assert sorted(journal.entries) == [1, 2, 3] and journal.notices[0].cut == len(whole) - last


def test_damage_in_a_closed_file_is_not_taken_for_a_torn_tail(tmp_path: Path) -> None:
    journal = filled(tmp_path, 2)
    first = journal._path
    journal.rotate()
    journal.append(update(3, "job-3"))
    first.write_bytes(first.read_bytes()[:-5])
    with pytest.raises(JournalError, match=first.name):
        Journal(tmp_path, SOURCE)


def test_a_full_disk_leaves_no_part_of_a_record(tmp_path: Path) -> None:
    journal = filled(tmp_path, 2)
    before = journal._path.read_bytes()
    with files_of_at_most(len(before) + 40), pytest.raises(JournalError, match="cannot be written"):
        journal.append(update(3, "job-3"))
    assert journal._path.read_bytes() == before and sorted(journal.entries) == [1, 2]
    journal.append(update(3, "job-3"))
    assert sorted(Journal(tmp_path, SOURCE).entries) == [1, 2, 3]


def test_a_void_version_may_be_used_again(tmp_path: Path) -> None:
    journal = filled(tmp_path, 2)
    journal.void(2)
    assert sorted(Journal(tmp_path, SOURCE).entries) == [1]
    journal.append(update(2, "other"))
    assert Journal(tmp_path, SOURCE).entries[2].ids == ["other"]


def test_pruning_keeps_all_versions_after_the_floor(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SOURCE)
    for version in range(1, 7):
        journal.append(update(version))
        if version % 2 == 0:
            journal.rotate()
    assert len(journal.prune(3)) == 1
    assert sorted(journal.entries) == sorted(Journal(tmp_path, SOURCE).entries) == [3, 4, 5, 6]
    assert journal.prune(3) == []
    journal.prune(6)
    assert journal.entries == {} and Journal(tmp_path, SOURCE).entries == {}


def test_texts_expire_and_the_rest_of_the_record_stays(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SOURCE)
    for version, id in ((1, "secret-a"), (2, "secret-b"), (3, "secret-c")):
        journal.append(update(version, id, batch=[{"id": id, "transcript": {"messages": [f"text of {id}"]}}]))
        if version < 3:
            journal.rotate()
    assert journal.expire(covered=1, before=journal.last.time + 1) == 1
    assert journal.expire(covered=1, before=journal.last.time + 1) == 0
    on_disk = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"text of secret-a" not in on_disk and b"text of secret-b" in on_disk
    for seen in (journal, Journal(tmp_path, SOURCE)):
        assert seen.entries[1].expired and seen.entries[1].ids == ["secret-a"]
        assert seen.read(1).batch is None and seen.read(2).batch and seen.read(3).batch


def test_another_models_journal_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 1).close()
    with pytest.raises(JournalError, match=r"of another model.*--state-dir"):
        Journal(tmp_path, "c" * 32)


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "update"},
        {"kind": "update", "version": "1", "parent": 0, "lineage": "x", "time": 0.0},
        {"kind": "rollback", "version": 3, "parent": 5, "lineage": "x", "time": 0.0},
        {"kind": "unheard of"},
        {"kind": "done", "version": 1},
        {"kind": "void"},
        {"kind": "segment"},
    ],
)
def test_sound_bytes_that_are_no_record_of_ours_are_named(tmp_path: Path, record: dict[str, Any]) -> None:
    path = filled(tmp_path, 1)._path
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + record_file.pack(record))
    with pytest.raises(JournalError, match=rf"{path.name}, byte {size}"):
        Journal(tmp_path, SOURCE)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that is full: no file grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_rotation_that_fails_leaves_the_file_open(tmp_path: Path) -> None:
    journal = filled(tmp_path, 2)
    first = journal._path
    with files_of_at_most(10), pytest.raises(JournalError, match="cannot be written"):
        journal.rotate()
    assert [path.name for path in tmp_path.iterdir()] == [first.name], "nothing is left of the new file"
    journal.append(update(3, "job-3"))
    assert sorted(Journal(tmp_path, SOURCE).entries) == [1, 2, 3]
    journal.rotate()
    journal.append(update(4, "job-4"))
    again = Journal(tmp_path, SOURCE)
    assert sorted(again.entries) == [1, 2, 3, 4] and again.entries[4].path != first


def test_a_rotation_whose_last_sync_fails_leaves_no_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file would make the old one closed, whose torn tail is damage."""
    journal = filled(tmp_path, 2)

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(state_dir, "sync", fail)
        with pytest.raises(JournalError, match="Input/output error"):
            journal.rotate()
    assert len(list(tmp_path.glob("*.journal"))) == 1
    journal.append(update(3, "job-3"))
    assert sorted(Journal(tmp_path, SOURCE).entries) == [1, 2, 3]


def test_an_append_whose_rotation_fails_has_written_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 1)
    journal = Journal(tmp_path, SOURCE)
    record = record_file.pack(update(1, "job-1").plain() | {"time": 1.5})

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(state_dir, "replace", full)
        journal.append(update(1, "job-1"))  # no error: it is on disk
        assert sorted(Journal(tmp_path, SOURCE).entries) == [1]
        with files_of_at_most(journal._size + len(record) // 2), pytest.raises(JournalError, match="make room"):
            journal.append(update(2, "job-2"))  # the disk is full indeed: a clean stop, and nothing was written
    assert sorted(journal.entries) == sorted(Journal(tmp_path, SOURCE).entries) == [1]
    journal.append(update(2, "job-2"))
    assert len(list(tmp_path.glob("*.journal"))) == 2


def test_texts_that_cannot_be_removed_are_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first file is rewritten, the second one is not: what is read then lies where it lies now."""
    journal = Journal(tmp_path, SOURCE)
    for version in (1, 2, 3):
        journal.append(update(version, f"job-{version}"))
        journal.append(update(version + 10, f"job-{version + 10}"))
        journal.rotate()
    whole, calls = state_dir.replace, []

    def once(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(path, data)

    monkeypatch.setattr(state_dir, "replace", once)
    with pytest.raises(JournalError, match="cannot be written"):
        journal.expire(covered=3, before=time.time() + 1)
    assert len(calls) == 2
    assert [journal.read(version).batch is None for version in (1, 2, 3)] == [True, False, False]
    assert all(journal.read(version + 10).ids == [f"job-{version + 10}"] for version in (1, 2, 3))


def test_a_record_that_could_not_be_cut_off_is_cut_off_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = filled(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail_to_sync)
        patched.setattr(os, "ftruncate", fail_to_sync)
        with pytest.raises(JournalError, match="Input/output error"):
            journal.append(update(2, "lost"))
    journal.append(update(2, "job-2"))
    assert Journal(tmp_path, SOURCE).entries[2].ids == ["job-2"] == journal.read(2).ids
    assert b"lost" not in journal._path.read_bytes()


def fail_to_sync(*arguments: int) -> None:
    raise OSError(errno.EIO, "Input/output error")
