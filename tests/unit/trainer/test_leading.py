"""What rank 0 leads, the others do: here one other, in this process, which gets each message as the wire has it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgpack

from worker.checkpoint import model_directory
from worker.config.hyperparameters import Hyperparameters
from worker.model.layers import layers_of
from worker.testing.tiny_model import make_tiny
from worker.trainer.factory import make_trainer
from worker.trainer.kernel_warmup import warm_up
from worker.trainer.leading import LeadingTrainer, obey
from worker.trainer.trainer import Trainer
from worker.utils import torch_setup

T = TypeVar("T")
H = Hyperparameters(max_length=256)


class Other:
    """A `Lead` of one trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def together(self, message: dict[str, Any], work: Callable[[], T]) -> T:
        self.tell(message)
        return work()

    def tell(self, message: dict[str, Any]) -> None:
        obey(self.trainer, msgpack.unpackb(msgpack.packb(message)))


def test_a_warm_up_runs_the_same_layers_on_every_rank(tmp_path: Path) -> None:
    """A rank that ran another number of them would wait for sums for ever."""
    torch_setup.prepare()
    folder = make_tiny(tmp_path / "m", layers=8)
    trainers: list[Trainer] = []
    ran: list[list[int]] = [[], []]
    for calls in ran:
        model, tokenizer = model_directory.load(folder)
        for number, layer in enumerate(layers_of(model)):
            layer.register_forward_pre_hook(lambda *_, calls=calls, number=number: calls.append(number))
        kind = partial(LeadingTrainer, lead=Other(trainers[0])) if trainers else Trainer
        trainers.append(make_trainer(model, model.named_parameters(), tokenizer, H, state=None, kind=kind))
    assert isinstance(trainers[1], LeadingTrainer)
    warm_up(trainers[1], within_longest=(128,))
    assert ran[0] == ran[1] and ran[1].count(7) < ran[1].count(0)
