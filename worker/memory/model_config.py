"""A Qwen3.5 model's sizes from its config.json, and from them the shape of every parameter that is trained.

Must not know: torch. `tandem serve` reads this before torch may be imported.
Invariants: names and shapes are those of transformers' Qwen3_5ForCausalLM and Qwen3_5MoeForCausalLM; whatever is
missing, of another type or of another model is refused by name.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from producer.errors import TandemError
from worker.utils.stacks import is_stack

MODEL_TYPES = ("qwen3_5", "qwen3_5_text")
MIXTURES = ("qwen3_5_moe", "qwen3_5_moe_text")
GDN, ATTENTION = "linear_attention", "full_attention"
EXPERT_COUNTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
Shapes = dict[str, tuple[int, ...]]

_SIZES = {
    "hidden": "hidden_size",
    "vocab": "vocab_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "linear_key_heads": "linear_num_key_heads",
    "linear_value_heads": "linear_num_value_heads",
    "linear_key_dim": "linear_key_head_dim",
    "linear_value_dim": "linear_value_head_dim",
    "conv_kernel": "linear_conv_kernel_dim",
}


class ConfigError(TandemError):
    """A config.json that cannot be read, or is not a Qwen3.5's."""


@dataclass(frozen=True)
class Experts:
    """Of every layer of a mixture: how many there are, how many a token takes, and the width of each."""

    count: int
    taken: int
    intermediate: int

    @staticmethod
    def of(text: Mapping[str, Any], where: str) -> "Experts":
        """From a config.json's text part. Raises ConfigError naming the field."""
        names = "num_experts", "num_experts_per_tok", "moe_intermediate_size"
        return Experts(*(_positive(text, name, where) for name in names))

    def shapes(self, hidden: int) -> Shapes:
        """The router, and all experts of a layer: each kind of matrix is one stack."""
        return {
            "mlp.gate.weight": (self.count, hidden),
            "mlp.experts.gate_up_proj": (self.count, 2 * self.intermediate, hidden),
            "mlp.experts.down_proj": (self.count, hidden, self.intermediate),
            "mlp.shared_expert_gate.weight": (1, hidden),
        }


class OtherModelError(ConfigError):
    """It is of another model than Qwen3.5."""


@dataclass(frozen=True)
class TextConfig:
    """The text model's sizes; `layers` names each layer's kind, GDN or ATTENTION. intermediate: of a layer's MLP; in
    a mixture, of the expert that all tokens share."""

    hidden: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    linear_key_heads: int
    linear_value_heads: int
    linear_key_dim: int
    linear_value_dim: int
    conv_kernel: int
    layers: tuple[str, ...]
    tied: bool
    bias: bool = False
    experts: Experts | None = None

    @staticmethod
    def of(config: Mapping[str, Any], where: str = "config.json") -> "TextConfig":
        """From the contents of a config.json, with or without a vision tower. Raises ConfigError naming the field."""
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES + MIXTURES:
            known = f"{MODEL_TYPES[0]}, {MIXTURES[0]}"
            raise OtherModelError(f"{where}: model_type is {model_type!r}, and only Qwen3.5 ({known}) is known")
        text = config.get("text_config", config)
        if not isinstance(text, Mapping):
            raise ConfigError(f"{where}: text_config must be an object")
        mixture = model_type in MIXTURES
        width = "shared_expert_intermediate_size" if mixture else "intermediate_size"
        sizes = {name: _positive(text, field, where) for name, field in (_SIZES | {"intermediate": width}).items()}
        experts = Experts.of(text, where) if mixture else None
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
        bias = bool(text.get("attention_bias", False))
        return TextConfig(**sizes, layers=_layers(text, where), tied=bool(tied), bias=bias, experts=experts)

    @staticmethod
    def read(path: Path) -> "TextConfig":
        """From the file `path`. Raises ConfigError naming it."""
        return TextConfig.of(read_config(path), str(path))

    @property
    def queries(self) -> int:
        """Elements a token of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Elements a token of all key heads, or all value heads, of full attention."""
        return self.kv_heads * self.head_dim

    @property
    def linear_keys(self) -> int:
        """Elements a token of the delta net's keys, or queries."""
        return self.linear_key_heads * self.linear_key_dim

    @property
    def linear_values(self) -> int:
        """Elements a token of the delta net's values."""
        return self.linear_value_heads * self.linear_value_dim

    @property
    def conv(self) -> int:
        """Channels of the delta net's convolution: queries, keys and values."""
        return 2 * self.linear_keys + self.linear_values

    @property
    def exact(self) -> int:
        """Parameters that the server holds in fp32: A_log."""
        return self.layers.count(GDN) * self.linear_value_heads

    def tables(self) -> Shapes:
        """Embeddings, and the head where it is a parameter of its own."""
        names = ["model.embed_tokens.weight", *([] if self.tied else ["lm_head.weight"])]
        return dict.fromkeys(names, (self.vocab, self.hidden))

    def layer(self, kind: str) -> Shapes:
        """The parameters of one layer of `kind`, named from the layer down."""
        hidden, wide = self.hidden, self.intermediate
        mixer = self._gdn() if kind == GDN else self._attention()
        mlp = "mlp" if self.experts is None else "mlp.shared_expert"
        experts = self.experts.shapes(hidden) if self.experts else {}
        return mixer | experts | {
            f"{mlp}.gate_proj.weight": (wide, hidden),
            f"{mlp}.up_proj.weight": (wide, hidden),
            f"{mlp}.down_proj.weight": (hidden, wide),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }  # fmt: skip

    def stacks(self) -> int:
        """Parameters in stacks of experts, which leave no factors."""
        shapes = self.experts.shapes(self.hidden).values() if self.experts else []
        return len(self.layers) * sum(math.prod(shape) for shape in shapes if is_stack(shape))

    def parameters(self) -> Shapes:
        """Name -> shape of every parameter of the text model; a tied head is not there twice."""
        layers = {kind: self.layer(kind) for kind in (GDN, ATTENTION)}
        named = self.tables() | {"model.norm.weight": (self.hidden,)}
        for number, kind in enumerate(self.layers):
            named |= {f"model.layers.{number}.{name}": shape for name, shape in layers[kind].items()}
        return named

    def count(self) -> int:
        """Parameters of the text model."""
        return sum(math.prod(shape) for shape in self.parameters().values())

    def _gdn(self) -> Shapes:
        hidden, values, heads = self.hidden, self.linear_values, self.linear_value_heads
        shapes: Shapes = {
            "dt_bias": (heads,),
            "A_log": (heads,),
            "conv1d.weight": (self.conv, 1, self.conv_kernel),
            "norm.weight": (self.linear_value_dim,),
            "in_proj_qkv.weight": (self.conv, hidden),
            "in_proj_z.weight": (values, hidden),
            "in_proj_b.weight": (heads, hidden),
            "in_proj_a.weight": (heads, hidden),
            "out_proj.weight": (hidden, values),
        }
        return {f"linear_attn.{name}": shape for name, shape in shapes.items()}

    def _attention(self) -> Shapes:
        hidden, queries, keys = self.hidden, self.queries, self.keys
        shapes: Shapes = {
            "q_proj.weight": (2 * queries, hidden),  # queries and their gates
            "k_proj.weight": (keys, hidden),
            "v_proj.weight": (keys, hidden),
            "o_proj.weight": (hidden, queries),
            "q_norm.weight": (self.head_dim,),
            "k_norm.weight": (self.head_dim,),
        }
        if self.bias:
            weights = [(name, shape[0]) for name, shape in shapes.items() if name.endswith("proj.weight")]
            shapes |= {name.replace("weight", "bias"): (rows,) for name, rows in weights}
        return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def read_config(path: Path) -> dict[str, Any]:
    """The contents of the config.json `path`, of any model. Raises ConfigError naming it."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must be an object")
    return config


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config.json, of any model, is a mixture's: by the names under which vLLM looks for their number."""
    text = config.get("text_config", config)
    counts = [text.get(name) for name in EXPERT_COUNTS] if isinstance(text, Mapping) else []
    return any(isinstance(count, list) or (isinstance(count, int) and count > 0) for count in counts)


def _positive(text: Mapping[str, Any], field: str, where: str) -> int:
    value = text.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where}: {field} must be a positive whole number, not {value!r}")
    return value


def _layers(text: Mapping[str, Any], where: str) -> tuple[str, ...]:
    count = _positive(text, "num_hidden_layers", where)
    kinds = text.get("layer_types")
    if kinds is None:  # transformers' own rule where the field is absent
        every = _positive({"full_attention_interval": 4, **text}, "full_attention_interval", where)
        return tuple(GDN if (number + 1) % every else ATTENTION for number in range(count))
    if not isinstance(kinds, list) or len(kinds) != count or not all(kind in (GDN, ATTENTION) for kind in kinds):
        raise ConfigError(f"{where}: layer_types must name {count} layers, each {GDN} or {ATTENTION}")
    return tuple(kinds)
