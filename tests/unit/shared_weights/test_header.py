"""The header and the record beside the weights: what they promise, and what broken bytes make of them."""

import uuid

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.shared_weights.batch_record import RECORD_BYTES, RecordArea, RecordError
from worker.shared_weights.header import APPLYING, CLEAN, HEADER_BYTES, Header, HeaderError

LINEAGE = "f" * 16 + "0123456789abcdef"  # the upper half does not fit a signed word


def new_header() -> tuple[Header, torch.Tensor]:
    memory = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
    header = Header(memory)
    header.adopt(LINEAGE, 0)
    return header, memory


def test_header_says_what_was_written_to_whoever_maps_the_memory() -> None:
    header, memory = new_header()
    other = Header(memory)
    assert other.fields() == {"lineage": LINEAGE, "version": 0, "state": CLEAN, "fence": 0}
    header.begin(header.fence)
    assert (other.state, other.version) == (APPLYING, 0)
    header.finish(1)
    assert (other.state, other.version) == (CLEAN, 1)


@given(st.uuids(), st.integers(0, 2**62))
def test_adopt_keeps_any_lineage_and_version(lineage: uuid.UUID, version: int) -> None:
    header, _ = new_header()
    header.adopt(lineage.hex, version)
    assert header.fields() == {"lineage": lineage.hex, "version": version, "state": CLEAN, "fence": 0}


class Watched(Header):
    """Another process looks at the header after every word that is written."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor)
        self.seen: list[tuple[object, ...]] = []
        self._reader = Header(tensor)

    def _put(self, word: int, value: int) -> None:
        super()._put(word, value)
        fields = self._reader.fields()
        self.seen.append((fields["state"], fields["lineage"], fields["version"]))


def test_whoever_reads_clean_reads_the_new_version_and_lineage() -> None:
    _, memory = new_header()
    header = Watched(memory)
    header.begin(0)
    header.finish(1)
    assert {seen for seen in header.seen if seen[0] == CLEAN} == {(CLEAN, LINEAGE, 1)}
    header.seen.clear()
    header.adopt("a" * 32, 7)
    assert {seen for seen in header.seen if seen[0] == CLEAN} == {(CLEAN, "a" * 32, 7)}
    assert header.seen[0][0] == APPLYING, "said before anything else changes"


def test_steps_out_of_order_are_refused_and_change_nothing() -> None:
    header, _ = new_header()
    with pytest.raises(HeaderError, match="without begin"):
        header.finish(1)
    header.begin(header.fence)
    with pytest.raises(HeaderError, match="torn"):
        header.begin(header.fence)
    header.finish(5)
    header.begin(header.fence)
    with pytest.raises(HeaderError, match="before 5"):
        header.finish(4)
    assert header.fields() == {"lineage": LINEAGE, "version": 5, "state": APPLYING, "fence": 0}
    header.finish(5)  # an update that wrote nothing
    assert header.state == CLEAN


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_other_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(HeaderError, match="restart the server"):
        Header(torch.frombuffer(bytearray(data), dtype=torch.uint8)).fields()


@pytest.mark.parametrize("state", [0, 3, -1])
def test_an_unknown_state_is_an_error_not_clean(state: int) -> None:
    header, memory = new_header()
    memory.view(torch.int64)[4] = state
    with pytest.raises(HeaderError, match="state"):
        header.fields()


def test_header_memory_of_another_size_is_refused() -> None:
    with pytest.raises(HeaderError, match="64 bytes"):
        Header(torch.zeros(32, dtype=torch.uint8))


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@given(st.lists(st.dictionaries(st.text(max_size=8), plain, max_size=4), min_size=1, max_size=4))
def test_the_last_record_is_read_back(records: list[dict[str, object]]) -> None:
    memory = torch.zeros(8192, dtype=torch.uint8)
    area = RecordArea(memory)
    assert area.read() is None
    for record in records:
        area.write(record)
        assert RecordArea(memory).read() == record


@given(st.integers(0, 3), st.data())
@settings(max_examples=200)
def test_a_write_cut_short_leaves_the_record_before_it(writes: int, data: st.DataObject) -> None:
    """A kill stops a write at any byte: of the new record, only a prefix has reached the memory."""
    memory = torch.zeros(2048, dtype=torch.uint8)
    area = RecordArea(memory)
    for version in range(writes):
        area.write({"version": version, "jobs": ["x" * 40] * version})
    before, kept = area.read(), memory.clone()
    area.write({"version": writes, "jobs": ["y" * data.draw(st.integers(0, 300))]})
    changed = (memory != kept).nonzero()
    cut = data.draw(st.integers(int(changed[0]), int(changed[-1])))
    torn = torch.cat([memory[:cut], kept[cut:]])
    assert RecordArea(torn).read() == before
    RecordArea(torn).write({"version": writes + 1})
    assert RecordArea(torn).read() == {"version": writes + 1}


@given(st.binary(min_size=256, max_size=512))
def test_garbage_is_an_error_or_nothing_never_a_record(data: bytes) -> None:
    memory = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        assert RecordArea(memory).read() is None
    except RecordError as error:
        assert "restart the server" in str(error)


def test_a_record_changed_by_one_bit_is_not_read() -> None:
    memory = torch.zeros(1024, dtype=torch.uint8)
    area = RecordArea(memory)
    area.write({"version": 1})
    area.write({"version": 2})
    memory[512 + 30] ^= 1
    assert area.read() == {"version": 1}
    memory[30] ^= 1
    with pytest.raises(RecordError, match="damaged"):
        area.read()


def test_a_record_too_large_is_refused_and_the_last_one_stays() -> None:
    area = RecordArea(torch.zeros(256, dtype=torch.uint8))
    area.write({"version": 1})
    with pytest.raises(RecordError, match="fewer jobs"):
        area.write({"jobs": ["x" * 200]})
    assert area.read() == {"version": 1}


def test_the_real_area_holds_thousands_of_jobs() -> None:
    result = {"version": 12, "loss": 1.25, "turns": 3, "sequences": 1, "tokens": 1000, "dropped_messages": 0}
    jobs = [uuid.uuid4().hex for _ in range(10_000)]
    record = {"version": 12, "jobs": jobs, "results": {job: result for job in jobs}}
    area = RecordArea(torch.zeros(RECORD_BYTES, dtype=torch.uint8))
    area.write(record)
    assert area.read() == record
