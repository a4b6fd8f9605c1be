"""What tests of `tandem worker` beside a divided server share: a site whose server, stand-in or vLLM, has ranks."""

import signal
from typing import Any

import torch
from chaos_processes import Forked, RealServer, run_divided_stand_in
from durable_parts import LEARNING, QUIET, Site
from patience import until

from worker.checkpoint import replay
from worker.shared_weights.attach import AttachedWeights
from worker.shared_weights.divided import attach_any

RANKS = 2
VLLM = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}
"""What vLLM's CPU backend wants to be told of two ranks."""


class DividedSite(Site):
    """A site whose server divides its weights over `RANKS` ranks, and later may be another."""

    ranks = RANKS
    model_name = ""
    """What requests call the model."""

    def start_server(self) -> Any:
        if self.real or self.ranks == 1:
            self.server = self._real() if self.real else super().start_server()
            return self.server
        folders = (str(self.model), str(self.run_dir), str(self.ranks))
        self.server = Forked(
            run_divided_stand_in, folders, {"TANDEM_OPTIMIZER": self.optimizer}, self.folder / "server.log"
        )
        until(lambda: "ready" in self.server.said() or not self.server.alive(), "the stand-in is ready")
        assert self.server.alive(), self.server.said()
        return self.server

    def _real(self) -> RealServer:
        options = ["--tensor-parallel-size", str(self.ranks), "--max-model-len", "1024", "--max-num-seqs", "4"]
        return RealServer(self.model, self.run_dir, self.folder / "server.log", extra=options, environment=VLLM)

    def weights(self) -> AttachedWeights:
        return attach_any(self.run_dir)

    def digest(self) -> str:
        return replay.digest(self.weights().tensors)

    def everything(self) -> tuple[str, int]:
        weights = self.weights()
        state = weights.state.cpu()
        return replay.digest(weights.tensors | {"state": state}), int(state[:64].clone().view(torch.int64)[1])

    def header(self) -> dict[str, Any]:
        return dict(self.weights().header.fields())

    def rank_killed(self, fault: str, *options: str, jobs: int = 2, code: int | None = None) -> str:
        """A worker whose rank 1 dies at `fault`; code: how the worker then ends."""
        arguments = ("worker", "--until-empty", "--max-jobs", str(jobs), *LEARNING, *QUIET, *options)
        process = self.start(*arguments, rank_fault=fault)
        assert process.ended() == (0 if code is None else code), process.said()
        return process.said()

    def start(self, *arguments: str, rank_fault: str = "", **options: Any) -> Forked:
        self.extra = {"TANDEM_FAULT_RANK_1": rank_fault}
        return super().start(*arguments, **options)


KILLED = -signal.SIGKILL
