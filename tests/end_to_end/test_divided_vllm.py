"""`tandem worker` beside real vLLM with --tensor-parallel-size 2, on the CPU: what is sent through Redis is learnt by
the server, which answers 503 while its weights are torn, and serves again after the next start of the worker."""

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from divided_parts import RANKS, DividedSite
from durable_parts import QUIET, transcripts
from patience import PATIENCE, until
from server_options import GPU
from transformers import AutoTokenizer

from worker.checkpoint import model_directory
from worker.checkpoint.visit import make_version, private_weights, visit
from worker.shared_weights.bind import build_model
from worker.shared_weights.divided import DividedWeights

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(GPU, reason="a CPU's way to start two ranks"),
]
AGREEMENT = 0.08
"""Nats a token, in the mean, that two computations in bf16 may differ by here."""


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Iterator[DividedSite]:
    site = DividedSite(tmp_path, tiny_model, real=True)
    yield site
    site.close()


def ask(site: DividedSite, path: str, body: dict[str, object]) -> dict[str, object]:
    url = site.server.process.url
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
        answer: dict[str, object] = json.load(reply)
    return answer


def served(site: DividedSite, ids: list[int]) -> torch.Tensor:
    """vLLM's log-probability of each of ids[1:], in nats."""
    body = {"model": site.model_name, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    found: list[dict[str, dict[str, float]]] = ask(site, "/v1/completions", body)["choices"][0]["prompt_logprobs"][1:]  # type: ignore[index]
    return torch.tensor([entry[str(token)]["logprob"] for entry, token in zip(found, ids[1:], strict=True)])


def test_twenty_transcripts_are_learnt_torn_and_mended(site: DividedSite) -> None:
    tokenizer = AutoTokenizer.from_pretrained(site.model)
    sent = transcripts("t", 20)
    rows = [tokenizer.apply_chat_template(one["messages"], tokenize=True, return_dict=False) for one in sent[:4]]
    with urllib.request.urlopen(site.server.process.url + "/v1/models", timeout=PATIENCE) as reply:
        site.model_name = json.load(reply)["data"][0]["id"]
    before = [served(site, row) for row in rows]
    site.producer.enqueue_many(sent)
    assert "the server's is within" in site.work(jobs=5), "trainer and server were compared before anything was trained"
    assert site.agree() == 4 and sorted(site.trained()) == sorted(one["id"] for one in sent)
    after = [served(site, row) for row in rows]
    for earlier, later in zip(before, after, strict=True):
        assert later.mean() > earlier.mean() + 0.5

    # The checkpoint is the whole model, and says what the server says.
    model, _ = model_directory.load(site.state / "checkpoints" / "4")
    for row, theirs in zip(rows, after, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0, :-1].float()
        ours = logits.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        assert (ours - theirs).abs().mean() < AGREEMENT

    # One process makes nearly the same weights from the same journal.
    shutil.rmtree(site.state / "checkpoints" / "4")
    whole = {name: tensor.detach().float() for name, tensor in site.weights().tensors.items()}
    with visit(site.state, site.model) as history:
        alone = private_weights(history, site.model, 4)
        make_version(history, alone, build_model(site.model, alone.tensors), tokenizer, 4)
    distance = sum(float((whole[name] - tensor.float()).square().sum()) for name, tensor in alone.tensors.items())
    size = sum(float(tensor.square().sum()) for tensor in whole.values())
    print(f"weights of {RANKS} ranks and of one process: {(distance / size) ** 0.5:.2e} of their size apart")
    assert (distance / size) ** 0.5 < 5e-3

    # Rank 1 dies in the write: 503 with the reason, on the one address; the next start mends it.
    more = site.send("u", 3)
    site.rank_killed("swept", code=1, jobs=3)
    site.is_torn()
    with pytest.raises(urllib.error.HTTPError) as refused:
        served(site, rows[0])
    assert refused.value.code == 503 and b"the weights are torn" in refused.value.read()
    site.work(*QUIET)
    assert site.agree() == 5 and set(more) <= set(site.trained())
    weights = site.weights()
    assert isinstance(weights, DividedWeights) and len({one.header.version for one in weights.ranks}) == 1
    assert torch.isfinite(served(site, rows[0])).all()
    until(lambda: site.served()["state"] == "serving", "it serves")
