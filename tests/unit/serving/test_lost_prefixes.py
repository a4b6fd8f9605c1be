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


def test_the_beginning_that_was_asked_for_longest_ago_goes_first() -> None:
    lost = LostPrefixes(BLOCK, 6 * BLOCK)
    for own in ("one", "other", "one", "third"):
        lost.asked(own, [*HISTORY, 1], 0)
    for own, tokens in (("one", 3 * BLOCK), ("other", 3 * BLOCK)):
        lost.asked(own, [*HISTORY, 1], 1)
        assert lost.tokens == tokens, "one was asked for again, and other went"


def test_the_end_of_a_prompt_goes_before_its_beginning() -> None:
    lost = LostPrefixes(BLOCK, 5 * BLOCK)
    lost.asked("one", [*HISTORY, 1], 0)
    lost.asked("other", [*HISTORY, 1], 0)
    lost.asked("one", [*HISTORY, 1], 1)
    assert lost.tokens == 2 * BLOCK


def test_a_beginning_that_is_missing_ends_what_would_be_found() -> None:
    lost = LostPrefixes(BLOCK, PLENTY)
    lost.asked(None, [*HISTORY, 1], 0)
    for place, digest in enumerate(list(lost._known)):
        if place == 1:  # of three, the middle one
            del lost._known[digest]
    lost.asked(None, [*HISTORY, 1], 1)
    assert lost.tokens == BLOCK


def test_what_is_kept_besides_takes_room_once_for_each_prompt() -> None:
    for beside, tokens in ((0, 6 * BLOCK), (BLOCK, 4 * BLOCK)):
        lost = LostPrefixes(BLOCK, 7 * BLOCK, beside)
        for epoch in (0, 1):
            for own in ("one", "other"):
                lost.asked(own, [*HISTORY, 1], epoch)
        assert lost.tokens == tokens
    assert lost._held == sum(room for _, room in lost._known.values()) <= 7 * BLOCK


def test_what_no_update_made_too_old_is_not_lost() -> None:
    lost = LostPrefixes(BLOCK, PLENTY)
    lost.asked("one", [*HISTORY, 1], 0)
    lost.excuse(1)
    lost.asked("one", [*HISTORY, 1], 1)
    lost.asked("other", [*HISTORY, 1], 1)
    assert lost.tokens == 0
    lost.asked("one", [*HISTORY, 1], 2)
    assert lost.tokens == 3 * BLOCK


LONG = [list(range(1000)), [*range(500), *range(500)]]


@given(st.lists(st.tuples(st.sampled_from(LONG), st.integers(0, 1000), st.integers(0, 1)), max_size=20))
def test_as_much_is_lost_as_was_asked_for_since_the_start_and_not_since_the_update(
    asked: list[tuple[list[int], int, int]],
) -> None:
    """Against a list of all that was asked for, with blocks of the least size."""
    lost, still, epoch, before = LostPrefixes(1, PLENTY), LostPrefixes(1, PLENTY), 0, []
    for words, length, updates in asked:
        epoch += updates
        ids, told = words[:length], lost.tokens
        lost.asked(None, ids, epoch)
        still.asked(None, ids, 0)
        ends = range(LEAST_BLOCK, len(ids), LEAST_BLOCK)
        found = [[then for one, then in before if len(one) > end and one[:end] == ids[:end]] for end in ends]
        assert lost.tokens - told == LEAST_BLOCK * sum(bool(epochs) and max(epochs) < epoch for epochs in found)
        before.append((ids, epoch))
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


def test_weights_that_are_made_again_and_pauses_that_come_to_nothing_lose_nothing() -> None:
    state = ServerState("lineage", 5)
    state.lost_prefixes = LostPrefixes(BLOCK, PLENTY)

    def ask() -> int:
        state.salt(None, [*HISTORY, 1])
        return state.lost_prefixes.tokens

    assert ask() == 0
    state.pause()
    state.resume(3, rebuilt=True)
    assert ask() == 0, "a rollback"
    state.pause()
    state.go_on()
    assert ask() == 0, "the trainer went"
    state.pause()
    state.tear("half-written")
    state.mending = True
    state.resume(3)
    assert ask() == 0, "restored"
    state.pause()
    state.resume(4)
    assert ask() == 3 * BLOCK, "an update"
