"""Made the two state directories beside it, with the code of commit 964f3d2: see README.md.

PYTHONPATH=tests python tests/data/state_format_1/make_state.py NEW_FOLDER
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from durable_parts import QUIET, Site
from worker.tiny import make_tiny
from worker.weights.attach import attach

WORDS = ("red", "green", "blue", "one", "two", "three", "night", "day")


def talk(id: str, weight: float, turns: int = 1) -> dict[str, Any]:
    messages = []
    for turn in range(turns):
        start = sum(map(ord, id)) + 3 * turn
        words = [WORDS[(start + i) % len(WORDS)] for i in range(6)]
        messages.append({"role": "user", "content": " ".join(words[:3])})
        messages.append({"role": "assistant", "content": " ".join(words)})
    return {"id": id, "messages": messages, "weight": weight}


class Recorded:
    """A site, and what its weights are at each version."""

    def __init__(self, folder: Path, model: Path) -> None:
        folder.mkdir(parents=True)
        self.site = Site(folder, model)
        self.seen: dict[int, dict[str, Any]] = {}
        self.begin = self.before = self.tensors()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor.float().clone() for name, tensor in attach(self.site.run_dir).tensors.items()}

    def note(self) -> None:
        version, now = self.site.agree(), self.tensors()
        everything, step = self.site.everything()
        self.seen[version] = {"digest": self.site.digest(), "everything": everything, "step": step}
        for name, then in (("moved", self.before), ("moved_in_all", self.begin)):
            self.seen[version][name] = sum(float((now[k] - then[k]).square().sum()) for k in now) ** 0.5
        self.before = now

    def train(self, *talks: dict[str, Any], options: tuple[str, ...] = ()) -> None:
        self.site.producer.enqueue_many(list(talks))
        self.site.work(*QUIET, *options, jobs=max(1, len(talks)))
        self.note()

    def tandem(self, *arguments: str) -> None:
        self.site.tandem(*arguments)
        self.note()

    def close(self, out: Path) -> None:
        self.site.close()
        out.mkdir(parents=True)
        shutil.copytree(self.site.state / "journal", out / "journal")
        (out / "expected.json").write_text(json.dumps(self.seen, indent=1) + "\n")


def weights(run: Recorded) -> None:
    run.train(talk("a-0", 1.0), talk("a-1", 0.5))
    run.train(talk("b-0", 0.5))
    run.site.producer.enqueue_many([talk("c-0", 1e-6)])
    run.site.killed("journaled", *QUIET, jobs=1)  # version 3 was journaled, never applied, and is made by the next
    run.train(options=("--checkpoint-every", "3"))  # the checkpoint begins a new file of the journal
    run.train(talk("d-0", 1.0), talk("d-1", 0.25, turns=2), talk("d-2", 0.75))
    run.train(talk("e-0", 0.5), options=("--apply", "streaming"))
    run.train(talk("f-0", 0.5), options=("--rehearse", "1"))
    run.train(talk("g-0", 0.5), options=("--lr", "1e-3", "--warmup", "20", "--embeddings", "frozen"))
    run.tandem("rollback", "5")
    run.train(talk("h-0", 0.5), talk("h-1", 0.5))


def dropped(run: Recorded) -> None:
    run.train(talk("x-0", 1.0), talk("x-1", 1.0))
    run.train(talk("x-2", 1.0), talk("x-3", 1.0))
    run.train(talk("x-4", 1.0), talk("x-5", 1.0))
    run.tandem("rollback", "3", "--drop", "x-2")
    run.tandem("rollback", "2")  # this commit took x-2 back in
    run.train(talk("y-0", 1.0))


def main(folder: Path) -> None:
    model = make_tiny(folder / "model")
    for make in (weights, dropped):
        run = Recorded(folder / "sites" / make.__name__, model)
        make(run)
        run.close(folder / "out" / make.__name__)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
