"""How many floating point operations training a model takes, by its dimensions, and how fast the chip multiplies.

Of a Qwen3.5, its mixture of experts included, or of a dense model with a gated MLP and full attention in every layer; a
window is not looked at.

Model operations ("MFU") count what the mathematics needs: forward once, backward twice that. What is computed a second
time to save memory counts apart. Per step over sequences of lengths l, with T = sum l tokens:

    matrices      6 N T            N: weights of all linear layers but the head; of experts those a token meets
    head          6 V H t          t: trained tokens
    attention     6 F h d sum l^2  F full attention layers, h heads of d; QK^T and AV: 2 l^2 h d each, causality halves
    delta rule    18 G v dk dv T   G layers, v value heads: k^T S, the outer product and q^T S are 2 dk dv each
    recompute     a forward pass of the layers: a third of all above but the head's

Embedding look-ups, norms, convolutions and activations are left out. Must not know: kernels.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


def layer_weights(facts: dict[str, Any]) -> int:
    """Weights that a token is multiplied with between embedding and head; `facts` as shapes.text_facts gives them."""
    hidden, layers, head = facts["hidden_size"], facts["num_hidden_layers"], head_size(facts)
    queries, keys = facts["num_attention_heads"] * head, facts["num_key_value_heads"] * head
    if _full_layers(facts) == layers:
        return layers * hidden * (3 * facts["intermediate_size"] + 2 * queries + 2 * keys)
    full = _full_layers(facts)
    linear_keys = facts["linear_num_key_heads"] * facts["linear_key_head_dim"]
    linear_values = facts["linear_num_value_heads"] * facts["linear_value_head_dim"]
    mlp = _experts(facts) if "num_experts" in facts else 3 * hidden * facts["intermediate_size"]
    attention = hidden * (2 * queries + 2 * keys + queries)  # queries and their gates, keys, values, output
    mixed = 2 * linear_keys + linear_values
    delta = hidden * (mixed + 2 * linear_values + 2 * facts["linear_num_value_heads"])
    return layers * mlp + full * attention + (layers - full) * delta


def _full_layers(facts: dict[str, Any]) -> int:
    """Layers of full attention."""
    if "layer_types" in facts:
        return sum(kind != "linear_attention" for kind in facts["layer_types"])
    return int(facts["num_hidden_layers"] // facts.get("full_attention_interval", 1))


def _experts(facts: dict[str, Any]) -> int:
    """Of one layer: the experts a token is sent to, the shared one with its gate, the router."""
    met = facts["num_experts_per_tok"] * facts["moe_intermediate_size"] + facts["shared_expert_intermediate_size"]
    return int(facts["hidden_size"] * (3 * met + facts["num_experts"] + 1))


def head_size(facts: dict[str, Any]) -> int:
    """Numbers of an attention head."""
    return int(facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"])


@dataclass(frozen=True)
class Flops:
    """Of one step. model: forward and backward. recompute: what full checkpointing computes again."""

    model: float
    recompute: float


def step_flops(facts: dict[str, Any], lengths: Sequence[int]) -> Flops:
    """For sequences of `lengths` tokens, every token but the first of each trained."""
    layers = facts["num_hidden_layers"]
    full = _full_layers(facts)
    tokens, trained = sum(lengths), sum(length - 1 for length in lengths)
    heads = facts["num_attention_heads"] * head_size(facts)
    body = 6 * layer_weights(facts) * tokens
    body += 6 * full * heads * sum(length**2 for length in lengths)
    if full < layers:
        head_sizes = facts["linear_key_head_dim"] * facts["linear_value_head_dim"]
        body += 18 * (layers - full) * facts["linear_num_value_heads"] * head_sizes * tokens
    return Flops(model=body + 6 * facts["vocab_size"] * facts["hidden_size"] * trained, recompute=body / 3)


def matmul_rate(device: torch.device, size: int | None = None, rounds: int = 20) -> float:
    """FLOP/s of bf16 products of square matrices, the median of `rounds` after half a second of them."""
    size = size or (8192 if device.type == "cuda" else 512)
    one, other = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(one)
    warm = time.perf_counter()
    while time.perf_counter() - warm < 0.5:
        torch.matmul(one, other, out=out)
        wait(device)
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(4):
            torch.matmul(one, other, out=out)
        wait(device)
        times.append((time.perf_counter() - started) / 4)
    return 2 * size**3 / statistics.median(times)


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
