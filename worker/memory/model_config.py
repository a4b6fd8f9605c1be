"""A Qwen3.5 model's sizes from its config.json, and from them the shape of every parameter that is trained.

Must not know: torch. `tandem serve` reads this before torch may be imported.
Invariants: names and shapes are those of transformers' Qwen3_5ForCausalLM; whatever is missing, of another type or of
another model is refused by name.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from producer.errors import TandemError

MODEL_TYPES = ("qwen3_5", "qwen3_5_text")
GDN, ATTENTION = "linear_attention", "full_attention"
Shapes = dict[str, tuple[int, ...]]

_SIZES = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
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
    """A config.json that cannot be read, or is not a dense Qwen3.5's."""


class OtherModelError(ConfigError):
    """It is of another model than Qwen3.5."""


@dataclass(frozen=True)
class TextConfig:
    """The text model's sizes; `layers` names each layer's kind, GDN or ATTENTION."""

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

    @staticmethod
    def of(config: Mapping[str, Any], where: str = "config.json") -> "TextConfig":
        """From the contents of a config.json, with or without a vision tower. Raises ConfigError naming the field."""
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise OtherModelError(
                f"{where}: model_type is {model_type!r}, and only Qwen3.5 ({MODEL_TYPES[0]}) is known"
            )
        text = config.get("text_config", config)
        if not isinstance(text, Mapping):
            raise ConfigError(f"{where}: text_config must be an object")
        sizes = {name: _positive(text, field, where) for name, field in _SIZES.items()}
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
        bias = bool(text.get("attention_bias", False))
        return TextConfig(**sizes, layers=_layers(text, where), tied=bool(tied), bias=bias)

    @staticmethod
    def read(path: Path) -> "TextConfig":
        """From the file `path`. Raises ConfigError naming it."""
        try:
            config = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path}: must be an object")
        return TextConfig.of(config, str(path))

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
        return mixer | {
            "mlp.gate_proj.weight": (wide, hidden),
            "mlp.up_proj.weight": (wide, hidden),
            "mlp.down_proj.weight": (hidden, wide),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }

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
