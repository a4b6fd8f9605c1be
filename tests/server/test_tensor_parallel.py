"""A live vLLM with --tensor-parallel-size 2: each rank's part is the checkpoint's, the divided trainer's loss is the
server's own, and what the ranks write is what the server answers from."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rank_program as ranks
import torch
from patience import until
from server_options import GPU
from shard_parts import part_of, run_ranks
from test_weights_server import AGREEMENT, post

from worker.shared_weights import bind
from worker.shared_weights.attach import AttachError, attach
from worker.testing.server_process import ServerProcess
from worker.utils.shard import Shard

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(GPU, reason="a CPU's way to start two ranks"),
]


@pytest.fixture(scope="module")
def divided(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    options = ["--tensor-parallel-size", "2", "--max-model-len", "512", "--max-num-seqs", "2"]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("tp") / "run", extra=options, env=environment) as server:
        yield server


def served(server: ServerProcess) -> torch.Tensor:
    """vLLM's negative log-probability of each of ROW[1:], in nats."""
    ids = list(ranks.ROW)
    answer = post(server, {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0})
    found = answer["choices"][0]["prompt_logprobs"][1:]
    return -torch.tensor([entry[str(token)]["logprob"] for entry, token in zip(found, ids[1:], strict=True)])


def test_who_takes_weights_of_one_process_is_refused(divided: ServerProcess) -> None:
    with pytest.raises(AttachError, match="divided over 2 processes"):
        attach(divided.run_dir)


def test_the_ranks_parts_and_losses_are_the_server_s(divided: ServerProcess, tmp_path: Path) -> None:
    told: dict[str, torch.Tensor] = {}

    def ask() -> None:
        until((divided.run_dir / "before.ready").exists, "the ranks wrote their weights")
        told["before"] = served(divided)
        (divided.run_dir / "before.seen").touch()

    thread = threading.Thread(target=ask)
    thread.start()
    found: list[dict[str, Any]] = run_ranks(tmp_path, divided.run_dir, "attached")["attached"]
    thread.join()
    told["after"] = served(divided)
    config = bind.text_config(divided.model_dir)
    for rank, said in enumerate(found):
        shapes = bind.text_shapes(divided.model_dir)
        assert said["same"] == sorted(shapes), "every part is the checkpoint's"
        shards = {name: Shard.read(plain) for name, plain in said["shards"].items()}
        for name, shape in shapes.items():  # what other tests divide by is what vLLM divides by
            assert shards.get(name) == part_of(name, shape, config, rank, 2), name
        assert said["steps"] == 5
    for moment, theirs in told.items():
        assert torch.equal(found[0][moment], found[1][moment])
        assert (found[0][moment] - theirs).abs().mean() < AGREEMENT, moment
    assert told["before"].std() > 0.5  # the answers are spread: agreeing means something
    assert told["after"].mean() < told["before"].mean() - 1
