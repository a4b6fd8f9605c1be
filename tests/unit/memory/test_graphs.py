"""Which short rows are replayed, and what their graphs hold: against measurements, and what fits beside the rest."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_parts import GB, config_of, configs

from worker.data.batch_capacity import sizes_up_to
from worker.memory import graphs
from worker.memory.graphs import NO_GRAPHS, graphs_beside, held_bytes, host_bound
from worker.memory.model_config import TextConfig
from worker.memory.peak_moments import input_bytes
from worker.memory.plan import Way
from worker.memory.planner import CONTEXT_BYTES, make_plan

SIZES = sizes_up_to(8192)
COSTS: dict[str, Any] = {"embeddings": "apollo", "context_bytes": CONTEXT_BYTES}


@pytest.mark.parametrize(("size", "longest"), [("0.8B", 2048), ("4B", 2048), ("9B", 1024), ("27B", 512)])
def test_rows_that_wait_for_the_host(size: str, longest: int) -> None:
    assert host_bound(config_of(size), SIZES) == [some for some in SIZES if some <= longest]


@pytest.mark.parametrize(
    ("size", "tokens", "way", "measured"),
    [("27B", 512, "factors", 8.09), ("0.8B", 512, "factors", 1.05), ("0.8B", 2048, "factors", 3.54),
     ("0.8B", 512, "burst", 1.32), ("0.8B", 2048, "burst", 3.48)],
)  # fmt: skip
def test_what_graphs_held_on_a_gpu_is_covered_and_not_by_much(
    size: str, tokens: int, way: Way, measured: float
) -> None:
    """Without recomputation, on an H100: reserved by torch's allocator."""
    config = config_of(size)
    held = held_bytes(config, tokens, way=way, kept=len(config.layers))
    assert measured <= held / GB <= 1.6 * measured, held / GB


def test_27b_replays_on_80_gb_since_its_graphs_lend_what_they_hold() -> None:
    """What a server leaves for streaming alone has no room for graphs; a quarter of the KV cache is enough."""
    config = config_of("27B")
    share = make_plan(config, 8192, way="streaming", kept=0).total
    assert graphs_beside(config, SIZES, share, way="streaming", by_factors=True, **COSTS) == NO_GRAPHS
    found = graphs_beside(config, SIZES, share + 3 * GB, way="streaming", by_factors=True, **COSTS)
    assert (found.rows, found.kept) == ((256, 448, 512), 64) and found.total < share + 3 * GB
    assert 5 * GB < found.lent < found.held, "all inputs of a row of 8,192 tokens"
    group = COSTS | {"group_bytes": GB}
    assert graphs_beside(config, SIZES, share + 5 * GB, way="streaming", by_factors=True, **group) == NO_GRAPHS
    least = graphs_beside(config, SIZES, int(18.5 * GB), way="streaming", by_factors=True, **COSTS)
    assert (least.rows, least.kept) == ((256, 448, 512), 0) and 18 * GB < least.total <= 18.5 * GB
    assert least.lent == 0, "who has the room lends nothing"
    most = graphs_beside(config, SIZES, 23 * GB, way="streaming", by_factors=True, **COSTS)
    assert (most.rows, most.kept) == ((256, 448, 512), 64) and 22 * GB < most.total <= 22.5 * GB


def test_versions_of_few_tokens_are_replayed() -> None:
    found = graphs_beside(config_of("27B"), sizes_up_to(400), 23 * GB, way="streaming", by_factors=True, **COSTS)
    assert found.rows == (256, 448)


def test_rows_that_are_streamed_are_never_replayed() -> None:
    assert graphs_beside(config_of("4B"), SIZES, 500 * GB, way="streaming", by_factors=False, **COSTS) == NO_GRAPHS


@given(configs, st.integers(0, 300 * GB), st.sampled_from(["burst", "factors", "streaming"]))
def test_what_is_chosen_fits_beside_the_longest_row_and_no_longer_one_does(
    config: TextConfig, free: int, way: Way
) -> None:
    found = graphs_beside(config, SIZES, free, way=way, by_factors=True, **COSTS)
    if config.experts:  # of a mixture nobody has captured a row
        assert found == NO_GRAPHS
        return
    short: Way = "factors" if way == "streaming" else way
    longest = make_plan(config, max(SIZES), way=way, kept=0, context_bytes=CONTEXT_BYTES).total

    def needs(tokens: int, kept: int, lends: bool = False) -> int:
        launched = make_plan(config, tokens, way=short, kept=kept, context_bytes=CONTEXT_BYTES).total
        held = held_bytes(config, tokens, way=short, kept=kept)
        if not lends:
            return max(longest, launched) + held
        lent = min(held - graphs.GRAPH_BYTES, input_bytes(config, max(SIZES)))
        beside = make_plan(config, max(SIZES), way=way, kept=0, lent=lent, context_bytes=CONTEXT_BYTES).total
        return max(beside + held, launched)

    every = len(config.layers)
    longer = [size for size in host_bound(config, SIZES) if size > max(found.rows, default=0)]
    assert all(needs(size, kept) > free for size in longer for kept in (0, every))
    if found.rows:
        lends = found.lent > 0
        assert found.total == needs(max(found.rows), found.kept, lends) <= free
        assert found.rows == tuple(size for size in SIZES if size <= max(found.rows))
        assert found.kept == every or needs(max(found.rows), every, lends) > free
        assert not lends or way == "streaming"
    else:
        assert found == NO_GRAPHS


def test_graphs_are_a_row_of_the_plan() -> None:
    plan = make_plan(config_of("4B"), 8192, way="burst", kept=0)
    beside = plan.with_graphs(3 * GB, (512, 1024))
    assert beside.total == plan.total + 3 * GB
    assert "rows of up to 1,024 tokens replayed as CUDA graphs" in beside.title()
    assert any("graphs of short rows" in line and "3.00 GB" in line for line in beside.render())
    assert "replayed" not in plan.title()
    assert graphs.LONGEST < 8192
