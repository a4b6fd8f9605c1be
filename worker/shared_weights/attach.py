"""The trainer's side: opens a live server's weights and builds transformers' model on them, without a copy.

Never imports vLLM (0.26 would re-register qwen3_5 in transformers and break it).
Invariants: every tensor of the text model is bound, each row of the server's parameters at most once; whatever does
not fit is refused before anything is written, naming the parameter and what to do.
Must not know: Redis, the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version

from worker.config.optimizers import DEFAULT, OPTIMIZER_ENV, Optimizer, optimizer_of
from worker.shared_weights import bind, weights_client
from worker.shared_weights.backends import opener_for
from worker.shared_weights.batch_record import RecordArea
from worker.shared_weights.errors import AttachError
from worker.shared_weights.header import CLEAN, Header
from worker.shared_weights.ranks import check_ranks, read, refuse_divided
from worker.shared_weights.slices import FLOAT32_PARAMETERS, Slice
from worker.shared_weights.spot_check import checkpoint_dir, spot_check, untrained_names
from worker.shared_weights.weights_client import read_header
from worker.utils import supported_versions
from worker.utils.shard import Shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONSUMED = ("parameters", "areas", "memory", "slices", "lineage", "version", "state")
"""Parts of the server's answer that become tensors here, or that the header says afresh."""

__all__ = ["AttachError", "AttachedWeights", "attach", "read_header"]


@dataclass
class AttachedWeights:
    """A server's weights and what lies beside them, as tensors on the server's own memory."""

    header: Header
    record: RecordArea
    state: torch.Tensor
    """Flat uint8: the optimizer's area."""
    tensors: dict[str, torch.Tensor]
    """transformers' name -> view, in sorted order of the names; tied embeddings once."""
    frozen: list[str]
    """What training leaves alone: other parameters of the server, a drafter, other tensors of the checkpoint."""
    model_path: Path
    """The local directory of the model: configuration, tokenizer, checkpoint."""
    server_info: dict[str, Any]
    """What the server said about itself: versions, model, load_format, max_model_len, pid, rank, padding..."""
    shards: dict[str, Shard] = field(default_factory=dict)
    """Name -> which part of the whole it is, for tensors of which this rank of the server holds a part."""

    @property
    def rank_count(self) -> int:
        """Over how many processes the server divides its weights."""
        return int(self.server_info.get("ranks", 1))

    @property
    def optimizer(self) -> Optimizer:
        """What `state` has room for: `tandem serve --optimizer`."""
        return optimizer_of({OPTIMIZER_ENV: self.server_info.get("optimizer", DEFAULT)})

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The text tensors in the order that optimizer ids and the optimizer's area follow: sorted by name."""
        return list(self.tensors.items())

    def build_model(self, **options: Any) -> PreTrainedModel:
        """transformers' text model with every parameter on the shared memory; `options` go to from_config.

        `AttachError` if a parameter or buffer is left without data, or does not fit.
        """
        return bind.build_model(self.model_path, self.tensors, **options)


def attach(run_dir: Path, timeout: float = 60.0, rank: int | None = None) -> AttachedWeights:
    """Open the weights of the server whose sockets lie in `run_dir`. `timeout` in seconds.

    rank: open the part of this rank of a server with --tensor-parallel-size. None: the server holds its weights in one
    process, or is refused.

    Raises WireError (no server), VersionError, SharingError (memory) or AttachError (mapping, dtypes, values). While
    the weights are those of the checkpoint (version 0), pieces of every tensor are compared with it.
    """
    supported_versions.check_versions("torch", "transformers")
    info, pid = weights_client.ask(weights_client.rank_dir(run_dir, rank or 0), "describe", timeout)
    _check_server(info, pid)
    refuse_divided(info, rank)
    if rank is not None:
        check_ranks(run_dir, info, timeout)
    opener = opener_for(info["memory"])
    parameters = {name: opener.open(description) for name, description in info["parameters"].items()}
    slices = [_slice(piece) for piece in info["slices"]]
    tensors = _views(parameters, slices)
    shards = {piece.name: piece.shard for piece in slices if piece.shard is not None}
    areas = {name: opener.open(description) for name, description in info["areas"].items()}
    header = Header(areas["header"])
    _check_lineage(header, info)
    model_path = checkpoint_dir(info["model"], info["revision"])
    untouched = header.version == 0 and header.state == CLEAN
    if info["load_format"] != "dummy" and untouched:
        spot_check(model_path, tensors, shards)
    frozen = [*info["frozen"], *untrained_names(model_path, tensors)]
    kept = {key: value for key, value in info.items() if key not in _CONSUMED}
    record, state = RecordArea(areas["record"]), areas["state"]
    return AttachedWeights(header, record, state, tensors, frozen, model_path, kept, shards)


def _slice(piece: dict[str, Any]) -> Slice:
    return Slice(**{**piece, "shape": tuple(piece["shape"]), "shard": read(piece.get("shard"))})


def _check_server(info: dict[str, Any], pid: int) -> None:
    supported = supported_versions.SUPPORTED["vllm"]
    version = Version(Version(info["versions"]["vllm"]).base_version)
    if version < Version(supported.first) or (supported.below is not None and version >= Version(supported.below)):
        raise AttachError(
            f"the server runs vLLM {version}; supported are {supported.first} on and below {supported.below}"
        )
    if pid != info["pid"]:
        raise AttachError(
            f"the server's process is {info['pid']} there and {pid} here: run the worker in the server's PID namespace"
            " (container)"
        )
    if info["dtype"] != "bfloat16":
        raise AttachError(f"the server serves {info['dtype']} weights: start it with --dtype bfloat16")


def _check_lineage(header: Header, info: dict[str, Any]) -> None:
    """The memory that was opened is the memory that the server answered about."""
    if header.lineage != info["lineage"]:
        raise AttachError(f"the opened memory is of lineage {header.lineage}, the server's is {info['lineage']}")


def _views(parameters: dict[str, torch.Tensor], slices: list[Slice]) -> dict[str, torch.Tensor]:
    """The view of every slice, in sorted order; refuses rows given twice, and unexpected dtypes and shapes."""
    views = {}
    ends: dict[str, int] = {}
    for piece in sorted(slices, key=lambda piece: (piece.param, piece.start)):
        parameter = parameters.get(piece.param)
        if parameter is None:
            raise AttachError(f"{piece.name}: the server shares no parameter {piece.param}")
        if piece.name in views:
            raise AttachError(f"{piece.name} is mapped twice by the server")
        if piece.start < ends.get(piece.param, 0):
            raise AttachError(f"parameter {piece.param}: row {piece.start} belongs to two tensors, {piece.name} is one")
        ends[piece.param] = piece.start + piece.rows
        if ends[piece.param] > parameter.shape[0] or tuple(parameter.shape[1:]) != piece.shape[1:]:
            raise AttachError(
                f"parameter {piece.param} {tuple(parameter.shape)} does not hold {piece.name} {piece.shape}"
            )
        expected = torch.float32 if piece.name.rpartition(".")[2] in FLOAT32_PARAMETERS else torch.bfloat16
        if parameter.dtype != expected:
            raise AttachError(
                f"parameter {piece.param} is {parameter.dtype}, not {expected}: serve with --dtype bfloat16"
            )
        views[piece.name] = piece.of(parameter)
    return dict(sorted(views.items()))
