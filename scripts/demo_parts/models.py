"""The model of the demo: the one that comes with the environment, a directory, or one from a hub."""

import os
import re
from pathlib import Path

from producer.errors import TandemError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
"""What is fetched from a hub."""


class ModelError(TandemError):
    """--model names nothing that can be had."""


def find_model(asked: str | None) -> Path:
    """The directory of the model `asked` for: a directory, a hub's OWNER/NAME (fetched now), or SmolLM2-135M-Instruct
    if None (made once, from the installed package). Raises `ModelError`, `SmolLM2Error`."""
    if asked is None:
        from worker.testing.smollm2 import smollm2

        return smollm2()
    path = Path(asked).expanduser()
    return check(path, asked) if path.exists() else fetch(asked)


def check(path: Path, asked: str) -> Path:
    """`path`, if it can be a model directory. Raises `ModelError`."""
    needed = ("config.json", "*.safetensors", "tokenizer*")
    if missing := [pattern for pattern in needed if not any(path.glob(pattern))]:
        raise ModelError(f"--model {asked}: no {missing[0]} in it. Name a directory that `vllm serve` loads")
    return path.resolve()


def fetch(asked: str) -> Path:
    """The model's files from the hub, or from its cache on this machine. Raises `ModelError`."""
    if not HUB_NAME.fullmatch(asked):
        raise ModelError(f"--model {asked}: no such directory, and no hub's name (OWNER/NAME, as Qwen/Qwen3.5-0.8B)")
    from huggingface_hub import snapshot_download

    try:
        return check(Path(snapshot_download(asked, allow_patterns=FILES)), asked)
    except ModelError:
        raise
    except Exception as error:  # the hub's own errors, those of HTTP and of the disk
        where = os.environ.get("HF_ENDPOINT", "the hub")
        raise ModelError(
            f"--model {asked}: no such directory, and {where} does not give it ({type(error).__name__}:"
            f" {str(error).splitlines()[0] if str(error) else 'no reason said'}). Check name and network, name a"
            " directory, or leave --model out: SmolLM2-135M-Instruct comes with the environment"
        ) from error
