"""Messages are bounded msgpack maps, and nothing else is one."""

import pytest

from worker.utils.messages import MAX_MESSAGE, WireError, pack, unpack


def test_what_is_no_bounded_map_is_refused() -> None:
    for body in (b"", b"\xc1", b"\x01", b"\x93\x01\x02", b"x" * (MAX_MESSAGE + 1)):
        with pytest.raises(WireError, match=r"limit|map|msgpack"):
            unpack(body)
    assert unpack(pack({"a": 1})) == {"a": 1}


def test_numbers_are_keys_only_where_that_is_asked_for() -> None:
    body = pack({"versions": {3: "x"}})
    with pytest.raises(WireError, match="not a msgpack message"):
        unpack(body)
    assert unpack(body, numbered=True) == {"versions": {3: "x"}}
