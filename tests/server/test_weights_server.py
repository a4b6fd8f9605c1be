"""The served weights are the trainer's weights: on a live vLLM, asked over HTTP.

The tiny model's fresh weights give nearly uniform answers, with which even a wrong mapping agrees; so all weights are
first re-initialised, through the trainer's views, to a spread at which every one of them matters, and put back after.
"""

import json
import sys
import threading
import urllib.request
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from server_options import GPU
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from agreement import distances

from worker.data.examples import Example, TokenSequence
from worker.shared_weights import bind
from worker.shared_weights.attach import AttachedWeights, attach, read_header
from worker.shared_weights.weights_client import ask

pytestmark = pytest.mark.server

IDS = [i * 37 % 1000 for i in range(1, 41)]
SALT = count()
AGREEMENT = 0.08
"""Nats, mean over the tokens: vLLM's and transformers' kernels differ by .033 here, the mildest swap by .18."""


def post(server: Any, body: dict[str, Any]) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.url}/v1/models", timeout=PATIENCE) as reply:
        model = json.load(reply)["data"][0]["id"]
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps({"model": model} | body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


def served(server: Any) -> torch.Tensor:
    """vLLM's log-probability of each of IDS[1:], in nats, fp32 [39]."""
    answer = post(server, {"prompt": IDS, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0})
    found = answer["choices"][0]["prompt_logprobs"][1:]
    return torch.tensor([entry[str(token)]["logprob"] for entry, token in zip(found, IDS[1:], strict=True)])


def decoded(server: Any, tokens: int) -> tuple[list[int], torch.Tensor]:
    """`tokens` tokens that vLLM generates after IDS, one a step, and its log-probability of each, fp32 [tokens]."""
    body = {"prompt": IDS, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    body |= {"return_token_ids": True, "cache_salt": str(next(SALT))}  # nothing cached of earlier weights
    choice = post(server, body)["choices"][0]
    return choice["token_ids"], torch.tensor(choice["logprobs"]["token_logprobs"])


@torch.no_grad()
def computed(model: torch.nn.Module, ids: list[int] = IDS) -> torch.Tensor:
    """transformers' `model`'s log-probability of each of ids[1:], fp32 on the host."""
    device = next(model.parameters()).device
    logprobs = model(torch.tensor([ids], device=device)).logits.float().log_softmax(-1)[0].cpu()  # [T, vocabulary]
    return logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def spread_value(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """New values of `tensor`, of a size at which they sway the answers."""
    if name.endswith("A_log"):
        return (torch.rand(tensor.shape, generator=generator) * 15 + 1).log()
    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.3 * noise
    if tensor.dim() == 1:
        return noise if name.endswith("dt_bias") else 0.3 * noise
    if name.endswith("embed_tokens.weight") or "conv1d" in name:
        return noise / 2 if "conv1d" in name else noise
    return noise / tensor.shape[1] ** 0.5 * (2 if name.startswith("lm_head") else 1)


@pytest.fixture(scope="module")
def weights(server: Any) -> Iterator[AttachedWeights]:
    """The server's weights, re-initialised; as they were again afterwards."""
    attached = attach(server.run_dir)
    kept = {name: tensor.clone() for name, tensor in attached.named_tensors()}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in attached.named_tensors():
        tensor.copy_(spread_value(name, tensor, generator))  # drawn on the host: the same values everywhere
    yield attached
    for name, tensor in attached.named_tensors():
        tensor.copy_(kept[name])


def test_transformers_on_the_views_agrees_with_vllm(server: Any, weights: AttachedWeights) -> None:
    ours, theirs = computed(weights.build_model()), served(server)
    assert theirs.std() > 1  # the answers are spread: agreeing means something
    assert (ours - theirs).abs().mean() < AGREEMENT


def test_a_swapped_slice_disagrees(server: Any, weights: AttachedWeights) -> None:
    """Of each pair that fits in the other's place, the wrong way round; the check above fails for every one."""
    theirs = served(server)
    pairs = [("gate_proj", "up_proj"), ("k_proj", "v_proj"), ("in_proj_b", "in_proj_a")]
    swapped = [(n, n.replace(one, other)) for one, other in pairs for n in weights.tensors if one in n]
    assert len(swapped) >= 8
    for one, other in [*swapped, ("lm_head.weight", "model.embed_tokens.weight")]:
        tensors = weights.tensors | {one: weights.tensors[other], other: weights.tensors[one]}
        difference = (computed(bind.build_model(weights.model_path, tensors)) - theirs).abs().mean()
        assert difference > AGREEMENT, one


def test_trainer_and_server_are_as_far_from_fp32_as_bf16_takes_them(server: Any, weights: AttachedWeights) -> None:
    """The trainer with its own kernels, as it trains: the one before has transformers' as they come."""
    example = Example("ids", (TokenSequence(tuple(IDS), (False,) + (True,) * (len(IDS) - 1)),), 1.0, {})
    found = distances(weights, AutoTokenizer.from_pretrained(weights.model_path), [example], [served(server)])
    print(found)
    assert all(found.checks().values()), found
    assert found.trainer.mean > 0, "fp32 is another computation"


def test_every_parameter_changes_the_answers_and_back(server: Any, weights: AttachedWeights) -> None:
    """Written through the transformers model's own parameter, seen in vLLM's answers; restored, they are restored.

    On a GPU both ways of vLLM's are asked: a prompt goes through compiled code, each token after it through a whole
    CUDA graph, and either could hold a copy. What is decoded must fit the parameter's new value better than the old.
    """
    model = weights.build_model()
    before = served(server)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        noise = torch.randn(parameter.shape, generator=generator).to(kept.device) * kept.float().std() / 2
        with torch.no_grad():
            parameter.copy_(kept.roll(1, 0) + noise)
            changed = served(server)
            if GPU:
                tokens, theirs = decoded(server, 24)
                new = computed(model, IDS + tokens)[-len(tokens) :]
            parameter.copy_(kept)
        assert (changed - before).abs().mean() > 0.01, name
        assert torch.equal(served(server), before), name
        if GPU:
            old = computed(model, IDS + tokens)[-len(tokens) :]
            assert (theirs - new).abs().mean() < (theirs - old).abs().mean(), name


@pytest.mark.skipif(GPU, reason="a GPU's memory is in no memory map: test_weights_cuda.py")
def test_there_is_one_copy(server: Any, weights: AttachedWeights) -> None:
    """Server and trainer map the same pages: their shares of them (PSS) add up to the file once, not twice."""
    description, pid = ask(server.run_dir, "describe")
    size, inode = description["memory"]["bytes"], Path(description["memory"]["path"]).stat().st_ino
    assert sum(tensor.nbytes for tensor in weights.tensors.values()) <= size
    assert all(bool(tensor.isfinite().all()) for tensor in weights.tensors.values())  # touches every page here
    theirs, ours = mapped(pid, inode), mapped("self", inode)
    shared = sum(tensor.nbytes for tensor in weights.tensors.values())
    assert theirs["Rss"] >= 0.95 * shared and ours["Rss"] >= 0.95 * shared
    assert theirs["Pss"] + ours["Pss"] <= 1.01 * size


def mapped(pid: int | str, inode: int) -> dict[str, int]:
    """Bytes that process `pid` has mapped of the file `inode`: {"Rss": resident, "Pss": its share of them}."""
    total = {"Rss": 0, "Pss": 0}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        field, *values = line.split()
        if not field.endswith(":"):
            inside = values[3] == str(inode)
        elif inside and field[:-1] in total:
            total[field[:-1]] += int(values[0]) * 1024
    return total


def test_the_header_answers_while_the_engine_generates(server: Any) -> None:
    """Asked again and again: on a busy machine a whole answer may pass before the first question is put."""
    body = {"prompt": IDS, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
    answers = 0
    for _ in range(20):
        request = threading.Thread(target=post, args=(server, body))
        request.start()
        while request.is_alive():
            assert read_header(server.run_dir)["state"] == "CLEAN"
            answers += request.is_alive()
            request.join(0.05)
        if answers:
            return
    pytest.fail("no header was read while one of 20 answers was made")


def test_a_description_names_the_server(server: Any, weights: AttachedWeights) -> None:
    info = weights.server_info
    assert Path(info["model"]).resolve() == Path(server.model_dir).resolve()
    assert info["dtype"] == "bfloat16" and info["max_model_len"] > 0 and info["versions"]["vllm"]
