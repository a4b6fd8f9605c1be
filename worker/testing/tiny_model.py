"""Writes a small random Qwen3.5 that real vLLM serves and transformers loads: for demos and tests.

Real architecture (gated delta net and full attention), the real chat template, Qwen's byte-level tokenizer with merges
learnt from a built-in text; only the sizes are small. The weights are those of a fresh transformers model, in bf16.
Must not know: Redis, vLLM, the trainer. Keeps: the same seed gives the same bytes, tokenizer included (it has no draw).

Embeddings and head are untied, as from Qwen3.5 9B up, so that both occur as parameters of their own; the delta net's
key and value heads are 64 wide, the least that vLLM's kernels take. `real_heads=True` makes all heads as wide as the
published sizes have them, three value heads to a key head as in the 27B: the kernels of a GPU are chosen by that. vLLM
0.26 serves no text-only Qwen3.5, so that `vision=True` adds a vision tower of one layer and the wrapping architecture,
Qwen3_5ForConditionalGeneration.
"""

from __future__ import annotations

import importlib.resources
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from producer.errors import TandemError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPLATES = ("nothink", "think")
VOCAB = 1024
"""Tokens in all: 256 bytes, the merges, the added tokens. A multiple of 64, so that vLLM pads nothing."""

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
NOT_SPECIAL = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""One token each, but text: decoding with skip_special_tokens keeps them. As in Qwen's tokenizers."""

HEADS = {
    "num_attention_heads": 2, "head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
REAL_HEADS = {
    "num_attention_heads": 4, "head_dim": 256, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip


class TinyError(TandemError):
    """The directory cannot be written, or an option is out of range."""


def make_tiny(
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    template: str = "nothink",
    vision: bool = False,
    tie: bool = False,
    real_heads: bool = False,
    hidden: int = 128,
    layers: int = 4,
    context: int = 4096,
) -> Path:
    """Write the model directory `path` (made if absent) and return it.

    `template` is "nothink" (thinks only if asked, as the small Qwen3.5 sizes do) or "think". `layers` counts layers in
    all; every fourth is full attention. `hidden` is a multiple of 64. Raises TinyError.
    """
    path = Path(path)
    if template not in TEMPLATES:
        raise TinyError(f"template must be one of {', '.join(TEMPLATES)}, not {template!r}")
    if hidden % 64 or hidden <= 0 or layers < 4:
        raise TinyError("hidden must be a multiple of 64, and layers at least 4, so that both kinds of attention occur")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise TinyError(f"{path} exists and is not an empty directory: name a new one")
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(template)
    config = _config(tokenizer, vision, tie, REAL_HEADS if real_heads else HEADS, hidden, layers, context)
    model = _model(config, tokenizer.eos_token_id, seed)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    if vision:
        write_processors(path)
    return path


def build_tokenizer(template: str = "nothink") -> PreTrainedTokenizerBase:
    """Qwen3.5's tokenizer with a vocabulary of VOCAB tokens, and its chat template."""
    from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

    vocab, merges = _learn_merges(VOCAB - len(SPECIAL) - len(NOT_SPECIAL))
    tokenizer = Qwen3_5Tokenizer(vocab=vocab, merges=merges, model_max_length=1 << 20)  # eos is <|endoftext|> so far
    tokenizer.add_tokens([_added(t, special=True) for t in SPECIAL], special_tokens=True)
    tokenizer.add_tokens([_added(t, special=False) for t in NOT_SPECIAL])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = _data(f"qwen3_5_{template}.jinja")
    if len(tokenizer) != VOCAB:
        raise TinyError(f"the built-in text gave a vocabulary of {len(tokenizer)} tokens instead of {VOCAB}")
    return tokenizer


def _learn_merges(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair merges of the built-in text, split into words as Qwen3.5 does: (vocabulary of `size`, merges)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = Qwen3_5Tokenizer(vocab={}, merges=[]).backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(_data("tiny_text.txt").splitlines(keepends=True), trainer)
    model = json.loads(learner.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _added(text: str, special: bool) -> AddedToken:
    from tokenizers import AddedToken

    return AddedToken(text, special=special, normalized=False)


def _config(
    tokenizer: PreTrainedTokenizerBase,
    vision: bool,
    tie: bool,
    heads: dict[str, int],
    hidden: int,
    layers: int,
    context: int,
) -> Any:
    """The text config, or the one that wraps it beside a vision tower. Fields as in Qwen3.5's own config.json."""
    from transformers import Qwen3_5Config, Qwen3_5TextConfig

    text = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        **heads,
        "max_position_embeddings": context,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": _sections(heads["head_dim"] // 4),
        },
        "full_attention_interval": 4,
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "tie_word_embeddings": tie,
        "dtype": "bfloat16",
    }
    if not vision:
        return Qwen3_5TextConfig(**text)
    tower = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": hidden,
        "deepstack_visual_indexes": [],
    }
    ids = {
        f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for key, token in {
            "image": "image_pad",
            "video": "video_pad",
            "vision_start": "vision_start",
            "vision_end": "vision_end",
        }.items()
    }
    return Qwen3_5Config(text_config=text, vision_config=tower, tie_word_embeddings=tie, dtype="bfloat16", **ids)


def _sections(rotated: int) -> list[int]:
    """How half of the `rotated` elements of a head are shared among time, height and width: [11, 11, 10] for 64."""
    half = rotated // 2
    return [(half + 2) // 3, (half + 1) // 3, half // 3]


def _model(config: Any, end_of_turn: int, seed: int) -> PreTrainedModel:
    """A fresh model of `config`, drawn in fp32 from `seed` and rounded to bf16. The caller's random state is kept."""
    import torch

    from worker.utils.torch_setup import prepare

    prepare()  # transformers' models import torchvision
    from transformers import GenerationConfig, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration

    kind = Qwen3_5ForConditionalGeneration if config.model_type == "qwen3_5" else Qwen3_5ForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).to(torch.bfloat16)
    end_of_text = config.get_text_config().eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text)
    return model


def write_processors(path: Path) -> None:
    """What vLLM and transformers read beside a Qwen3.5 with a vision tower; values as Qwen3.5 ships them."""
    common = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    image = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    video = {"size": {"longest_edge": 25165824, "shortest_edge": 4096}, "video_processor_type": "Qwen3VLVideoProcessor"}
    (path / "preprocessor_config.json").write_text(json.dumps(common | image, indent=2) + "\n")
    (path / "video_preprocessor_config.json").write_text(json.dumps(common | video, indent=2) + "\n")


def _data(name: str) -> str:
    return importlib.resources.files("worker.testing").joinpath("templates", name).read_text(encoding="utf-8")
