"""`tandem worker` beside a real vLLM that divides its weights over two GPUs: what is sent is learnt in both ways, and a
rank that is killed is mended. Needs two GPUs, fla, liger, vLLM and Redis."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from durable_parts import QUIET, transcripts
from gpu_site import GpuSite
from patience import PATIENCE, until
from transformers import AutoTokenizer

from worker.shared_weights.divided import DividedWeights
from worker.testing.tiny_model import make_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels of the published sizes: heads as wide, three value heads to a key head; one key head, on both
    ranks."""
    return make_tiny(
        tmp_path_factory.mktemp("model") / "tiny", template="think", vision=True, real_heads=True, hidden=512, layers=8
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[GpuSite]:
    site = GpuSite(tmp_path_factory.mktemp("site"), model, real=True)
    with urllib.request.urlopen(site.server.url + "/v1/models", timeout=PATIENCE) as reply:
        site.model_name = json.load(reply)["data"][0]["id"]
    yield site
    site.close()


def served(site: GpuSite, ids: list[int]) -> float:
    """vLLM's mean log-probability of ids[1:], in nats."""
    body = {"model": site.model_name, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    request = urllib.request.Request(
        site.server.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
        found = json.load(reply)["choices"][0]["prompt_logprobs"][1:]
    said = [entry[str(token)]["logprob"] for entry, token in zip(found, ids[1:], strict=True)]
    return sum(said) / len(said)


def replicated_are_equal(site: GpuSite) -> None:
    """What both ranks hold in full has the same bits on both."""
    weights = site.weights()
    assert isinstance(weights, DividedWeights)
    assert len({one.header.version for one in weights.ranks}) == 1
    for name, tensor in weights.ranks[0].tensors.items():
        if name not in weights.ranks[0].shards:
            assert torch.equal(tensor.cpu(), weights.ranks[1].tensors[name].cpu()), name


@pytest.mark.parametrize("way", ["streaming", "burst"])
def test_what_is_sent_is_learnt(site: GpuSite, way: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(site.model)
    sent = transcripts(way, 12)
    rows = [tokenizer.apply_chat_template(one["messages"], tokenize=True, return_dict=False) for one in sent[:3]]
    before, version = [served(site, row) for row in rows], site.producer.version()
    site.producer.enqueue_many(sent)
    said = site.work("--apply", way)
    assert "of 2 trains its part" in said and "the server's is within" in said, said
    assert site.agree() == version + 3
    manifests = [site.manifest(number) for number in range(version + 1, version + 4)]
    assert all(one["ranks"] == "2" and one["way"] == way for one in manifests), manifests
    after = [served(site, row) for row in rows]
    print(way, "log-probabilities:", before, after)
    assert all(later > earlier for earlier, later in zip(before, after, strict=True))
    replicated_are_equal(site)


@pytest.mark.parametrize("way", ["burst", "streaming"])
def test_a_rank_that_is_killed_in_the_write_is_mended_by_the_next_start(site: GpuSite, way: str) -> None:
    version = site.producer.version()
    sent = site.send(f"torn-{way}", 3)
    said = site.rank_killed("swept", "--apply", way, "--max-tokens", "512", code=1, jobs=3)
    assert "rank 1 (process" in said and "was killed by signal 9; the weights are torn" in said, said
    site.is_torn()
    with pytest.raises(urllib.error.HTTPError) as refused:
        served(site, [1, 2, 3])
    assert refused.value.code == 503 and b"the weights are torn" in refused.value.read()
    site.work(*QUIET, "--apply", way)
    assert site.agree() == version + 1 and set(sent) <= set(site.trained())
    assert served(site, [1, 2, 3]) < 0
    replicated_are_equal(site)


def test_a_rank_that_is_killed_before_the_write_is_started_again(site: GpuSite) -> None:
    version = site.producer.version()
    sent = site.send("again", 2)
    said = site.rank_killed("backward", "--apply", "burst", "--max-tokens", "512", jobs=2)
    assert "every rank but 0 is started again" in said, said
    assert site.agree() == version + 1 and set(sent) <= set(site.trained())
    until(lambda: site.served()["state"] == "serving", "it serves")
