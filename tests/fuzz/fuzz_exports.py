"""What the fuzz tests throw at `tandem enqueue`: files of every format with anything wrong anywhere in them.

Every record of a file is a transcript, an error of ours with its line, or counted as left out; or the whole file is
refused. Whom a record names, its transcript names.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from import_parts import lines, read

from producer import users
from producer.formats import READ
from producer.imports import AUTO
from producer.jsonl import NotTranscriptsError
from producer.transcript import Transcript

WHO = "somebody"


def _rows() -> Iterator[dict[str, Any]]:
    for path in sorted((Path(__file__).parents[1] / "data" / "formats").iterdir()):
        text = path.read_text()
        yield from json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())


ROWS = list(_rows())
NAMES = sorted({name for row in ROWS for name in row} | {"rating", "feedback", "user", "user_id", "metadata", "label"})
odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner),
    max_leaves=8,
)
steps = st.lists(st.integers(0, 9), max_size=8)


def changed(row: Any, path: list[int], value: Any) -> Any:
    """`row` with `value` in place of what `path` leads to: which of the fields or items, and so on."""
    if not path or not isinstance(row, dict | list) or not row:
        return value
    at = path[0] % len(row)
    if isinstance(row, list):
        return [changed(item, path[1:], value) if index == at else item for index, item in enumerate(row)]
    return {n: changed(item, path[1:], value) if index == at else item for index, (n, item) in enumerate(row.items())}


class Exports:
    """Files for `tandem enqueue`."""

    name, size = "exports", 1
    row = st.one_of(
        st.sampled_from(ROWS),
        st.builds(changed, st.sampled_from(ROWS), steps.filter(bool), odd),
        st.builds(lambda row, name, value: row | {name: value}, st.sampled_from(ROWS), st.sampled_from(NAMES), odd),
        odd.filter(lambda value: not isinstance(value, list)),  # a file that begins with one is an array
    )
    cases = st.tuples(
        st.lists(row, min_size=1, max_size=4) | st.binary(max_size=80),
        st.sampled_from([AUTO, AUTO, *(item.name for item in READ)]),
        st.booleans(),
        st.sampled_from(["learn", "chosen", "leave-out"]),
    )

    def take(self, case: tuple[list[Any] | bytes, str, bool, Any]) -> Counter[str]:
        given, name, dislikes, pairs = case
        if isinstance(given, list):
            given = [one | {"user": WHO} if isinstance(one, dict) else one for one in given]
        try:
            source, found = read(
                given if isinstance(given, bytes) else lines(*given), name, dislikes=dislikes, pairs=pairs
            )
        except NotTranscriptsError as error:
            assert str(error).startswith("f")
            return Counter(["refused as a whole"])
        sound = [item for _, item in found if isinstance(item, Transcript)]
        assert all(isinstance(item, Transcript | ValueError) and str(item) for _, item in found)
        assert all(item.id for item in sound)
        if isinstance(given, list):
            assert len(found) + source.left_out.total() + source.strays.total() == len(given)
            assert all(WHO in users.of(item.meta) for item in sound)
        return Counter(["some read" if sound else "none read"])
