"""The optimizer's state and scratch: what is planned is what it takes."""

import pytest
import torch
from hypothesis import given
from memory_parts import MIXTURE, SIZES, config_of, configs

from worker.apollo import launch_tables, state_bytes
from worker.apollo.kernels import columns
from worker.apollo.parameters import make_slots
from worker.config.optimizers import MATRICES, OPTIMIZERS
from worker.memory import planner
from worker.memory.model_config import TextConfig
from worker.memory.optimizer_memory import scratch_bytes
from worker.memory.optimizer_memory import state_bytes as planned_state_bytes
from worker.memory.plan import STEP


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("size", [*SIZES, MIXTURE])
def test_the_state_is_what_the_optimizer_asks_for(size: str, optimizer: str) -> None:
    config = config_of(size)
    shapes = list(config.parameters().values())
    assert planned_state_bytes(config, optimizer) == state_bytes(shapes, matrices=MATRICES[optimizer])


@given(configs)
def test_the_state_of_any_model_is_what_the_optimizer_asks_for(config: TextConfig) -> None:
    shapes = list(config.parameters().values())
    assert planned_state_bytes(config) == state_bytes(shapes)
    assert planned_state_bytes(config, "factored") == state_bytes(shapes, matrices="factored")


def test_the_state_of_27b_is_what_the_help_says() -> None:
    assert [round(planned_state_bytes(config_of("27B"), one) / 1e6) for one in OPTIMIZERS] == [68, 52]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_mixture_s_scratch_is_planned(optimizer: str) -> None:
    """Projections, partial sums and tables, as worker.apollo.device_tables has them."""
    config = config_of(MIXTURE)
    parameters = [
        torch.nn.Parameter(torch.empty(shape, device="meta", dtype=torch.bfloat16))
        for shape in config.parameters().values()
    ]
    slots = make_slots([{"params": parameters}], MATRICES[optimizer])
    tiling = launch_tables.Tiling()
    kinds = [launch_tables.kind_of(slot, tiling) for slot in slots]
    counts = [launch_tables.counts_of(slot, kind, tiling) for slot, kind in zip(slots, kinds, strict=True)]
    taken = 4 * launch_tables.scratch_of(kinds, counts, tiling.window)[2]
    for slot, kind, count in zip(slots, kinds, counts, strict=True):
        factored = kind.shape == launch_tables.FACTORED
        taken += 4 * (slot.rows + 2 * slot.cols if factored else min(slot.rows, slot.cols))
        taken += 12 * count.tiles + 16 * (count.out + count.chunks)
        taken += 8 * (columns.COLUMNS.value + columns.BINDINGS.value) + 4 * columns.STATISTICS.value + 12
    assert taken <= scratch_bytes(config, optimizer) <= 1.2 * taken


@pytest.mark.parametrize("size", [*SIZES, MIXTURE])
def test_the_factored_rule_s_partial_sums_are_planned(size: str) -> None:
    config = config_of(size)
    parameters = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in config.parameters().values()]
    slots = make_slots([{"params": parameters}], "factored")
    tiling = launch_tables.Tiling()
    kinds = [launch_tables.kind_of(slot, tiling) for slot in slots]
    counts = [launch_tables.counts_of(slot, kind, tiling) for slot, kind in zip(slots, kinds, strict=True)]
    taken = 4 * launch_tables.scratch_of(kinds, counts, tiling.window)[2]
    planned = round(scratch_bytes(config, "factored") - scratch_bytes(config, "apollo-mini"))
    assert taken <= planned <= 2 * taken
    mini, factored = (planner.make_plan(config, 1024, way="burst", kept=0, optimizer=one) for one in OPTIMIZERS)
    assert factored.total - mini.total >= planned - 2 * STEP and factored.state <= mini.state
