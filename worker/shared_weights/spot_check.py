"""Compares shared tensors with the checkpoint on disk: the proof, on the real weights, that the mapping is right.

Only a few short pieces of each tensor are read. Sound while the weights are untrained (version 0). Must not know: the
server.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from worker.shared_weights.errors import AttachError
from worker.shared_weights.stored_form import stored_parts
from worker.utils.shard import Shard

_PIECE = 64
"""Elements compared at each place of a row."""
_INDEX = "model.safetensors.index.json"


def checkpoint_dir(model: str, revision: str | None) -> Path:
    """The local directory of what the server was told to serve: a directory, or a hub name that it has downloaded."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError) as error:
        raise AttachError(
            f"the server's model {model} is neither a directory here nor in the hub's cache ({type(error).__name__}):"
            " run the worker where the server runs, or serve a local directory by its full path"
        ) from None


def untrained_names(directory: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Tensors of `directory`'s safetensors that stand for none of `tensors`: vision, drafter. Empty without any."""
    with ExitStack() as stack:
        stored = _open_files(directory, stack) if any(directory.glob("*.safetensors")) else {}
        return sorted(stored.keys() - stored_parts(stored.keys(), tensors, directory).keys())


def spot_check(directory: Path, tensors: dict[str, torch.Tensor], shards: Mapping[str, Shard] | None = None) -> None:
    """Compare the ends and the middle of every tensor, and of every expert, with `directory`'s safetensors, exactly.

    tensors: text name -> tensor; shards: name -> which part of the stored tensor it is; the ends and the middle are
    then those of each piece. `AttachError` names the first that is missing or differs.
    """
    with ExitStack() as stack:
        files = _open_files(directory, stack)
        parts = stored_parts(files.keys(), tensors, directory)
        if missing := sorted(tensors.keys() - {part.name for part in parts.values()}):
            raise AttachError(f"{directory} holds no {missing[0]}: it is not the checkpoint that is being served")
        for name, part in parts.items():
            stored, tensor = files[name].get_slice(name), part.view
            shard = (shards or {}).get(part.name)
            if shard is not None and not part.whole:
                raise AttachError(f"{name} is divided over ranks and stacked in the server, which is not known here")
            shape = tuple(tensor.shape) if shard is None else shard.shape
            if tuple(stored.get_shape()) != shape:
                raise AttachError(f"{name} has shape {stored.get_shape()} on disk, in the server {shape}")
            for here, row, columns in _places(tensor, shard):
                if not _same(stored[row : row + 1, *columns], tensor[here : here + 1]):
                    raise AttachError(
                        f"{name} as the server holds it differs from {directory} at row {row}: the server runs other"
                        " weights than its model directory has, or the mapping is wrong for this version of vLLM"
                    )


def _open_files(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> open safetensors file that has it."""
    index = directory / _INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise AttachError(f"{directory} holds no *.safetensors to check the server's weights against: convert it")
    opened = [stack.enter_context(safe_open(directory / name, framework="pt")) for name in names]
    return {key: file for file in opened for key in file.keys()}  # noqa: SIM118  (not a dict)


def _places(tensor: torch.Tensor, shard: Shard | None) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
    """(row of `tensor`, the same row as stored, which columns of it) to compare."""
    if shard is None or shard.dim > 0:
        columns = () if shard is None else (*[slice(None)] * (shard.dim - 1), slice(*_piece(shard)))
        yield from ((row, row, columns) for row in _rows(tensor.shape[0]))
        return
    start = 0
    for first, count in shard.pieces:
        yield from ((start + row, first + row, ()) for row in _rows(count))
        start += count


def _piece(shard: Shard) -> tuple[int, int]:
    """First column and the one after the last, of a part that is one piece of the columns."""
    ((first, count),) = shard.pieces
    return first, first + count


def _rows(count: int) -> list[int]:
    return sorted({0, 1 % count, count // 2, count - 1})


def _same(stored: torch.Tensor, shared: torch.Tensor) -> bool:
    stored, shared = stored.reshape(-1), shared.reshape(-1)
    for piece in (slice(0, _PIECE), slice(-_PIECE, None)):
        if not torch.equal(stored[piece].to(shared.dtype), shared[piece].cpu()):
            return False
    return True
