"""The epochs of cached prefixes and the wait for recomputation, by themselves. On a real vLLM: test_kept_caches.py."""

import asyncio
from typing import Any

import pytest

from worker.serving.cache_policy import CachePolicy
from worker.serving.vllm import recomputation
from worker.serving.vllm.prefixes import PrefixEpochs
from worker.serving.vllm.recomputation import Recomputation
from worker.serving.vllm.server_state import ServerState
from worker.serving.vllm_flags import LaunchError


def update(state: ServerState, version: int, **more: Any) -> None:
    state.pause()
    state.resume(version, **more)


def test_every_version_has_its_own_prefixes() -> None:
    state = ServerState("0" * 32, 3)
    salts = [state.prefixes.salt(None)]
    for version in (4, 5, 6):
        update(state, version)
        salts.append(state.prefixes.salt(None))
        assert state.oldest == version
    assert len(set(salts)) == 4


def test_a_request_of_the_pause_belongs_to_the_next_version() -> None:
    state = ServerState("0" * 32, 3)
    state.pause()
    salt = state.prefixes.salt(None)
    assert state.oldest == 3, "it says what may still be true"
    state.resume(4)
    assert state.prefixes.salt(None) == salt


@pytest.mark.parametrize("age", [0, 1, 3, 10])
def test_no_prefix_is_older_than_the_age_that_was_allowed(age: int) -> None:
    state = ServerState("0" * 32, 0, age)
    since: dict[str, int] = {state.prefixes.salt(None): 0}
    for version in range(1, 40):
        update(state, version)
        since.setdefault(state.prefixes.salt(None), version)
        assert since[state.prefixes.salt(None)] == state.oldest >= version - age
    assert len(since) == -(-40 // (age + 1)), "and none is forgotten before"


@pytest.mark.parametrize("age", [0, 5])
def test_weights_that_were_made_again_share_nothing_with_what_was_before(age: int) -> None:
    state = ServerState("0" * 32, 3, age)
    salt = state.prefixes.salt(None)
    update(state, 4, rebuilt=True)  # a rollback: one version on, perhaps a hundred back
    rolled_back = state.prefixes.salt(None)
    update(state, 40)  # a recovery, which jumps
    recovered = state.prefixes.salt(None)
    state.tear("a reason")
    state.mending = True
    state.resume(41)
    assert len({salt, rolled_back, recovered, state.prefixes.salt(None)}) == 4
    assert state.oldest == 41


def test_what_hogwild_computes_is_for_nobody_else() -> None:
    state = ServerState("0" * 32, 3, 10)
    salts = [state.prefixes.salt(None)]
    state.begin_hogwild()
    salts.append(state.prefixes.salt(None))
    state.pause()
    salts.append(state.prefixes.salt(None))
    state.resume(4)
    assert len(set(salts)) == 3 and state.prefixes.salt(None) == salts[2]


def test_an_update_that_was_given_up_leaves_the_version() -> None:
    state = ServerState("0" * 32, 3)
    state.pause()
    state.resume(3)
    assert state.oldest == state.version == 3


def test_salts_are_of_one_server_and_one_user() -> None:
    one, other = PrefixEpochs(0), PrefixEpochs(0)
    salts = {epochs.salt(own) for epochs in (one, other) for own in (None, "", "a", "b")}
    assert len(salts) == 8
    one.separate(0)
    assert not {one.salt("a"), one.salt(None)} & salts


def test_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(LaunchError, match="--prefix-max-age 2 cannot be used with --running recompute"):
        CachePolicy("recompute", 2)
    assert CachePolicy.of(CachePolicy("keep", 2).environment()) == CachePolicy("keep", 2)
    assert CachePolicy.of({}) == CachePolicy("keep", 0)


def test_the_next_version_waits_for_what_the_last_one_threw_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputation, "POLL_SECONDS", 0.001)
    made = {"a": 5, "b": 0, "done": 7}

    async def run() -> None:
        recomputed = Recomputation(lambda: dict(made))
        assert await recomputed.over(1) < 1, "nothing was thrown back yet"
        recomputed.begin()
        made.pop("done")
        with pytest.raises(TimeoutError):
            await recomputed.over(0.05)
        assert recomputed.left == 2
        made["a"] += 1
        with pytest.raises(TimeoutError):
            await recomputed.over(0.05)
        assert recomputed.left == 1
        made["b"] += 1
        made["new"] = 0  # came later: it has lost nothing
        await recomputed.over(30)

    asyncio.run(run())


def test_between_two_versions_answers_have_as_long_as_recomputing_took() -> None:
    made, now, slept = {"a": 5}, [100.0], []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += 7.0  # this long it really took
        made["a"] += len(slept) == 2
        await asyncio.sleep(0)

    async def run() -> None:
        recomputed = Recomputation(lambda: dict(made), clock=lambda: now[0], sleep=sleep)
        assert recomputed.seconds == 0
        recomputed.begin()
        await recomputed.over(30)
        assert recomputed.seconds == 14, "the time for answers is none of it"

    asyncio.run(run())
    assert slept[2:] == [14.0]
