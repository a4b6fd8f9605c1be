"""The memory plan: printed rows that add up, what is chosen and refused."""

import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from memory_parts import GB, MIXTURE, SIZES, config_of, configs, plan_of

from worker.config.optimizers import OPTIMIZERS
from worker.data.batch_capacity import sizes_up_to
from worker.memory import planner
from worker.memory.graphs import NO_GRAPHS, graphs_beside
from worker.memory.model_config import ATTENTION, TextConfig
from worker.memory.optimizer_memory import state_bytes as planned_state_bytes
from worker.memory.peak_moments import BUCKET_BYTES
from worker.memory.plan import STEP, Plan, Way
from worker.memory.planner import (
    CONTEXT_BYTES,
    SLACK,
    MemoryPlanError,
    choose,
    layers_kept,
    longest_by_factors,
    make_plan,
    weight_bytes,
    within_longest,
)

tokens = st.integers(1, 100_000)
WAYS = st.sampled_from(["burst", "factors", "streaming"])
ways = st.fixed_dictionaries(
    {"way": WAYS, "recompute": st.booleans(), "embeddings": st.sampled_from(["apollo", "frozen"])}
)


def test_the_weights_of_27b() -> None:
    config = config_of("27B")
    assert config.count() == 26_895_998_464
    assert weight_bytes(config) == 2 * 26_895_998_464 + 2 * 48 * 48  # A_log is fp32 in the server
    assert f"{weight_bytes(config) / GB:.1f}" == "53.8"


def test_a_mixture_is_planned() -> None:
    """35B-A3B: a state that a matrix an expert makes small, and streaming; the gradients of all experts fit nowhere."""
    config = config_of(MIXTURE)
    assert config.count() == 34_660_610_688 and config.stacks() == 32_212_254_720
    assert [round(planned_state_bytes(config, one) / 1e6) for one in OPTIMIZERS] == [359, 248]
    assert 8 <= plan_of(config, 8192, way="streaming", recompute=True).total / GB <= 9
    assert plan_of(config, 512, way="factors", recompute=True).total > 2 * config.stacks()
    costs: dict[str, Any] = {"embeddings": "apollo", "context_bytes": CONTEXT_BYTES}
    assert longest_by_factors(config, sizes_up_to(8192), 60 * GB, **costs) == 0
    assert graphs_beside(config, sizes_up_to(8192), 999 * GB, way="burst", by_factors=False, **costs) == NO_GRAPHS


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_sane(size: str) -> None:
    config = config_of(size)
    burst = plan_of(config, 8192, way="burst", recompute=True)
    assert burst.weights < burst.total  # the gradients alone are as large as the weights
    assert burst.total < burst.weights + 15 * GB
    assert plan_of(config, 8192, way="streaming", recompute=True).total < 14 * GB
    hidden_states = dict(plan_of(config, 8192, way="streaming", recompute=True).rows)["layer inputs"]
    assert 0 <= hidden_states - 2 * config.hidden * len(config.layers) * 8192 < STEP


def printed(lines: list[str]) -> dict[str, int]:
    """Name -> units of 10 MB, as printed."""
    rows = [re.fullmatch(r"  (.+?) +(-?[\d,]+\.\d\d) GB", line) for line in lines[1:]]
    return {row[1]: round(float(row[2].replace(",", "")) * 100) for row in rows if row}


@given(configs, tokens, ways, st.integers(0, 400 * GB), st.integers(0, 400 * GB))
def test_the_printed_rows_add_up(config: TextConfig, tokens: int, way: dict[str, Any], free: int, used: int) -> None:
    plan = plan_of(config, tokens, **way)
    rows = printed(plan.render())
    assert len(rows) == len(plan.render()) - 1  # every line was read
    server = rows.pop("weights (shared, the server's)") + rows.pop("optimizer's state (the server's)")
    total = rows.pop("the trainer's own, total")
    assert sum(rows.values()) == total
    fitted = choose(config, tokens, plan.total + free, **chosen(way))
    device = fitted_device(fitted, used)
    assert fitted.free is not None
    lines = printed(fitted.render(device))
    rest, left = lines["KV cache and whatever else is in use"], lines["left"]
    assert lines["free for it"] == lines["the trainer's own, total"] + left
    assert server + rest + lines["the trainer's own, total"] + left == device // STEP


def chosen(way: dict[str, Any]) -> dict[str, Any]:
    return {
        "apply": way["way"],
        "recompute": "always" if way["recompute"] else "never",
        "embeddings": way["embeddings"],
    }


def fitted_device(plan: Plan, used: int) -> int:
    """A device with `used` bytes beside what the plan knows of."""
    assert plan.free is not None
    return plan.free + plan.weights + plan.state + used


@given(configs, tokens, st.integers(0, 5000), ways)
def test_more_tokens_never_need_less(config: TextConfig, tokens: int, more: int, way: dict[str, Any]) -> None:
    assert plan_of(config, tokens, **way).total <= plan_of(config, tokens + more, **way).total


@given(configs, tokens)
def test_streaming_recomputing_and_freezing_never_need_more(config: TextConfig, tokens: int) -> None:
    # each row is rounded by itself, and streaming's bucket comes and goes where a burst's gradients stand
    rounding = 6 * STEP + SLACK * BUCKET_BYTES

    def total(way: Way, recompute: bool, embeddings: str = "apollo") -> int:
        return plan_of(config, tokens, way=way, recompute=recompute, embeddings=embeddings).total

    for recompute in (False, True):
        assert total("streaming", recompute) <= total("burst", recompute) + rounding
    ways: tuple[Way, ...] = ("burst", "factors", "streaming")
    for way in ways:
        assert total(way, True) <= total(way, False) + rounding
        assert total(way, True, "frozen") <= total(way, True) + rounding


NARROW = TextConfig(
    hidden=1152, intermediate=14336, vocab=1, heads=1, kv_heads=1, head_dim=64, linear_key_heads=1,
    linear_value_heads=1, linear_key_dim=64, linear_value_dim=64, conv_kernel=1, layers=(ATTENTION,) * 5, tied=False,
    bias=False,
)  # fmt: skip


@given(configs, tokens, WAYS, st.sampled_from([0, 10**9, CONTEXT_BYTES]), st.data())
@example(NARROW, 1, "burst", 10**9, 1_719_989_760)  # five layers fit here, and none where CONTEXT_BYTES are to be taken
@example(NARROW, 1, "burst", CONTEXT_BYTES, 1_719_989_760)
def test_the_most_layers_that_fit_are_kept(config: TextConfig, tokens: int, way: Way, context: int, drawn: Any) -> None:
    """In exactly the plan that was asked about; `drawn`: the free bytes, near what some number of layers needs."""
    every = range(len(config.layers) + 1)
    totals = [make_plan(config, tokens, way=way, kept=n, context_bytes=context).total for n in every]
    near = st.builds(int.__add__, st.sampled_from(totals), st.integers(-2 * STEP, 2 * STEP))
    free = drawn if isinstance(drawn, int) else drawn.draw(near)
    found = layers_kept(config, tokens, free, way=way, embeddings="apollo", context_bytes=context)
    assert totals[found] <= free or (found == 0 and min(totals) > free)
    assert all(total > free for total in totals[found + 1 :])


def test_27b_by_factors_is_what_was_asked_for() -> None:
    """512 tokens in at most 14 GB, without a layer computed again; and in what is left for 8,192 streamed ones."""
    config = config_of("27B")
    assert plan_of(config, 512, way="factors", recompute=False).total <= 14 * GB
    share = plan_of(config, 8192, way="streaming", recompute=True).total
    costs: dict[str, Any] = {"embeddings": "apollo", "context_bytes": planner.CONTEXT_BYTES}
    assert longest_by_factors(config, sizes_up_to(8192), share, **costs) == 512
    assert layers_kept(config, 512, share, way="factors", **costs) > 40
    assert longest_by_factors(config, sizes_up_to(8192), 18 * GB, **costs) == 1024
    assert longest_by_factors(config, sizes_up_to(8192), 6 * GB, **costs) == 0


@pytest.mark.parametrize(
    ("size", "room", "fewer"),
    [("27B", 20.3, [256, 448, 512, 6144, 8192]), ("9B", 20.0, [256, 448, 512, 1024, 2048, 8192])],
)
def test_shorter_rows_take_more_than_the_longest_one_where_more_layers_keep_their_activations(
    size: str, room: float, fewer: list[int]
) -> None:
    """Of rows in what is left to a worker beside a server."""
    config, costs = config_of(size), {"embeddings": "apollo", "context_bytes": planner.CONTEXT_BYTES}
    planned = {}
    for tokens in sizes_up_to(8192):
        kept = layers_kept(config, tokens, int(room * GB), way="streaming", **costs)
        planned[tokens] = make_plan(config, tokens, way="streaming", kept=kept, **costs).total
    assert max(planned.values()) > planned[8192]
    assert list(within_longest(planned)) == fewer


@given(configs, st.integers(0, 400 * GB))
def test_the_longest_row_by_factors_fits_and_the_next_does_not(config: TextConfig, free: int) -> None:
    sizes = sizes_up_to(16384)
    found = longest_by_factors(config, sizes, free, embeddings="apollo", context_bytes=10**9)
    fits = {n: make_plan(config, n, way="factors", kept=0, context_bytes=10**9).total <= free for n in sizes}
    assert [size for size in sizes if fits[size]] == [size for size in sizes if size <= found]


FULL, AGAIN, STREAM_FULL, STREAM_AGAIN = ("burst", False), ("burst", True), ("streaming", False), ("streaming", True)


@pytest.mark.parametrize("size", SIZES)
def test_the_fastest_that_fits_is_chosen(size: str) -> None:
    config = config_of(size)
    order = [FULL, AGAIN, STREAM_FULL, STREAM_AGAIN]
    totals = [plan_of(config, 512, way=way, recompute=again).total for way, again in order]
    for free in {*totals, *(total - 1 for total in totals)}:
        fitting = [way for way, total in zip(order, totals, strict=True) if total <= free]
        if fitting:
            plan = choose(config, 512, free)
            assert (plan.way, plan.recompute) == fitting[0]
        else:
            with pytest.raises(MemoryPlanError):
                choose(config, 512, free)


def test_what_the_user_asked_for_is_kept() -> None:
    config = config_of("0.8B")
    plan = choose(config, 512, 100 * GB, apply="streaming", recompute="always")
    assert (plan.way, plan.recompute) == STREAM_AGAIN
    plan = choose(config, 512, 100 * GB, recompute="never")
    assert (plan.way, plan.recompute) == FULL
    with pytest.raises(MemoryPlanError, match=r"\(burst, "):
        choose(config, 512, 4 * GB, apply="burst")


def test_the_refusal_has_the_numbers_and_the_ways_out() -> None:
    config, needed = config_of("27B"), plan_of(config_of("27B"), 8192, way="streaming", recompute=True).total
    with pytest.raises(MemoryPlanError) as refused:
        choose(config, 8192, 9 * GB)
    said = str(refused.value)
    assert (
        f"needs {needed / GB:.2f} GB (streaming, layers recomputed, 8,192 tokens a pass) and 9.00 GB are free" in said
    )
    assert f"{(needed - 9 * GB) / GB:.2f} GB short" in said
    for way in ("--max-tokens", "--max-length", "--trainer-memory", "--gpu-memory-utilization"):
        assert way in said
    assert "--apply streaming" not in said
    found = re.search(r"\(([\d,]+) tokens would fit\)", said)
    assert found is not None
    most = int(found[1].replace(",", ""))
    assert sizes_up_to(most)[-1] == most  # no longer row is made for so many
    assert choose(config, most, 9 * GB).tokens == most
    with pytest.raises(MemoryPlanError):
        choose(config, 2 * most, 9 * GB)
    with pytest.raises(MemoryPlanError) as refused:
        choose(config, 8192, 9 * GB, apply="burst", recompute="never")
    assert "--apply streaming" in str(refused.value)
    assert "recomputed layers" in str(refused.value)
    assert "would fit" not in str(refused.value)  # not even the shortest row
    with pytest.raises(MemoryPlanError, match=r"or a larger --memory$"):
        choose(config, 8192, 9 * GB, way_out="a larger --memory")


def test_the_refusal_names_the_shortest_row_where_that_alone_fits() -> None:
    config = config_of("27B")
    shortest = sizes_up_to(1)[0]
    room = plan_of(config, shortest, way="streaming", recompute=True).total
    with pytest.raises(MemoryPlanError, match=rf"\({shortest} tokens would fit\)"):
        choose(config, 8192, room)
    with pytest.raises(MemoryPlanError) as refused:
        choose(config, 8192, plan_of(config, shortest - 1, way="streaming", recompute=True).total - 1)
    assert "would fit" not in str(refused.value)


def test_planning_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, worker.memory.planner; sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
