"""Other models than Qwen3.5 on a GPU, of real head sizes and few layers: liger's kernels and varlen FlashAttention
against transformers' own code in fp32 on a CPU; packed against separate; streaming against burst. Needs a GPU and
liger."""

import copy
from typing import Any

import pytest
import torch
from test_packing import example
from transformers import AutoModelForCausalLM

from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example
from worker.memory.plan import Way
from worker.model import fuse
from worker.trainer.factory import make_trainer
from worker.trainer.trainer import Trainer
from worker.utils import torch_setup

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

VOCABULARY = 2048
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
WINDOW: dict[str, Any] = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 64},
    "gemma3_text": WINDOW | {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 1},
    "olmo2": {"num_key_value_heads": 8, "head_dim": 64},
    "phi3": {"head_dim": 64},
    "glm4": {},
    "granite": {
        "head_dim": 64,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.125,
    },
}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    },
}
"""Not compared with fp32: there, a token may choose another expert."""


class Tokenizer:
    """All that a trainer asks of one."""

    pad_token_id = 0


def reference(name: str) -> Any:
    """fp32 on the CPU, its weights bf16 numbers and not those of a fresh model, so that a leak or a window is seen."""
    torch_setup.prepare()
    from transformers import CONFIG_MAPPING

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[name](**SIZES | (MODELS | EXPERTS)[name]), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = 0.05 * torch.randn(parameter.shape)
            parameter.copy_((drawn if parameter.dim() == 2 else parameter + drawn).to(torch.bfloat16))
    model.set_attn_implementation("eager")
    return model


def on_gpu(reference: Any, *, way: Way = "burst", kept: int = 1) -> Trainer:
    config = copy.deepcopy(reference.config)  # which says what attention a model has
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(reference.state_dict())
    model.cuda().train()
    fuse(model, kept=lambda tokens: kept)
    h = Hyperparameters(lr=1e-4, max_length=1024)
    return make_trainer(model, model.named_parameters(), Tokenizer(), h, state=None, way=way, budget=1024)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [example(f"e{i}", some, 1.0, VOCABULARY) for i, some in enumerate([[130, 64], [300], [3], [65, 200]])]


@pytest.mark.parametrize("name", MODELS)
def test_packed_on_a_gpu_is_transformers_one_by_one(name: str, examples: list[Example]) -> None:
    theirs = reference(name)
    trainer = on_gpu(theirs)
    found = trainer.begin(examples)
    total = sum(one.trained_tokens for one in examples)
    nll = {}
    for one in examples:
        summed = torch.zeros(())
        for sequence in one.sequences:
            ids, mask = torch.tensor([sequence.ids]), torch.tensor(sequence.mask)[1:]
            log_p = theirs(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)  # [T - 1, V]
            summed = summed - log_p.gather(1, ids[0, 1:, None])[mask].sum()
        (summed / total).backward()
        nll[one.id] = float(summed) / one.trained_tokens
    assert found.nll == pytest.approx(nll, rel=1e-2)
    errors = {}
    for part, parameter in theirs.named_parameters():
        ours = dict(trainer.model.named_parameters())[part].grad.float().cpu()
        errors[part] = float((ours - parameter.grad).norm() / (parameter.grad.norm() + 1e-9))
    worst = sorted(errors.items(), key=lambda item: -item[1])[:5]
    print(name, worst)
    assert worst[0][1] < 0.1, worst  # bf16 throughout; a leak gives errors of order 1


@pytest.mark.parametrize("name", MODELS | EXPERTS)
def test_packed_equals_separate_and_streaming_is_burst(name: str, examples: list[Example]) -> None:
    theirs = reference(name)
    trainer = on_gpu(theirs)
    together = trainer.score(examples)
    assert together == pytest.approx({one.id: trainer.score([one])[one.id] for one in examples}, rel=2e-3)
    burst, streaming = trainer, on_gpu(theirs, way="streaming")
    assert streaming.begin(examples).nll == pytest.approx(burst.begin(examples).nll, rel=1e-4)
    measured, swept = streaming.apply(), burst.apply()
    streaming.optimizer.check()
    assert measured["update_rms"] == pytest.approx(swept["update_rms"], rel=1e-2)
