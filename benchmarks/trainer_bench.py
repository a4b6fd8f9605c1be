"""A model of a real shape with random weights, without a server, and trainers of it by way of applying."""

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from contestants import LR, make_weights
from flops import wait
from shapes import text_facts, write_shape
from transformers import AutoTokenizer

from worker.config.hyperparameters import Hyperparameters
from worker.config.update_options import ApplySettings, Graphs
from worker.memory.plan import Way
from worker.shared_weights import bind
from worker.trainer.device import choose_way
from worker.trainer.factory import make_trainer
from worker.trainer.trainer import Trainer


class Bench:
    """A model of `size` and trainers of it by way. layers: 0 for all. graphs: as --graphs."""

    def __init__(
        self, size: str, longest: int, device: torch.device, memory: float, layers: int = 0, graphs: Graphs = "off"
    ) -> None:
        self.device, self.vocabulary, self.memory = device, text_facts(size)["vocab_size"], memory
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-")
        self.model_dir = write_shape(size, Path(self._folder.name) / "model")
        if layers:
            cut_layers(self.model_dir / "config.json", layers)
        self.tensors = make_weights(self.model_dir, device)
        self.model = bind.build_model(self.model_dir, self.tensors)
        self.tokenizer, self.h = (
            AutoTokenizer.from_pretrained(self.model_dir),
            Hyperparameters(lr=LR, max_length=longest),
        )
        settings = ApplySettings(memory=memory, graphs=graphs)
        self.chosen = choose_way(self.model, self.model_dir, self.h, settings, longest, device)

    def trainer(self, way: Way, sizes: tuple[int, ...], budget: int) -> Trainer:
        made = make_trainer(
            self.model, self.model.named_parameters(), self.tokenizer, self.h, state=None, way=way, budget=budget
        )
        if self.device.type == "cuda":
            made.sizes = sizes
        return made

    def close(self) -> None:
        self.tensors.clear()
        self._folder.cleanup()


def cut_layers(path: Path, layers: int) -> None:
    """Leave `layers` layers in a config.json."""
    import json

    config = json.loads(path.read_text())
    text = config["text_config"]
    text["num_hidden_layers"], text["layer_types"] = layers, text["layer_types"][:layers]
    path.write_text(json.dumps(config))


def timed(device: torch.device, work: Callable[[], object]) -> float:
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def reclaim(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
