"""Models whose memory is planned: the sizes of Qwen3.5 by their config.json, and any others."""

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from worker.memory.model_config import ATTENTION, GDN, Experts, TextConfig
from worker.memory.plan import Plan
from worker.memory.planner import make_plan

FOLDER = Path(__file__).parents[1] / "data" / "configs"
SIZES = ("0.8B", "2B", "4B", "9B", "27B")
MIXTURE = "35B-A3B"
GB = 10**9


def config_of(size: str) -> TextConfig:
    return TextConfig.read(FOLDER / f"qwen3_5-{size}.json")


sizes = st.integers(1, 40)
configs = st.builds(
    TextConfig,
    hidden=sizes.map(lambda n: 128 * n),
    intermediate=sizes.map(lambda n: 512 * n),
    vocab=st.integers(1, 300_000),
    heads=sizes,
    kv_heads=st.integers(1, 8),
    head_dim=st.sampled_from([64, 128, 256]),
    linear_key_heads=sizes,
    linear_value_heads=sizes,
    linear_key_dim=st.sampled_from([64, 128]),
    linear_value_dim=st.sampled_from([64, 128]),
    conv_kernel=st.integers(1, 4),
    layers=st.lists(st.sampled_from([GDN, ATTENTION]), min_size=1, max_size=70).map(tuple),
    tied=st.booleans(),
    bias=st.booleans(),
    experts=st.none() | st.builds(Experts, st.integers(1, 9), st.integers(1, 8), st.integers(1, 999)),
)


def plan_of(config: TextConfig, tokens: int, *, recompute: bool, **more: Any) -> Plan:
    """All layers recomputed, or none."""
    return make_plan(config, tokens, kept=0 if recompute else len(config.layers), **more)
