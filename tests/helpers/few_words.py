"""Conversations of a few words, and a trainer on a tiny model that can learn them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from producer import Transcript
from worker.checkpoint import model_directory
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import ExampleBuilder
from worker.trainer.factory import make_trainer
from worker.trainer.trainer import Trainer

Room = tuple[Trainer, ExampleBuilder]
WORDS = ("red", "green", "blue", "one", "two", "three")


def conversation(index: int, words: tuple[str, ...] = WORDS) -> Transcript:
    dice = random.Random(index)
    said = [" ".join(dice.choices(words, k=8)) for _ in range(2)]
    messages = [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
    return Transcript.from_dict({"messages": messages})


@contextmanager
def open_room(tiny_model: Path) -> Iterator[Room]:
    """A trainer on a fresh tiny model, and its builder; one thread computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = model_directory.load(tiny_model)
    builder = ExampleBuilder(tokenizer, max_tokens=512)
    trainer = make_trainer(model, model.named_parameters(), tokenizer, Hyperparameters(lr=3e-3), state=None)
    yield trainer, builder
    torch.set_num_threads(threads)


def learn_the_words(room: Room) -> None:
    """Train the model on the few words above."""
    trainer, builder = room
    for step in range(15):
        trainer.begin([builder.build(conversation(8 * step + i), f"warm-{8 * step + i}") for i in range(8)])
        trainer.apply()


def weights_of(trainer: Trainer) -> torch.Tensor:
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return torch.cat([p.detach().flatten().float() for p in parameters])
