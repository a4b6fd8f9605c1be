"""vLLM's side: shares the weights once they are loaded, and refuses vLLM's own ways of receiving new ones.

vLLM constructs `TandemWeightEngine` in its worker process, right after load_model, when it is started with
--weight-transfer-config '{"backend": "tandem"}' (vLLM 0.26 to 0.33; the base class is public and abstract).

Invariants: parameters keep name, identity, shape, strides, dtype and values; whatever cannot be shared or mapped is
refused here, before the server answers its first request. Under --tensor-parallel-size each rank's process has an
engine, which exports the parts of tensors that it holds, with a header, a record and a state of its own, in a folder of
its own; all have one lineage. Must not know: Redis.
"""

import atexit
import os
import uuid
from collections.abc import Mapping as Environment
from typing import Any, NoReturn

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine

from producer.errors import TandemError
from worker.apollo import state_bytes
from worker.config.optimizers import MATRICES, Optimizer, optimizer_of
from worker.serving.protocol import LINEAGE_ENV
from worker.serving.refused_options import WITHOUT_DRAFTER
from worker.serving.vllm import private_api
from worker.serving.vllm.tensor_mapping import Mapping, derive
from worker.serving.vllm.unsupported_flags import refuse_unshareable
from worker.serving.vllm.weight_service import WeightService
from worker.shared_weights.backend import unique_parameters
from worker.shared_weights.backends import owner_for
from worker.shared_weights.batch_record import RECORD_BYTES
from worker.shared_weights.header import HEADER_BYTES, Header
from worker.shared_weights.tensor_names import text_sources
from worker.shared_weights.weights_client import rank_dir
from worker.utils import unix_socket
from worker.utils.supported_versions import check_versions


class SharedNotSentError(TandemError):
    """Somebody asked vLLM to receive weights, but this server's weights are shared and trained in place."""


class TandemWeightEngine(WeightTransferEngine):  # type: ignore[type-arg]
    """Owns the shared weights, the header, the record and the optimizer's area for as long as the worker lives."""

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._shared = model  # the base class lets others point self.model elsewhere
        self._versions = check_versions("vllm", "torch", "transformers")
        refuse_unshareable(vllm_config, device.type)
        if device.type == "cpu":
            from worker.serving.vllm.cpu_backend import verify_unpacked

            verify_unpacked(model)
        hf_config, text_config = vllm_config.model_config.hf_config, vllm_config.model_config.hf_text_config
        with private_api.while_building(vllm_config):
            sources = text_sources(text_config.to_dict(), has_vision=hf_config is not text_config)
        self._rank, self._ranks = private_api.tensor_parallel_rank()
        self._mapping = derive(model, sources, divided=self._ranks > 1)
        self._owner = owner_for(device)
        self._optimizer = optimizer_of(os.environ)
        state = _optimizer_bytes(self._mapping, self._optimizer)
        sizes = {"header": HEADER_BYTES, "record": RECORD_BYTES, "state": state}
        self._areas = self._owner.place(model, sizes)
        self._header = Header(self._areas["header"])
        self._header.adopt(_lineage(self._ranks, os.environ), version=0)
        self._drafter = _drafter(vllm_config)
        answers = {"describe": self._describe, "header": self._read_header, "revoke": self._revoke}
        answers |= {"shards": self._shards}
        self._service = WeightService(rank_dir(unix_socket.default_run_dir(), self._rank), answers)
        atexit.register(self._service.close)

    def _read_header(self) -> dict[str, Any]:
        with self._owner.aside():
            return dict(self._header.fields())

    def _revoke(self) -> dict[str, Any]:
        with self._owner.aside():
            return dict(self._header.revoke())

    def _shards(self) -> dict[str, Any]:
        """Which parts of tensors this rank holds, so that a trainer of another rank sees that nothing is missing."""
        parts = {piece.name: piece.shard.plain() if piece.shard else None for piece in self._mapping.slices}
        return {"lineage": self._read_header()["lineage"], "rank": self._rank, "ranks": self._ranks, "shards": parts}

    def _describe(self) -> dict[str, Any]:
        """Everything a trainer needs to attach, in msgpack types. On CUDA the handles are good for one process."""
        mapping, model = self._mapping, self.vllm_config.model_config
        parameters = unique_parameters(self._shared)
        mapped = {piece.param for piece in mapping.slices}
        return {
            **self._read_header(),
            "pid": os.getpid(),
            "rank": self._rank,
            "ranks": self._ranks,
            "versions": self._versions,
            "model": model.model,
            "revision": model.revision,
            "model_class": type(self._shared).__name__,
            "dtype": "bfloat16",
            "optimizer": self._optimizer,
            "load_format": str(self.vllm_config.load_config.load_format),
            "max_model_len": model.max_model_len,
            "memory": self._owner.info(),
            "areas": {name: self._owner.describe(area) for name, area in self._areas.items()},
            "parameters": {n: self._owner.describe(p.data) for n, p in parameters.items() if n in mapped},
            "slices": [
                {"name": s.name, "source": s.source, "param": s.param, "start": s.start, "rows": s.rows}
                | {"shape": list(s.shape), "dtype": s.dtype, "shard": s.shard.plain() if s.shard else None}
                for s in mapping.slices
            ],
            "padding": [[p.param, p.start, p.rows] for p in mapping.padding],
            "frozen": [*mapping.frozen, *self._drafter],
        }

    def shutdown(self) -> None:
        """Stop answering; the memory itself lives until the last process that maps it ends."""
        self._service.close()

    def parse_init_info(self, init_dict: dict[str, Any]) -> NoReturn:
        """Refused: nothing is sent to this server."""
        raise SharedNotSentError(
            "this server's weights are shared and trained in place: start it without --weight-transfer-config"
            ' \'{"backend": "tandem"}\' to send it weights'
        )

    def parse_update_info(self, update_dict: dict[str, Any]) -> NoReturn:
        """Refused, as `parse_init_info`."""
        self.parse_init_info(update_dict)

    def init_transfer_engine(self, init_info: Any) -> NoReturn:
        """Refused, as `parse_init_info`."""
        self.parse_init_info({})

    def start_weight_update(self) -> NoReturn:
        """Refused, as `parse_init_info`."""
        self.parse_init_info({})

    def finish_weight_update(self) -> NoReturn:
        """Refused, as `parse_init_info`."""
        self.parse_init_info({})

    def update_weights(self, update_info: Any) -> NoReturn:
        """Refused, as `parse_init_info`."""
        self.parse_init_info({})

    def receive_weights(self, update_info: Any) -> NoReturn:
        """Refused, as `parse_init_info`."""
        self.parse_init_info({})

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> NoReturn:
        """Refused, as `parse_init_info`; abstract in vLLM 0.26, gone later."""
        raise SharedNotSentError("this server's weights are shared and trained in place: nothing is sent to it")


def _optimizer_bytes(mapping: Mapping, optimizer: Optimizer) -> int:
    """Bytes the optimizer may use, for all text tensors in the order of their names."""
    shards = [piece.shard for piece in mapping.slices]
    return state_bytes([piece.shape for piece in mapping.slices], matrices=MATRICES[optimizer], shards=shards)


def _lineage(ranks: int, environment: Environment[str, str]) -> str:
    """A new one; that of this start, which `tandem serve` drew, where several ranks must have the same."""
    return uuid.uuid4().hex if ranks == 1 else uuid.UUID(hex=environment[LINEAGE_ENV]).hex


def _drafter(vllm_config: Any) -> list[str]:
    """What a speculative drafter adds to the frozen names: its weights are its own, and training leaves them stale."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method in WITHOUT_DRAFTER:
        return []
    return [f"drafter ({speculative.method}): {getattr(speculative, 'model', None) or 'in the model itself'}"]
