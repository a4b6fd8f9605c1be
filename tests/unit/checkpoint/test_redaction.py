"""Texts of dropped transcripts leave the journal; everything else of it stays as it was."""

from pathlib import Path
from typing import Any

from worker.checkpoint.batch_codec import unpack_batch
from worker.checkpoint.journal import Journal
from worker.checkpoint.records import UpdateRecord
from worker.checkpoint.redaction import redact
from worker.data.replay_buffer import PREFIX

SOURCE = "a" * 32
TOKENS = [[b"\x01\0\0\0\x02\0\0\0", b"\x40"]]


def item(id: str) -> dict[str, Any]:
    text = id.removeprefix(PREFIX)
    return {"id": id, "transcript": {"messages": [f"text of {text}"]}, "weight": 0.5, "sequences": TOKENS}


def update(version: int, *ids: str) -> UpdateRecord:
    fresh = [id for id in ids if not id.startswith(PREFIX)]
    batch = [item(id) for id in ids]
    return UpdateRecord(version, "b" * 32, version - 1, version - 1, fresh, batch, {"loss": 1.0})


def on_disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


def test_the_texts_of_dropped_transcripts_leave_every_batch(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SOURCE)
    journal.append(update(1, "a", "b"))
    journal.append(update(2, "c"))
    journal.void(2)  # journaled, and never applied: its text lies there all the same
    journal.append(update(2, "c", PREFIX + "a"))
    journal.rotate()
    journal.append(update(3, "d", PREFIX + "c"))  # in the file that is open
    assert redact(journal, {"a", "c"}) == 4
    assert redact(journal, {"a", "c"}) == 0, "once is enough"
    said = on_disk(tmp_path)
    assert b"text of a" not in said and b"text of c" not in said
    assert b"text of b" in said and b"text of d" in said
    for seen in (journal, Journal(tmp_path, SOURCE)):
        assert [entry.ids for entry in seen.entries.values()] == [["a", "b"], ["c"], ["d"]]
        gone = frozenset({"a", "c"})
        left = [[one.id for one in unpack_batch(seen.read(version), gone)] for version in (1, 2, 3)]
        assert left == [["b"], [], ["d"]]
        assert [len(seen.read(version).batch) for version in (1, 2, 3)] == [2, 2, 2], "places stay"
        assert seen.read(1).batch[1] == item("b")
    journal.append(update(4, "e"))
    assert Journal(tmp_path, SOURCE).entries[4].ids == ["e"]


def test_expired_batches_and_strangers_are_left_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SOURCE)
    journal.append(update(1, "a"))
    journal.append(update(2, "b"))
    journal.rotate()
    journal.expire(covered=1, before=journal.last.time + 1)
    assert redact(journal, {"a", "nobody"}) == 0 == redact(journal, [])
    assert journal.read(1).batch is None and journal.read(2).batch == [item("b")]
