"""Which optimizer trains, and at which rate: what is asked for, what the server has, and what a journal says."""

import inspect
from pathlib import Path

import pytest

from producer.errors import TandemError
from worker.apollo import ApolloMini
from worker.checkpoint import model_directory
from worker.checkpoint.replay import hyperparameters, plain_hyperparameters
from worker.config.hyperparameters import Hyperparameters
from worker.config.optimizers import DEFAULT, OPTIMIZER_ENV, OPTIMIZERS, RATES, optimizer_of
from worker.trainer.factory import make_trainer


@pytest.mark.parametrize("server", OPTIMIZERS)
def test_a_trainer_takes_over_the_server_s_optimizer_and_its_rate(server: str) -> None:
    h = Hyperparameters().settled(server)  # type: ignore[arg-type]
    assert (h.optimizer, h.lr) == (server, RATES[server])
    assert Hyperparameters(lr=2e-6).settled(server).lr == 2e-6  # type: ignore[arg-type]
    assert h.settled(server) == h == hyperparameters(plain_hyperparameters(h))  # type: ignore[arg-type]


def test_the_default_is_mini_at_its_rate() -> None:
    h = Hyperparameters().settled()
    assert (h.optimizer, h.lr) == (DEFAULT, 3e-5) == ("apollo-mini", 3e-5)


def test_a_journal_of_before_there_was_a_choice_is_of_mini() -> None:
    plain = plain_hyperparameters(Hyperparameters(lr=1e-5))
    del plain["optimizer"]
    assert hyperparameters(plain).rule == "apollo-mini"


def test_another_optimizer_than_the_server_s_is_refused() -> None:
    with pytest.raises(TandemError, match=r"^--optimizer factored: the server was started for apollo-mini, "):
        Hyperparameters(optimizer="factored").settled("apollo-mini")
    with pytest.raises(TandemError, match=r"^--scale is APOLLO's"):
        Hyperparameters(scale="128").settled("factored")
    assert Hyperparameters(scale="128").settled("apollo-mini").scale == "128"


def test_a_server_s_environment_is_read() -> None:
    assert optimizer_of({}) == optimizer_of({OPTIMIZER_ENV: ""}) == "apollo-mini"
    assert optimizer_of({OPTIMIZER_ENV: "factored"}) == "factored"
    with pytest.raises(TandemError, match="TANDEM_OPTIMIZER is 'sgd'"):
        optimizer_of({OPTIMIZER_ENV: "sgd"})


@pytest.mark.parametrize(("name", "algorithm"), [("apollo-mini", "apollo"), ("factored", "factored")])
def test_a_trainer_is_made_of_it(tiny_model: Path, name: str, algorithm: str) -> None:
    model, tokenizer = model_directory.load(tiny_model)
    h = Hyperparameters(optimizer=name)  # type: ignore[arg-type]
    trainer = make_trainer(model, model.named_parameters(), tokenizer, h, state=None)
    assert {slot.algorithm for slot in trainer.optimizer._slots} == {algorithm, "adamw"}
    assert trainer.lr == trainer.optimizer.param_groups[0]["lr"] == RATES[name]


def test_the_optimizer_s_default_is_the_flag_s() -> None:
    assert inspect.signature(ApolloMini).parameters["matrices"].default == "apollo" and OPTIMIZERS[0] == DEFAULT
