"""The gated delta net of Qwen3.5 on fla's kernels: convolution, gates, delta rule, gated norm, on packed sequences.

Stands in for `Qwen3_5GatedDeltaNet.forward` (transformers 5.17 and 5.19) in training: no cache, no masks. Against
transformers' own code it leaves out the repetition of query and key heads (fla reads each for its group of value heads)
and every elementwise pass that a kernel can do on the way. Checked on fla 0.6.0.
Invariant: nothing crosses from one sequence of the row to the next, neither through the convolution nor the state.
"""

from typing import Any

from torch import Tensor

from worker.model.inputs import Packing


def forward(self: Any, hidden_states: Tensor, *, packing: Packing, **_: Any) -> Tensor:
    """hidden_states: bf16 [1, T, H] -> [1, T, H]. Bound to the modules as their `forward`."""
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.modules.norm.fused_norm_gate import rms_norm_gated
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    tokens = hidden_states.shape[1]
    mixed, _final = causal_conv1d(
        self.in_proj_qkv(hidden_states),  # [1, T, keys + keys + values]
        self.conv1d.weight.squeeze(1),
        self.conv1d.bias,
        activation=self.activation,
        cu_seqlens=packing.starts,
        chunk_indices=packing.chunks,
    )
    query, key, value = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
    out, _state = chunk_gated_delta_rule(
        query.unflatten(-1, (self.num_k_heads, self.head_k_dim)),
        key.unflatten(-1, (self.num_k_heads, self.head_k_dim)),
        value.unflatten(-1, (self.num_v_heads, self.head_v_dim)),
        g=self.in_proj_a(hidden_states),  # [1, T, value heads], as the next
        beta=self.in_proj_b(hidden_states),
        A_log=self.A_log,
        dt_bias=self.dt_bias,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=packing.starts,
        chunk_indices=packing.chunks,
    )  # [1, T, value heads, value size]
    gate = self.in_proj_z(hidden_states).view(-1, self.head_v_dim)
    normed = rms_norm_gated(
        out.reshape(-1, self.head_v_dim),
        gate,
        self.norm.weight,
        None,
        activation=self.activation,
        eps=self.norm.variance_epsilon,
    )
    return self.out_proj(normed.view(1, tokens, -1))  # type: ignore[no-any-return]
