"""Parts of the tests of shared weights: a process that owns real vLLM models, and a model with padded vocabulary."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from patience import PATIENCE
from safetensors.torch import load_file, save_file


class Owner:
    """The owner process and its models, by kind."""

    def __init__(self, models: dict[str, Path], base: Path) -> None:
        self.models = models
        self.run_dirs = {kind: base / f"run-{kind}" for kind in models}
        arguments = [str(path) for kind in models for path in (models[kind], self.run_dirs[kind])]
        command = [sys.executable, str(Path(__file__).with_name("weights_owner.py")), *arguments]
        self.log = base / "owner.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=Path(__file__).parents[2],
            )
        assert self._line() == "ready"

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._line()

    def index(self, kind: str) -> int:
        return list(self.models).index(kind)

    def _line(self) -> Any:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith(('"', "{", "[", "null", "true")) or line.strip().isdigit():
                return json.loads(line)
        raise AssertionError(f"the owner died:\n{self.log.read_text()[-4000:]}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=PATIENCE)


def padded_model(source: Path, target: Path) -> Path:
    """`source` with a vocabulary of 1000, which vLLM pads to 1024 rows, and a tensor of a drafter."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    cut = {
        n: t[:1000].clone() if n.endswith(("embed_tokens.weight", "lm_head.weight")) else t for n, t in tensors.items()
    }
    save_file(cut | {"mtp.fc.weight": torch.zeros(2, 2)}, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    return target
