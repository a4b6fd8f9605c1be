"""Model directories: load the text model of one for training, write a trained one beside it.

The result has the source's architecture, tensor names, dtypes and files, so `vllm serve` and `from_pretrained` load it
like the source; tensors that training does not touch (`visual.*`, `mtp.*`) are carried over. Invariants: the source is
never written to; the target appears whole or not at all (written under a temporary name, fsync, rename).
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from producer.errors import TandemError
from producer.progress import BYTES, progress
from worker.checkpoint.state_dir import sync
from worker.shared_weights.stored_form import Part, stored_parts
from worker.utils import torch_setup


def parts_of(folder: Path, tensors: dict[str, torch.Tensor], model_dir: Path) -> dict[str, Part]:
    """Name in the files of `folder`, a checkpoint of the model in `model_dir` -> what of `tensors` (text name ->
    tensor) it is."""
    stored: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            stored |= set(opened.keys())
    return stored_parts(stored, tensors, model_dir)


def check_target(source: Path, out: Path) -> None:
    """Refuse before any work: no source, a target that exists, or too little disk."""
    if not (source / "config.json").is_file():
        raise TandemError(f"--model {source} is not a model directory: it has no config.json")
    if not list(source.glob("*.safetensors")):
        raise TandemError(f"--model {source} has no *.safetensors files: convert it first")
    if out.exists():
        raise TandemError(f"--out {out} exists already: name a new directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    needed = directory_bytes(source)
    free = shutil.disk_usage(out.parent).free
    if free < needed * 1.05:
        raise TandemError(f"--out {out}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free")


def directory_bytes(source: Path) -> int:
    """What the files of a model directory take."""
    return sum(file.stat().st_size for file in source.iterdir() if file.is_file())


def load(source: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """(text model in `dtype`, tokenizer) of a directory; Qwen3.5's text model also from a multi-modal checkpoint."""
    torch_setup.prepare()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(source)


def save(model: Any, source: Path, out: Path) -> None:
    """Write `model`'s parameters in the layout of `source` to the new directory `out`."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with progress(f"writing {out.name}", directory_bytes(source), BYTES) as shown:
            write_layout(dict(model.named_parameters()), source, folder, shown.advance)
        folder.chmod(0o755)
        publish(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_layout(
    trained: dict[str, torch.Tensor], source: Path, folder: Path, wrote: Callable[[int], object] = lambda size: None
) -> None:
    """Write every file of `source` into `folder`, with `trained` (text name -> tensor) in place of its old values.

    wrote: told the bytes of each file."""
    parts = parts_of(source, trained, source)
    if missing := set(trained) - {part.name for part in parts.values()}:
        raise TandemError(f"{source} has no tensor for {', '.join(sorted(missing))}: nothing was written")
    for file in sorted(source.iterdir()):
        if file.suffix == ".safetensors":
            _rewrite(file, folder / file.name, parts)
        elif file.is_file():
            shutil.copyfile(file, folder / file.name)
        if file.is_file():
            wrote(file.stat().st_size)


def publish(folder: Path, out: Path) -> None:
    """Make the finished `folder` durable under its name `out`: fsync all of it, rename, fsync the parent."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))
    folder.rename(out)
    sync(out.parent)


def _rewrite(source: Path, target: Path, parts: dict[str, Part]) -> None:
    """Copy one safetensors file with trained values in place of old ones."""
    tensors = {}
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            old = file.get_tensor(name)
            if name not in parts:
                tensors[name] = old
                continue
            new = parts[name].view
            if new.shape != old.shape:
                raise TandemError(f"{name} has shape {tuple(new.shape)}, {tuple(old.shape)} in {source}")
            tensors[name] = new.detach().to("cpu", old.dtype).contiguous()
    save_file(tensors, target, metadata=metadata)
