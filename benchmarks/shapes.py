"""Model directories of real shapes without weights, for `tandem serve DIR --load-format dummy`.

    python benchmarks/shapes.py 27B DIR             # Qwen3.5; 35B-A3B is its mixture of experts
    python benchmarks/shapes.py 27B DIR --files     # with random weights, as files: without --load-format dummy
    python benchmarks/shapes.py Llama-3.1-8B DIR    # others, as published

The dimensions are those of the published configurations (shapes.json: what the sizes share, and where they differ).
The tokenizer is the tiny model's, of 1,024 tokens, and has made-up words for what is left of the model's vocabulary
(248,320 in Qwen3.5): random weights say any of them. A server decodes a token that its tokenizer does not know with the
whole prompt, again and again: 0.35 ms a token after 2,000 tokens, 0.001 otherwise.

Must not know: servers, GPUs, training. Invariant: the same size gives the same directory.
"""

import json
import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "shapes.json").read_text())
MIXTURE = "35B-A3B"
SIZES = (*FACTS["sizes"], MIXTURE)
CONFIGS = Path(__file__).resolve().parent.parent / "tests" / "data" / "configs"
PUBLISHED = CONFIGS / "other"
OTHERS = ("Llama-3.1-8B", "Qwen3-8B", "gemma-3-1b", "OLMo-2-7B", "Mistral-7B-v0.3", "Qwen2.5-7B", "tiny-llama")
"""What is not a Qwen3.5."""
TINY = ("tiny", "tiny-llama")
TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu", "dtype": "bfloat16",
}  # fmt: skip


def text_facts(size: str) -> dict[str, Any]:
    """The text dimensions of `size`, as in its config.json."""
    if size in OTHERS:
        return TINY_LLAMA if size == "tiny-llama" else dict(json.loads((PUBLISHED / f"{size}.json").read_text()))
    if size == MIXTURE:
        return dict(json.loads((CONFIGS / f"qwen3_5-{size}.json").read_text()))
    return {**FACTS["common"]["text"], **FACTS["sizes"][size]["text"]}


def text_config(size: str) -> Any:
    """transformers' configuration of the text model of `size`."""
    from transformers import Qwen3_5MoeTextConfig, Qwen3_5TextConfig

    return (Qwen3_5MoeTextConfig if size == MIXTURE else Qwen3_5TextConfig)(**text_facts(size))


def write_shape(size: str, folder: Path, context: int = 32768) -> Path:
    """Write config, tokenizer, chat template and processors of `size` to the new `folder`; no weights. Returns it.

    `context` is the model's longest context, in tokens. The architecture is the multi-modal one, the only Qwen3.5
    that vLLM 0.26 serves: give the server --language-model-only. That of OTHERS is their own.
    """
    if size in OTHERS:
        return _write_other(size, folder, context)
    from transformers import GenerationConfig, Qwen3_5Config, Qwen3_5MoeConfig

    from worker.testing.tiny_model import build_tokenizer, write_processors

    tokenizer = build_tokenizer()
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    text = text_facts(size) | {"eos_token_id": end_of_text, "max_position_embeddings": context}
    vision = {**FACTS["common"]["vision"], **FACTS["sizes"].get(size, FACTS["sizes"]["2B"])["vision"]}
    special = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in special.items()}
    kind, name = (Qwen3_5MoeConfig, "Qwen3_5Moe") if size == MIXTURE else (Qwen3_5Config, "Qwen3_5")
    config = kind(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        dtype="bfloat16",
        architectures=[f"{name}ForConditionalGeneration"],
        **ids,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    GenerationConfig(eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text).save_pretrained(folder)
    _save_tokenizer(tokenizer, folder, text["vocab_size"])
    write_processors(folder)
    return folder


def _write_other(size: str, folder: Path, context: int) -> Path:
    from transformers import CONFIG_MAPPING, GenerationConfig

    from worker.testing.tiny_model import build_tokenizer

    tokenizer = build_tokenizer()
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = {"eos_token_id": end_of_text, "bos_token_id": end_of_text, "pad_token_id": end_of_text}
    facts = text_facts(size)
    config = CONFIG_MAPPING[facts["model_type"]](**facts | ids | {"max_position_embeddings": context})
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    GenerationConfig(eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text).save_pretrained(folder)
    _save_tokenizer(tokenizer, folder, config.vocab_size)
    return folder


def _save_tokenizer(tokenizer: Any, folder: Path, size: int) -> None:
    """With words that no text holds for the ids from its own to `size`."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    # The added tokens, too: those that the model does not know would come after all of its own.
    named = {token["content"]: token["id"] for token in document["added_tokens"]}
    document["model"]["vocab"] |= named | {f"\u0120word{number}": number for number in range(len(tokenizer), size)}
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


FILE_BYTES = 4 << 30
"""Of a file of weights, at least."""


def write_files(folder: Path) -> None:
    """Random weights, bf16, for the model directory `folder`, in files: what a server has lost can be restored then.

    One block of random numbers over and over: that takes no longer than the disk does. Each tensor begins elsewhere in
    it, since layers that are all alike would send everything into one direction."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    block = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    index: dict[str, str] = {}
    some: dict[str, Any] = {}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        size = shape.numel()
        begin = number * 7_919_777 % len(block)
        first = block[begin : begin + size]
        whole, rest = divmod(size - len(first), len(block))
        some[name] = torch.cat([first, *[block] * whole, block[:rest]]).view(shape)
        if name.endswith("linear_attn.norm.weight"):
            some[name] = torch.ones(shape, dtype=torch.bfloat16)  # the only norm that does not add one
        if number == len(shapes) or sum(tensor.nbytes for tensor in some.values()) >= FILE_BYTES:
            file = f"model-{number:05}.safetensors"
            index |= dict.fromkeys(some, file)
            save_file({name: tensor.contiguous() for name, tensor in some.items()}, folder / file, {"format": "pt"})
            some = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@click.command()
@click.argument("size", type=click.Choice(SIZES + OTHERS))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--files", is_flag=True, help="Random weights, too, of a Qwen3.5; 27B has 54 GB of them.")
def main(size: str, folder: Path, files: bool) -> None:
    """Write the model directory FOLDER of SIZE, without weights."""
    if files and size in OTHERS:
        sys.exit(f"error: --files is for Qwen3.5, and {size} is none")
    if folder.exists():
        sys.exit(f"error: {folder} exists already: name a new directory")
    write_shape(size, folder)
    if files:
        from worker.utils import torch_setup

        torch_setup.prepare()
        write_files(folder)
    click.echo(f"{folder}: {size}, " + ("random weights" if files else "no weights: serve it with --load-format dummy"))


if __name__ == "__main__":
    main()
