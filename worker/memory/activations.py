"""What one layer's forward pass keeps for its backward pass, and what the backward pass adds: bytes a token, bf16.

Of a Qwen3.5 counted from its sizes for fused norms and SwiGLU, FlashAttention and fla's delta net; without these
kernels it is a multiple. A mixture's experts are counted for transformers' grouped products, as if every token took as
many as it may. Of any other model a trace has counted it (`worker.memory.traced_sizes`). Must not know: the optimizer.
All of it is proportional to the tokens.
"""

from worker.memory.model_config import ATTENTION, TextConfig
from worker.memory.traced_sizes import Sizes, TracedSizes

CHUNK = 64
"""Tokens of one chunk of fla's delta net: its backward pass has one state a chunk."""


def saved(config: Sizes, kind: str) -> tuple[int, int]:
    """What forward keeps for backward: (first half: norm and mixer, second half: norm and MLP), inputs included."""
    if isinstance(config, TracedSizes):
        return config.kinds[kind].saved, 0
    hidden = 2 * config.hidden
    mixer = _attention_saved(config) if kind == ATTENTION else _gdn_saved(config)
    return 2 * hidden + mixer, 2 * hidden + _mlp_saved(config)


def extra(config: Sizes, kind: str) -> int:
    """What backward has beside all that is saved, at its largest; the MLP's part is freed before the mixer's turn."""
    if isinstance(config, TracedSizes):
        return config.kinds[kind].extra
    mixer = _attention_extra(config) if kind == ATTENTION else _gdn_extra(config)
    streams = 6 * config.hidden  # the gradients of the residual stream and of the norm's output, twice
    return streams + max(_mlp_extra(config), mixer - saved(config, kind)[1])


def factors(config: Sizes, kind: str) -> int:
    """What a layer's matrices leave in place of their gradients: the inputs of its linear layers, which the mixer's
    projections share, and so the MLP's; and the gradients of their outputs. Stacks of experts leave none."""
    if isinstance(config, TracedSizes):
        return config.kinds[kind].factors
    hidden = config.hidden
    mlp = hidden + config.intermediate + 2 * config.intermediate + hidden
    if kind == ATTENTION:
        return 2 * (mlp + hidden + config.queries + 2 * config.queries + 2 * config.keys + hidden)
    values, heads = config.linear_values, config.linear_value_heads
    return 2 * (mlp + hidden + values + config.conv + values + 2 * heads + hidden)


def _mlp_saved(config: TextConfig) -> int:
    """Gate, up and their product. Of a mixture also, for each expert that a token takes, its input, gate and up, the
    gate's SiLU, the product, and the output before it is weighed; the router's numbers; the shared expert's output
    before and after its gate, whose SwiGLU is not fused."""
    plain, experts = 6 * config.intermediate, config.experts
    if experts is None:
        return plain
    taken = experts.taken * (4 * config.hidden + 8 * experts.intermediate + 32)
    return plain + taken + 10 * experts.count + 2 * config.intermediate + 4 * config.hidden


def _mlp_extra(config: TextConfig) -> int:
    """Their gradients; of what tokens take of experts, in the order of tokens and in that of experts."""
    plain, experts = 6 * config.intermediate, config.experts
    if experts is None:
        return plain
    return plain + experts.taken * (8 * config.hidden + 8 * experts.intermediate) + 8 * experts.count


def _gdn_saved(config: TextConfig) -> int:
    """Convolution's input and output; q and k normed, z, the output, and that normed and gated; per value head a row
    of the chunk's inverse (bf16), and decay and beta."""
    values = config.linear_values
    sizes = 2 * (2 * config.conv + 2 * config.linear_keys + 3 * values)
    return sizes + config.linear_value_heads * (2 * CHUNK + 16)


def _gdn_extra(config: TextConfig) -> int:
    """w, u, new values and the gradients of all these, those of q and k by value head; states and their gradients, one
    a chunk; the gradient of the inverse in fp32 and bf16; the gradients around the convolution."""
    heads, values = config.linear_value_heads, config.linear_values
    spread = heads * config.linear_key_dim
    states = 2 * 2 * spread * config.linear_value_dim // CHUNK
    return 2 * (7 * values + 6 * spread + 2 * config.conv) + states + heads * 8 * CHUNK


def _attention_saved(config: TextConfig) -> int:
    """q with its gate, k, v; q and k normed, then rotated; the output, the gate's sigmoid and their product."""
    return 2 * (7 * config.queries + 4 * config.keys) + 4 * config.heads


def _attention_extra(config: TextConfig) -> int:
    """The gradient of q in fp32 and bf16, of k and v spread over the query heads, of output, gate, norms, rotation."""
    return 4 * config.queries + 2 * (9 * config.queries + 6 * config.keys)
