"""One rank's part of a model: its sizes are those of the model that a rank's trainer is made of."""

import pytest
import torch
from memory_parts import FOLDER, MIXTURE, SIZES, config_of

from worker.memory.divided import beside, divided
from worker.memory.model_config import ConfigError, TextConfig
from worker.memory.planner import GROUP, make_plan
from worker.model import sharded
from worker.utils.torch_setup import prepare


@pytest.mark.parametrize("size", SIZES)
def test_shapes_are_those_of_a_rank_s_model(size: str) -> None:
    prepare()  # before transformers looks at torchvision
    from transformers import AutoConfig, AutoModelForCausalLM

    ranks = 2
    config = AutoConfig.from_pretrained(FOLDER / f"qwen3_5-{size}.json").get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sharded.divided(config, ranks, config.vocab_size // ranks))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert divided(config_of(size), ranks).parameters() == shapes


def test_what_ranks_take_beside_is_a_row_of_the_plan() -> None:
    part = divided(config_of("27B"), 2)
    alone = make_plan(part, 8192, way="streaming", kept=0)
    plan = make_plan(part, 8192, way="streaming", kept=0, ranks=2, group_bytes=beside(2))
    rows = dict(plan.rows)
    assert rows[GROUP] == beside(2) > 0 == beside(1)
    assert plan.total - alone.total == rows[GROUP] + rows["copies that are added up over ranks"]


def test_what_no_rank_trains_has_no_part() -> None:
    with pytest.raises(ConfigError, match=r"a dense Qwen3.5 alone"):
        divided(TextConfig.read(FOLDER / f"qwen3_5-{MIXTURE}.json"), 2)
