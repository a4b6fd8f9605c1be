"""Before anything is trained, a live vLLM is asked what it computes, and what differs is refused with both numbers."""

import dataclasses
from typing import Any

import pytest
import torch
from test_weights_server import IDS, served, spread_value
from transformers import AutoTokenizer

from worker.config.hyperparameters import Hyperparameters
from worker.config.update_options import ApplySettings
from worker.orchestrator.attach_proof import prove
from worker.serving.control_client import ServerControl, ServerError
from worker.shared_weights.attach import AttachedWeights, attach
from worker.testing.server_process import ServerProcess
from worker.trainer.device import choose_way
from worker.trainer.factory import make_trainer
from worker.trainer.proof import ProofError
from worker.trainer.trainer import Trainer

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def control(server: ServerProcess) -> Any:
    with ServerControl(server.run_dir, "test") as control:
        yield control


@pytest.fixture(scope="module")
def weights(server: ServerProcess, control: ServerControl) -> Any:
    """The server's weights, at a spread at which every one of them matters; as they were again afterwards."""
    attached = attach(server.run_dir)
    kept = {name: tensor.clone() for name, tensor in attached.named_tensors()}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in attached.named_tensors():
        tensor.copy_(spread_value(name, tensor, generator))
    yield attached
    for name, tensor in attached.named_tensors():
        tensor.copy_(kept[name])


def parts(weights: AttachedWeights) -> tuple[Trainer, Any]:
    """(trainer, tokenizer) on `weights`."""
    h = Hyperparameters(max_length=256).settled()
    tokenizer, model = AutoTokenizer.from_pretrained(weights.model_path), weights.build_model()
    chosen = choose_way(model, weights.model_path, h, ApplySettings(), 512, weights.state.device)
    state = torch.zeros_like(weights.state)
    return make_trainer(
        model, list(model.named_parameters()), tokenizer, h, state=state, way=chosen.way, budget=chosen.budget
    ), tokenizer


def test_a_row_s_log_probabilities_are_those_that_a_client_is_told(
    server: ServerProcess, control: ServerControl, weights: AttachedWeights
) -> None:
    told, before = served(server), control.state()
    found = torch.tensor(control.score(IDS))
    torch.testing.assert_close(found, told, rtol=0, atol=1e-3)
    assert torch.equal(torch.tensor(control.score(IDS)), found)
    assert control.state() == before


def test_a_token_that_is_none_is_refused_and_the_server_goes_on(control: ServerControl) -> None:
    with pytest.raises(ServerError):
        control.score([1, 10**9])
    assert len(control.score([1, 2, 3])) == 2


def test_trainer_transformers_and_server_agree(
    control: ServerControl, weights: AttachedWeights, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tandem")
    trainer, tokenizer = parts(weights)
    prove(trainer, weights, control, tokenizer)
    assert "the loss is the model's" in caplog.text


@pytest.mark.parametrize("one", ["gate_proj", "k_proj"])
def test_a_server_that_computes_from_other_weights_is_refused(
    control: ServerControl, weights: AttachedWeights, one: str
) -> None:
    """Two tensors the wrong way round, as by a wrong mapping: trainer and transformers agree, the server does not."""
    other = {"gate_proj": "up_proj", "k_proj": "v_proj"}[one]
    tensors = dict(weights.tensors)
    for name in [name for name in tensors if one in name]:
        twin = name.replace(one, other)
        tensors[name], tensors[twin] = tensors[twin], tensors[name]
    wrong = dataclasses.replace(weights, tensors=tensors)
    trainer, tokenizer = parts(wrong)
    with pytest.raises(ProofError, match=r"the server computes is not the loss of this model: .* nats a token, but"):
        prove(trainer, wrong, control, tokenizer)
