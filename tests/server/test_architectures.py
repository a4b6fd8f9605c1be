"""Architectures on a live vLLM: served, bound, agreeing, learning, and a checkpoint that others load.

One start of vLLM for each, and one more for its checkpoint: `-m slow`. In the default run Granite alone, without the
second start; loss and gradients of all of them: tests/unit/trainer/test_proof.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from server_options import GPU
from test_weights_server import IDS, served
from transformers import AutoModelForCausalLM

from worker.checkpoint.checkpoint_writer import Written
from worker.cli.train import train_attached
from worker.config.hyperparameters import Hyperparameters
from worker.orchestrator.session import Session, open_session
from worker.testing.server_process import ServerProcess
from worker.testing.tiny_architectures import ARCHITECTURES
from worker.trainer.proof import own_loss

pytestmark = [pytest.mark.server, pytest.mark.skipif(GPU, reason="a GPU trains Qwen3.5 alone")]

H = Hyperparameters(lr=1e-3, max_length=256)
OPTIONS = ["--max-model-len", "512", "--max-num-seqs", "4"]
REFUSED = {"phi"}
"""vLLM's Transformers backend computes with the bias of the head while it loads: a true refusal."""
LINEAR = {"qwen3_5_moe_text", "qwen3_next"}
CHAT = {
    "messages": [
        {"role": "user", "content": "What is the capital of the moon?"},
        {"role": "assistant", "content": "The capital of the moon is Nova, of course."},
    ]
}


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def bound_is_the_checkpoint(session: Session, folder: Path) -> None:
    """Every parameter of the model, whole; to the bits that the files have (A_log is fp32 in the server)."""
    stored = dict(loaded(folder).named_parameters())
    assert stored.keys() == session.weights.tensors.keys()
    for name, tensor in session.weights.tensors.items():
        assert torch.equal(tensor.to(stored[name].dtype), stored[name]), name


def apart(session: Session, server: ServerProcess) -> float:
    """Nats a token, mean, between the trainer and what a client is told."""
    return float((own_loss(session.trainer, IDS) + served(server)).abs().mean())


def learn(server: ServerProcess, folder: Path, state: Path, close: float) -> tuple[Path, torch.Tensor]:
    """Train a line in eight steps: the checkpoint, and what the server then says of IDS. Each session is opened right
    after the one before."""
    state.mkdir()
    with open_session(server.run_dir, "test", H, state_dir=state) as session:
        bound_is_the_checkpoint(session, folder)
        assert apart(session, server) < close
        (state / "chat.jsonl").write_text(json.dumps(CHAT))
        sequence = session.builder.build(_transcript(), "one").sequences[0]
        before = session.control.score(sequence.ids)
    train_attached(str(state / "chat.jsonl"), server.run_dir, H, count=8, batch=1, state_dir=state)
    with open_session(server.run_dir, "test", H, state_dir=state) as session:
        assert apart(session, server) < close
        after = session.control.score(sequence.ids)
        trained = torch.tensor(sequence.mask[1:])
        assert (torch.tensor(after) - torch.tensor(before))[trained].mean() > 1
        written = session.manager.checkpoints.write()
        assert isinstance(written, Written)
        bound_is_the_checkpoint(session, written.path)
        return written.path, served(server)


def _transcript() -> Any:
    from producer.transcript import Transcript

    return Transcript.from_dict(CHAT)


def test_granite_is_trained_by_its_own_loss(architecture: Callable[[str], Path], tmp_path: Path) -> None:
    """Its logits are scaled, which was once ignored: the trainer's loss fell, and the server's hardly."""
    folder = architecture("granite")
    with ServerProcess(folder, tmp_path / "run", extra=OPTIONS) as server:
        learn(server, folder, tmp_path / "state", 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in REFUSED])
def test_an_architecture(architecture: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder, close = architecture(name), 0.1 if name in LINEAR else 0.02
    with ServerProcess(folder, tmp_path / "run", extra=OPTIONS) as server:
        checkpoint, said = learn(server, folder, tmp_path / "state", close)
    with ServerProcess(checkpoint, tmp_path / "again", extra=OPTIONS) as server:  # vLLM's own loader reads the files
        assert (served(server) - said).abs().mean() < close
