"""The weights of several ranks as one: tensors are put together and taken apart, and headers speak with one voice."""

import pytest
import torch

from worker.shared_weights.divided import DividedTensor, RankHeaders
from worker.shared_weights.header import APPLYING, CLEAN, HEADER_BYTES, Header, HeaderError, LeaseLostError
from worker.utils.shard import Shard

LINEAGE, OTHER = "f" * 32, "e" * 32


class Watched(Header):
    """Notes in `seen` what every rank's header says, after every word that is written into one."""

    def __init__(self, seen: list[list[tuple[object, object]]], every: list[Header]) -> None:
        super().__init__(torch.zeros(HEADER_BYTES, dtype=torch.uint8))
        self._seen, self._every = seen, every
        super().adopt(LINEAGE, 0)

    def _put(self, word: int, value: int) -> None:
        super()._put(word, value)
        self._seen.append([(one.state, one.version) for one in self._every])


def watched() -> tuple[RankHeaders, list[Header], list[list[tuple[object, object]]]]:
    seen: list[list[tuple[object, object]]] = []
    every: list[Header] = []
    made = [Watched(seen, every) for _ in range(3)]
    every += made
    seen.clear()
    return RankHeaders(made), every, seen


def test_rank_0_says_clean_only_while_all_ranks_have_that_version() -> None:
    header, every, seen = watched()
    header.begin(0)
    assert header.state == APPLYING and all(one.state == APPLYING for one in every)
    header.finish(1)
    header.begin(0)
    header.abandon()
    header.hold(0)
    header.adopt(OTHER, 7)
    assert header.fields() == every[0].fields() == {"lineage": OTHER, "version": 7, "state": CLEAN, "fence": 0}
    assert len(seen) > 20
    for first, *others in seen:
        assert first[0] == APPLYING or all(other == first for other in others), seen


@pytest.mark.parametrize("change", ["begin", "adopt", "finish"])
def test_ranks_that_disagree_are_torn_and_can_be_made_again(change: str) -> None:
    header, every, _ = watched()
    if change == "adopt":
        every[2].adopt(OTHER, 0)
    else:
        every[2].begin(0)
        if change == "finish":
            every[2].finish(1)
    assert (header.state, header.version, every[0].state) == (APPLYING, 0, CLEAN)
    header.hold(0)
    assert every[0].state == APPLYING, "the server, which reads rank 0's, must not go on"
    header.adopt(OTHER, 3)
    assert {(one.lineage, one.version, one.state) for one in every} == {(OTHER, 3, CLEAN)}


def test_a_lease_that_is_lost_leaves_every_header_as_it_was() -> None:
    header, every, _ = watched()
    header.revoke()
    with pytest.raises(LeaseLostError):
        header.begin(0)
    assert all(one.state == CLEAN for one in every)
    with pytest.raises(HeaderError, match="without begin"):
        header.finish(1)


def test_a_tensor_is_put_together_and_taken_apart() -> None:
    whole = torch.arange(24.0).view(6, 4)
    shards = [Shard((6, 4), 0, ((0, 1), (2, 2))), Shard((6, 4), 0, ((1, 1), (4, 2)))]
    divided = DividedTensor([shard.of(whole) for shard in shards], shards)
    assert tuple(divided.shape) == (6, 4) and torch.equal(divided.detach(), whole)
    divided.copy_(whole + 1)
    assert torch.equal(divided.tensors[1], shards[1].of(whole + 1)) and torch.equal(divided.detach(), whole + 1)
    held = DividedTensor([whole.clone(), whole.clone()], [None, None])
    held.copy_(whole * 2)
    assert all(torch.equal(one, whole * 2) for one in (*held.tensors, held.detach()))
