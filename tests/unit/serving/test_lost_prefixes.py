"""Tokens of prompts that an update makes a server compute again are counted, and no others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.serving.vllm.lost_prefixes import LEAST_BLOCK, LostPrefixes
from worker.serving.vllm.server_state import ServerState

BLOCK = 200
PLENTY = 10**6
HISTORY = list(range(3 * BLOCK))


def test_a_history_that_is_sent_again_after_an_update_is_lost_once() -> None:
    lost = LostPrefixes(BLOCK, PLENTY)
    for _ in range(3):
        lost.asked(None, [*HISTORY, 1], 0)
    assert lost.tokens == 0, "without an update it was read from the cache"
    lost.asked(None, [*HISTORY, 2, 3], 1)
    assert lost.tokens == 3 * BLOCK
    lost.asked(None, [*HISTORY, 4], 1)
    assert lost.tokens == 3 * BLOCK, "computed since the update"
    lost.asked(None, [*HISTORY, *range(BLOCK), 4], 5)
    assert lost.tokens == 6 * BLOCK, "what is new in it nobody had cached"


def test_the_last_token_is_always_computed() -> None:
    lost = LostPrefixes(BLOCK, PLENTY)
    for epoch in (0, 1):
        lost.asked(None, HISTORY, epoch)
    assert lost.tokens == 2 * BLOCK, "of three blocks the last holds the last token"


def test_a_beginning_counts_only_as_a_whole() -> None:
    """As vLLM finds it: from the first token on."""
    lost = LostPrefixes(BLOCK, PLENTY)
    lost.asked(None, [*HISTORY, 1], 0)
    lost.asked(None, [9, *HISTORY[1:], 1], 1)
    lost.asked("of a user", [*HISTORY, 1], 1)
    assert lost.tokens == 0
    lost.asked(None, [*HISTORY[: 2 * BLOCK], 9, *HISTORY], 1)
    assert lost.tokens == 2 * BLOCK


def test_what_the_cache_has_no_room_for_is_not_lost() -> None:
    lost = LostPrefixes(BLOCK, 3 * BLOCK)
    lost.asked(None, [*HISTORY, 1], 0)
    lost.asked("another", [*HISTORY, 1], 0)
    lost.asked(None, [*HISTORY, 1], 1)
    assert lost.tokens == 0
    off = LostPrefixes(BLOCK, 0)
    for epoch in range(3):
        off.asked(None, [*HISTORY, 1], epoch)
    assert off.tokens == 0, "no cache"


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=1000), st.integers(0, 1)), max_size=20))
def test_never_more_than_was_asked_for_and_nothing_without_updates(asked: list[tuple[list[int], int]]) -> None:
    lost, still, epoch = LostPrefixes(1, PLENTY), LostPrefixes(1, PLENTY), 0
    for ids, updates in asked:
        epoch += updates
        before = lost.tokens
        lost.asked(None, ids, epoch)
        still.asked(None, ids, 0)
        assert 0 <= lost.tokens - before <= max(0, len(ids) - 1) // LEAST_BLOCK * LEAST_BLOCK
    assert still.tokens == 0


@pytest.mark.parametrize(("max_age", "tokens"), [(0, 3 * BLOCK), (1, 0)])
def test_a_server_counts_by_the_age_that_prefixes_may_have(max_age: int, tokens: int) -> None:
    state = ServerState("lineage", 0, max_age)
    state.lost_prefixes = LostPrefixes(BLOCK, PLENTY)
    salts = [state.salt(None, [*HISTORY, 1])]
    state.pause()
    state.resume(1)
    salts.append(state.salt(None, [*HISTORY, 1]))
    assert state.lost_prefixes.tokens == tokens
    assert (salts[0] == salts[1]) == (max_age == 1)
