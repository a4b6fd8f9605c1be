"""A small stand-in for vLLM's processes in crash tests: the same shared memory and the same sockets, no engine.

    python tests/helpers/stand_in.py MODEL_DIR RUN_DIR [LAYOUT.json]

The header, record and optimizer areas, weights.sock and control.sock are the real ones; the parameters lie in vLLM's
merged layout, read from a file that tests/test_chaos_layout.py compares with a real server's. Only the engine is
trivial: it is paused or it runs. So the real `tandem worker` attaches to it unchanged, and it starts in the time torch
takes to be imported, where vLLM takes half a minute. It says on standard output when (time.monotonic()) it became
paused, serving or torn, and at which version. Never part of the product.
"""

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from worker.apollo import state_bytes
from worker.config.optimizers import MATRICES, optimizer_of
from worker.serving.vllm.control_server import Control
from worker.serving.vllm.lost_prefixes import LEAST_BLOCK, LostPrefixes
from worker.serving.vllm.server_state import ServerState
from worker.serving.vllm.weight_service import WeightService
from worker.shared_weights.backend import dtype_of, unique_parameters
from worker.shared_weights.backends import owner_for
from worker.shared_weights.batch_record import RECORD_BYTES
from worker.shared_weights.header import HEADER_BYTES, Header
from worker.shared_weights.slices import Slice
from worker.utils import supported_versions, unix_socket

LAYOUT = Path(__file__).parents[1] / "data" / "tiny_layout.json"
"""The tiny model's parameters as vLLM merges them: {"model_class", "parameters", "slices", "padding", "frozen"}."""

WEIGHTS = "model.safetensors"
REQUESTS = "STAND_IN_REQUESTS"
"""Environment: how many requests are said to run, always; by default none. If any, one prompt, which fills two blocks
of a prefix cache, comes again after every pause."""


class Engine:
    """What `Control` asks of vLLM's EngineClient."""

    def __init__(self, goes_on: Callable[[], object] = lambda: None) -> None:
        self.goes_on = goes_on
        self.paused = False
        self.errored = False

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.paused = True

    async def freeze(self) -> None:
        self.paused = True

    async def resume_generation(self) -> None:
        self.paused = False
        self.goes_on()

    async def is_paused(self) -> bool:
        return self.paused

    async def reset_prefix_cache(self) -> bool:
        return True

    async def collective_rpc(self, name: str) -> list[None]:
        return [None]


class Memory:
    """The checkpoint of `model_dir` in shared memory, with the areas that vLLM's side puts beside it."""

    def __init__(self, model_dir: Path, layout_file: Path = LAYOUT) -> None:
        self.model_dir = model_dir
        self.layout: dict[str, Any] = json.loads(layout_file.read_text())
        self.model = _merged(self.layout["parameters"])
        slices = [Slice(**piece | {"shape": tuple(piece["shape"])}) for piece in self.layout["slices"]]
        _load(self.model, model_dir, slices)
        self.owner = owner_for(torch.device("cpu"))
        self.optimizer = optimizer_of(os.environ)
        state = state_bytes([piece.shape for piece in slices], matrices=MATRICES[self.optimizer])
        sizes = {"header": HEADER_BYTES, "record": RECORD_BYTES, "state": state}
        self.areas = self.owner.place(self.model, sizes)
        self.header = Header(self.areas["header"])
        self.header.adopt(uuid.uuid4().hex, version=0)
        config = json.loads((model_dir / "config.json").read_text())
        self._context = config["max_position_embeddings"]
        self._versions = supported_versions.check_versions("vllm", "torch", "transformers")

    async def score(self, ids: list[int]) -> list[float]:
        """What an engine would say of a row, by transformers."""
        from worker.shared_weights.bind import build_model

        slices = [Slice(**piece | {"shape": tuple(piece["shape"])}) for piece in self.layout["slices"]]
        views = {piece.name: piece.of(self.model.get_parameter(piece.param).data) for piece in slices}
        with torch.no_grad():
            logits = build_model(self.model_dir, views)(torch.tensor([ids])).logits[0].float()
        return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    def answers(self) -> dict[str, Any]:
        """What weights.sock is asked."""
        return {"describe": self.describe, "header": self.header.fields, "revoke": self.header.revoke}

    def describe(self) -> dict[str, Any]:
        """As `TandemWeightEngine` answers "describe"."""
        return {
            **self.header.fields(),
            "pid": os.getpid(),
            "versions": self._versions,
            "model": str(self.model_dir),
            "revision": None,
            "model_class": self.layout["model_class"],
            "dtype": "bfloat16",
            "optimizer": self.optimizer,
            "load_format": "auto" if (self.model_dir / WEIGHTS).exists() else "dummy",
            "max_model_len": self._context,
            "memory": self.owner.info(),
            "areas": {name: self.owner.describe(area) for name, area in self.areas.items()},
            "parameters": {n: self.owner.describe(p.data) for n, p in unique_parameters(self.model).items()},
            "slices": self.layout["slices"],
            "padding": self.layout["padding"],
            "frozen": self.layout["frozen"],
        }


def _merged(parameters: dict[str, dict[str, Any]]) -> nn.Module:
    """Modules that have `parameters` (name -> shape and dtype), empty, and nothing else."""
    root = nn.Module()
    for name, described in parameters.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        values = torch.zeros(described["shape"], dtype=dtype_of(described["dtype"]))
        module.register_parameter(last, nn.Parameter(values, requires_grad=False))
    return root


def _load(model: nn.Module, model_dir: Path, slices: list[Slice]) -> None:
    if not (model_dir / WEIGHTS).exists():  # as vLLM's --load-format dummy
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.uniform_(-1e-3, 1e-3, generator=generator)
        return
    with safe_open(model_dir / WEIGHTS, framework="pt") as file:
        for piece in slices:
            piece.of(model.get_parameter(piece.param)).copy_(file.get_tensor(piece.source))


async def serve(answers: dict[str, Any], score: Any, run_dir: Path) -> None:
    """Until killed. answers: of weights.sock; score: as `Control` asks it."""
    WeightService(run_dir, answers)
    fields = answers["header"]()
    state = ServerState(str(fields["lineage"]), int(fields["version"]))
    running = dict.fromkeys(map(str, range(int(os.environ.get(REQUESTS) or 0))), 0)
    state.changed = lambda: print(time.monotonic(), state.condition, state.version, flush=True)
    rendering = {"chat_template": None, "template_kwargs": {}}
    if running:
        state.lost_prefixes = LostPrefixes(LEAST_BLOCK, 10**6)
    prompt = range(2 * LEAST_BLOCK + 1)
    engine = Engine(lambda: state.salt(None, prompt))
    control = Control(engine, state, run_dir, rendering, engine.freeze, progress=lambda: running, score=score)
    await control.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


def main(model_dir: Path, run_dir: Path, layout_file: Path = LAYOUT) -> None:
    """Serve until killed."""
    torch.set_num_threads(1)
    memory, run_dir = Memory(model_dir, layout_file), unix_socket.prepare_run_dir(run_dir)
    asyncio.run(serve(memory.answers(), memory.score, run_dir))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
