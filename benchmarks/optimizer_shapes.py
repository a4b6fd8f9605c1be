"""The shapes of a Qwen3.5's text parameters, for the optimizer's benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """The text dimensions of a Qwen3.5 config.json."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    linear_value_heads: int
    tied: bool
    head_dim: int = 256
    linear_key: int = 16 * 128
    linear_head_dim: int = 128
    vocab: int = 248320


MODELS = {
    "0.8B": Model(1024, 3584, 24, 8, 2, 16, True),
    "4B": Model(2560, 9216, 32, 16, 4, 32, True),
    "27B": Model(5120, 17408, 64, 24, 4, 48, False),
}


def layer_shapes(model: Model, layer: int) -> list[tuple[int, ...]]:
    """A decoder layer's parameters: every fourth has full attention, the others a gated delta net."""
    hidden, value = model.hidden, model.linear_value_heads * model.linear_head_dim
    shapes: list[tuple[int, ...]] = [(hidden,), (hidden,)]
    shapes += [(model.intermediate, hidden), (model.intermediate, hidden), (hidden, model.intermediate)]
    if layer % 4 == 3:
        query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
        return [*shapes, (2 * query, hidden), (key, hidden), (key, hidden), (hidden, query), *[(model.head_dim,)] * 2]
    heads = model.linear_value_heads
    mixed = 2 * model.linear_key + value
    shapes += [(mixed, hidden), (value, hidden), (heads, hidden), (heads, hidden), (hidden, value)]
    return [*shapes, (mixed, 1, 4), (heads,), (heads,), (model.linear_head_dim,)]


def model_shapes(name: str) -> list[tuple[int, ...]]:
    """All text parameters of a model; "27B layers" is 16 of its 64 layers, without embeddings."""
    model = MODELS[name.split()[0]]
    if name.endswith("layers"):
        return [shape for layer in range(16) for shape in layer_shapes(model, layer)]
    tables = [(model.vocab, model.hidden)] * (1 if model.tied else 2)
    return [*tables, *(s for layer in range(model.layers) for s in layer_shapes(model, layer)), (model.hidden,)]
