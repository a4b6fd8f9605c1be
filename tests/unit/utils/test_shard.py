"""Parts of a tensor, put together again; what is no part, and parts that do not make up the whole, are refused."""

from typing import Any

import pytest
import torch

from worker.utils.shard import Shard, ShardError, assemble, check_complete

MERGED = [Shard((12, 4), 0, ((first, 2), (4 + first, 2), (8 + first, 2))) for first in (0, 2)]
COLUMNS = [Shard((6, 8), 1, ((first, 4),)) for first in (0, 4)]


@pytest.mark.parametrize("shards", [MERGED, COLUMNS])
def test_parts_make_up_the_whole(shards: list[Shard]) -> None:
    whole = torch.arange(48.0).view(shards[0].shape)
    parts = [shard.of(whole) for shard in shards]
    assert [tuple(part.shape) for part in parts] == [shard.local for shard in shards]
    assert torch.equal(assemble(zip(parts, shards, strict=True)), whole)
    assert [Shard.read(shard.plain()) for shard in shards] == shards
    check_complete("w", shards)


def test_what_is_whole_on_each_is_complete() -> None:
    check_complete("w", [None, None])


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([MERGED[0], None], "divided on some ranks and whole"),
        ([MERGED[0], COLUMNS[0]], "divided otherwise"),
        ([MERGED[0], MERGED[0]], "index 0 of dimension 0 lies on two ranks.*as many GPUs as it has key heads"),
        ([COLUMNS[0]], "index 4 of dimension 1 lies on no rank"),
        ([MERGED[1]], "index 0 of dimension 0 lies on no rank"),
    ],
)
def test_parts_that_are_not_the_whole_are_refused(shards: list[Shard | None], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        check_complete("w", shards)


@pytest.mark.parametrize(
    "change",
    [{"pieces": [[0, 5], [4, 2]]}, {"pieces": [[0, 0]]}, {"pieces": []}, {"pieces": [[10, 4]]}, {"dim": 2},
     {"dim": "rows"}, {"shape": None}, {"pieces": [[-1, 2]]}],
)  # fmt: skip
def test_what_is_no_part_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ShardError):
        Shard.read(MERGED[0].plain() | change)
