"""The stand-in of a server with --tensor-parallel-size: every rank's parts, header, record and state, and its socket.

    python tests/helpers/divided_stand_in.py MODEL_DIR RUN_DIR RANKS

All ranks lie in one process here; vLLM has a process for each. What a trainer asks of them is answered alike. A tensor
of a rank is a parameter of its own: merged parameters are the plain stand-in's and real vLLM's.
"""

import asyncio
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from shard_parts import divide
from stand_in import serve
from torch import nn

from worker.apollo import state_bytes
from worker.config.optimizers import MATRICES, optimizer_of
from worker.serving.vllm.weight_service import WeightService
from worker.shared_weights.backend import unique_parameters
from worker.shared_weights.backends import owner_for
from worker.shared_weights.batch_record import RECORD_BYTES
from worker.shared_weights.bind import build_model, text_config
from worker.shared_weights.header import HEADER_BYTES, Header
from worker.shared_weights.slices import FLOAT32_PARAMETERS
from worker.shared_weights.weights_client import rank_dir
from worker.utils import supported_versions, unix_socket
from worker.utils.shard import Shard, assemble


class RankMemory:
    """Rank `rank`'s parts of the checkpoint `stored` in shared memory, with the areas beside them."""

    def __init__(self, model_dir: Path, stored: dict[str, torch.Tensor], rank: int, ranks: int, lineage: str) -> None:
        self.model_dir, self.rank, self.ranks = model_dir, rank, ranks
        parts, self.shards = divide(stored, text_config(model_dir), rank, ranks)
        self.model = nn.ParameterDict()
        self.names = dict(enumerate(sorted(parts)))
        for number, name in self.names.items():
            exact = torch.float32 if name.rpartition(".")[2] in FLOAT32_PARAMETERS else torch.bfloat16
            self.model[str(number)] = nn.Parameter(parts[name].to(exact), requires_grad=False)
        self.owner, self.optimizer = owner_for(torch.device("cpu")), optimizer_of(os.environ)
        shapes = [tuple(self.model[str(number)].shape) for number in self.names]
        shards = [self.shards.get(name) for name in self.names.values()]
        state = state_bytes(shapes, matrices=MATRICES[self.optimizer], shards=shards)
        self.areas = self.owner.place(self.model, {"header": HEADER_BYTES, "record": RECORD_BYTES, "state": state})
        self.header = Header(self.areas["header"])
        self.header.adopt(lineage, version=0)
        self._versions = supported_versions.check_versions("vllm", "torch", "transformers")

    def part(self, name: str) -> tuple[torch.Tensor, Shard | None]:
        number = next(number for number, known in self.names.items() if known == name)
        return self.model[str(number)].data, self.shards.get(name)

    def plain_shards(self) -> dict[str, Any]:
        return {name: self.shards[name].plain() if name in self.shards else None for name in self.names.values()}

    def describe(self) -> dict[str, Any]:
        """As `TandemWeightEngine` answers "describe"."""
        shards = self.plain_shards()
        return {
            **self.header.fields(),
            "pid": os.getpid(),
            "rank": self.rank,
            "ranks": self.ranks,
            "versions": self._versions,
            "model": str(self.model_dir),
            "revision": None,
            "model_class": "stand-in",
            "dtype": "bfloat16",
            "optimizer": self.optimizer,
            "load_format": "auto",
            "max_model_len": text_config(self.model_dir).max_position_embeddings,
            "memory": self.owner.info(),
            "areas": {name: self.owner.describe(area) for name, area in self.areas.items()},
            "parameters": {n: self.owner.describe(p.data) for n, p in unique_parameters(self.model).items()},
            "slices": [
                {"name": name, "source": name, "param": str(number), "start": 0, "rows": len(self.model[str(number)])}
                | {"shape": list(self.model[str(number)].shape), "dtype": "bfloat16", "shard": shards[name]}
                for number, name in self.names.items()
            ],
            "padding": [],
            "frozen": [],
        }

    def answers(self) -> dict[str, Any]:
        def said() -> dict[str, Any]:
            lineage = self.header.fields()["lineage"]
            return {"lineage": lineage, "rank": self.rank, "ranks": self.ranks, "shards": self.plain_shards()}

        header = self.header
        return {"describe": self.describe, "header": header.fields, "revoke": header.revoke, "shards": said}


def main(model_dir: Path, run_dir: Path, ranks: int) -> None:
    """Serve until killed."""
    torch.set_num_threads(1)
    stored, lineage = load_file(model_dir / "model.safetensors"), uuid.uuid4().hex
    memories = [RankMemory(model_dir, stored, rank, ranks, lineage) for rank in range(ranks)]
    unix_socket.prepare_run_dir(run_dir)
    for memory in memories[1:]:
        WeightService(rank_dir(run_dir, memory.rank), memory.answers())

    async def score(ids: list[int]) -> list[float]:
        """What an engine would say of a row, by transformers, in one process."""
        views = {name: assemble([memory.part(name) for memory in memories]) for name in sorted(stored)}
        with torch.no_grad():
            logits = build_model(model_dir, views)(torch.tensor([ids])).logits[0].float()
        return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    asyncio.run(serve(memories[0].answers(), score, run_dir))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
