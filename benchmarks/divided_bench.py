"""A server that divides its model over GPUs, the versions that a worker makes on it, and what both take of each GPU.

Must not know: how a model is divided, what is made of the figures.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import Until
from rig import Rig, Worker, visible_card
from texts import build, conversation

from worker.data.examples import ExampleBuilder

STREAMING = ("--apply", "streaming")


@dataclass
class Bench:
    """What the parts share. options: of every worker; server: of every server; one: seconds of a version on one GPU,
    where they are known; kept: a worker that goes on into the next part."""

    folder: Path
    model: Path
    builder: ExampleBuilder
    tokens: int
    jobs: int
    options: list[str]
    server: list[str]
    until: Until
    one: float | None = None
    kept: Worker | None = None

    def rig(self, ranks: int) -> Rig:
        """Of a server over `ranks` GPUs."""
        own = self.folder / str(ranks)
        own.mkdir()
        return Rig(own, self.model, card=0 if ranks == 1 and torch.cuda.is_available() else None)

    def start(self, rig: Rig, ranks: int) -> None:
        """The server of `rig`, until it answers."""
        if ranks > 1 and not torch.cuda.is_available():
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))
        divided = ["--tensor-parallel-size", str(ranks)] if ranks > 1 else []
        rig.start_server([*self.server, *divided], self.until.left)

    def ready(self) -> float:
        """Most seconds until a worker is ready."""
        return min(400.0, self.until.left)

    def texts(self, name: str) -> list[dict[str, Any]]:
        """Of one version."""
        return [conversation(self.builder, f"{name}-{n}", self.tokens // self.jobs) for n in range(self.jobs)]

    def version(self, rig: Rig, name: str) -> dict[str, float]:
        """One version: see `Rig.version`."""
        return rig.version(self.texts(name))

    def log_probability(self, rig: Rig, name: str) -> float:
        """The server's own, in nats a trained token, of the first text of version `name`."""
        example = build(self.builder, self.texts(name)[0])
        (sequence,) = example.sequences
        body = {"prompt": list(sequence.ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        _, answer = rig.post("/v1/completions", body)
        said = answer["choices"][0]["prompt_logprobs"]
        found = [
            said[place][str(token)]["logprob"]
            for place, (token, trained) in enumerate(zip(sequence.ids, sequence.mask, strict=True))
            if trained
        ]
        return sum(found) / len(found)


def used(ranks: int) -> list[int]:
    """MiB in use of each of the first `ranks` GPUs, by everybody; nothing on a CPU."""
    if not torch.cuda.is_available():
        return []
    cards = ",".join(visible_card(number) for number in range(ranks))
    ask = ["nvidia-smi", "-i", cards, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()]
