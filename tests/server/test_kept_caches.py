"""What an update does to caches, on a real server with prefix caching on: running requests keep theirs, others' are not
theirs to read. The delta net's states and the keys and values of attention lie in the same blocks.

The same for a server that recomputes: test_lease.py.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from patience import PATIENCE
from serving_parts import Background, completion, events, metric, token_ids

from worker.serving.control_client import ServerControl
from worker.shared_weights.attach import AttachedWeights, attach
from worker.testing.server_process import ServerProcess

pytestmark = pytest.mark.server

LONG = 1250
"""Tokens of a prompt: vLLM caches states of this model every few hundred, on a GPU every 400. Of a prompt that ends
with such a block it keeps the last state alone, which is of no use to the same prompt: its last token is computed."""
HITS, PREEMPTED = "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total"


def prompt(seed: int, length: int = LONG) -> list[int]:
    """A prompt of its own that no other test sends."""
    return torch.randint(20, 900, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def scores(server: ServerProcess, tokens: list[int], **more: Any) -> list[Any]:
    """The log-probabilities of what the server answers to a prompt, for each of its answers."""
    status, _, body = completion(server, 8, prompt=tokens, logprobs=2, **more)
    assert status == 200, body
    return [choice["logprobs"]["token_logprobs"] for choice in json.loads(body)["choices"]]


def hits(server: ServerProcess, tokens: list[int], **more: Any) -> tuple[int, list[Any]]:
    """(tokens of the prompt that vLLM had cached, the answers' log-probabilities)."""
    before = metric(server, HITS)
    answer = scores(server, tokens, **more)
    return int(metric(server, HITS) - before), answer


class Trainer:
    """This process as the server's trainer. Every update makes all weights a little larger."""

    def __init__(self, control: ServerControl, weights: AttachedWeights) -> None:
        self._control, self._weights = control, weights

    @property
    def version(self) -> int:
        return self._weights.header.version

    @property
    def lost(self) -> int:
        """Tokens of prompts that would have been found cached, had no update come between, as the server counts."""
        return int(self._control.state()["lost_prefix_tokens"])

    def update(self) -> int:
        """One version; its number."""
        version = self.version + 1
        self._control.pause()
        self._weights.header.begin(self._control.fence)
        for tensor in self._weights.tensors.values():
            tensor.mul_(1.02)
        self._weights.header.finish(version)
        self._control.resume(version)
        return version


@contextmanager
def training(server: ServerProcess) -> Iterator[Trainer]:
    """A trainer of `server`, whose weights and version are put back afterwards."""
    weights = attach(server.run_dir)
    before = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    lineage, version = weights.header.lineage, weights.header.version
    with ServerControl(server.run_dir, "test") as control:
        try:
            yield Trainer(control, weights)
        finally:
            control.pause()
            for name, tensor in weights.tensors.items():
                tensor.copy_(before[name])
            weights.header.adopt(lineage, version)
            control.resume(version, rebuilt=True)


@pytest.fixture
def trainer(server: ServerProcess) -> Iterator[Trainer]:
    with training(server) as one:
        yield one


@pytest.mark.parametrize("salt", [None, "alice"])
def test_a_prompt_of_before_an_update_is_answered_like_one_never_seen(
    server: ServerProcess, trainer: Trainer, salt: str | None
) -> None:
    tokens = prompt(1 if salt else 2)
    own = {"cache_salt": salt} if salt else {}
    first, old = hits(server, tokens, **own)
    again, same = hits(server, tokens, **own)
    assert first == 0 and again > LONG / 2, "prefixes are cached, or this test shows nothing"
    assert same == old
    trainer.update()
    lost = trainer.lost
    found, new = hits(server, tokens, **own)
    assert again / 2 < trainer.lost - lost < LONG, "what it would have found, but for the update"
    lost = trainer.lost
    fresh, never_seen = hits(server, tokens, cache_salt="nobody has used this")
    assert (found, fresh) == (0, 0)
    assert new == never_seen and new != old
    found, again_new = hits(server, tokens, **own)
    assert found > LONG / 2 and again_new == new, "within a version prefixes are cached as ever"
    assert trainer.lost == lost


def test_samples_of_one_request_belong_to_the_present_version(server: ServerProcess, trainer: Trainer) -> None:
    tokens = prompt(3)
    scores(server, tokens, n=3, temperature=1.0)
    assert hits(server, tokens)[0] > LONG / 2, "samples file their prompt where others find it"
    trainer.update()
    assert hits(server, tokens)[0] == 0


def test_a_users_own_salt_keeps_its_prefixes_apart(server: ServerProcess) -> None:
    tokens = prompt(4)
    hits(server, tokens, cache_salt="alice")
    assert hits(server, tokens)[0] == 0
    assert hits(server, tokens, cache_salt="bob")[0] == 0
    assert hits(server, tokens, cache_salt="alice")[0] > LONG / 2


def test_a_running_request_keeps_its_caches_and_nobody_else_gets_them(server: ServerProcess, trainer: Trainer) -> None:
    for attempt in range(20):
        first, tokens = trainer.version, prompt(500 + attempt, 600)
        preempted = metric(server, PREEMPTED)
        running = Background(server, 1300, stream=True, prompt=tokens, return_token_ids=True, temperature=0)
        assert running.started.wait(PATIENCE)
        last = trainer.update()
        status, headers, body = running.result()
        assert (status, headers["x-weight-version"]) == (200, str(first))
        if events(body)[-1] != f": weight-version {first}":
            break  # else it ended before this thread came to the update: on a busy machine
    assert events(body)[-1] == f": weight-version {first}-{last}", "the update met the request"
    assert metric(server, PREEMPTED) == preempted, "it was thrown back"
    conversation = tokens + token_ids(body)
    assert len(conversation) == 1900
    found, next_turn = hits(server, conversation)
    assert found == 0, "its later blocks come from old keys and states"
    assert next_turn == scores(server, conversation, cache_salt="never")
