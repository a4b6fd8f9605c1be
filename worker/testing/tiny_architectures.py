"""Writes small random checkpoints of many architectures, which real vLLM serves and transformers loads.

    make_architecture(folder, "granite")        # the names: ARCHITECTURES

Two or four layers, 64 numbers a token, a vocabulary of 1,024 by the tokenizer of `tiny_model`. What tells architectures
apart is strong enough to be seen in every log-probability: scales, caps, short windows, weights five times as wide as
usual. Must not know: Redis, vLLM, the trainer. Keeps: the same seed gives the same bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from worker.testing.tiny_model import TinyError, build_tokenizer

WINDOW = 16
"""Tokens that a layer with a sliding window sees, itself included."""
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024, "initializer_range": 0.1,
    "tie_word_embeddings": False,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "num_hidden_layers": 4, "head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1, "norm_topk_prob": True,
}  # fmt: skip
ALTERNATING: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {},
    "glm4": {"tie_word_embeddings": False},
    "granite": {
        "logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5,
    },
    "gemma2": {
        **ALTERNATING, "tie_word_embeddings": True, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5,
        "query_pre_attn_scalar": 32,
    },
    "gemma3_text": {**ALTERNATING, "tie_word_embeddings": True, "query_pre_attn_scalar": 32},
    "olmo2": {},
    "olmo3": ALTERNATING,
    "smollm3": {"no_rope_layers": [1, 0], "layer_types": ["full_attention", "full_attention"]},
    "cohere": {"tie_word_embeddings": True, "logit_scale": 0.25},
    "cohere2": {**ALTERNATING, "sliding_window": 512, "tie_word_embeddings": True, "logit_scale": 0.25},
    "phi": {"num_key_value_heads": 2, "hidden_act": "gelu_new"},
    "qwen3_moe": {k: v for k, v in EXPERTS.items() if not k.startswith("shared")},
    "qwen3_5_moe_text": {**EXPERTS, **LINEAR},
    "qwen3_next": {**EXPERTS, **LINEAR},
}  # fmt: skip
"""model_type -> what its configuration has beside SIZES."""


def make_architecture(
    path: str | os.PathLike[str], model_type: str, *, seed: int = 0, changes: dict[str, Any] | None = None
) -> Path:
    """Write the model directory `path` (made if absent) and return it; changes: of the configuration. Raises
    TinyError."""
    path = Path(path)
    if model_type not in ARCHITECTURES:
        raise TinyError(f"no sizes are known for {model_type!r}: {', '.join(ARCHITECTURES)}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise TinyError(f"{path} exists and is not an empty directory: name a new one")
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    _model(_config(model_type, tokenizer, changes or {}), seed).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _config(model_type: str, tokenizer: Any, changes: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    end, pad = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = {"vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": pad, "bos_token_id": pad}
    fields = {**SIZES, **ids, **ARCHITECTURES[model_type], "dtype": "bfloat16", **changes}
    return CONFIG_MAPPING[model_type](**fields)


def _model(config: Any, seed: int) -> Any:
    """Drawn in fp32 from `seed` and rounded to bf16. What is 0 or 1 in a fresh model (norms, biases) is drawn as well,
    so that leaving it out is seen. The caller's random state is kept."""
    import torch

    from worker.utils.torch_setup import prepare

    prepare()  # transformers' models import torchvision
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith(("A_log", "dt_bias")):
                parameter += 0.1 * torch.randn_like(parameter)
        return model.to(torch.bfloat16)
