"""The program of a rank but 0 of a divided trainer: it opens its part of the weights, and does what rank 0 says.

    python -m worker.orchestrator.rank_worker SOCKET PARENT      # started by `worker.distributed.rank_processes`

It has no queue, no Redis, no journal and no lease. It writes its part of the weights and of the optimizer's state while
rank 0's trainer writes its own: rank 0 has said APPLYING in every header before, and says CLEAN after.

Invariants: one process a rank holds its lock, so what a killed worker left cannot write beside the next one's. What
every rank raises alike is said to rank 0, which decides; anything else ends this process, with what it was.
"""

import contextlib
import fcntl
import gc
import logging
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch
from transformers import AutoTokenizer

from producer.errors import TandemError
from worker.checkpoint.replay import make_deterministic
from worker.config.hyperparameters import Hyperparameters
from worker.config.update_options import ApplySettings
from worker.distributed.rank_processes import inherited, meet, settle
from worker.memory.divided import beside
from worker.model.shard_group import ShardGroup
from worker.model.sharded import build_sharded
from worker.orchestrator.rank_trainers import choose_divided, make_divided
from worker.shared_weights.attach import attach
from worker.shared_weights.weights_client import rank_dir
from worker.trainer.device import Chosen, compiling, growing_segments, keep_within
from worker.trainer.leading import obey
from worker.trainer.proof import expect
from worker.trainer.trainer import Trainer
from worker.utils import torch_setup, unix_socket
from worker.utils.fault_injection import point

log = logging.getLogger("tandem")

LOCK = "trainer.lock"
"""In the rank's folder."""
LOCK_SECONDS = 30.0
"""How long the process of a worker that was killed may take to be gone."""


class Rank:
    """This process's part. told: what `RankTrainers` says at the start."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told, self.rank = told, int(told["rank"])
        run_dir = Path(told["run_dir"])
        self._lock = _locked(rank_dir(run_dir, self.rank) / LOCK, self.rank)
        torch_setup.prepare()
        with growing_segments():
            self.weights = attach(run_dir, rank=self.rank)
            torch.empty(1, device=self.weights.state.device)
        self.device = self.weights.state.device
        keep_within(ApplySettings(memory=told["memory"]), self.device, beside(int(told["ranks"])))
        make_deterministic(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(self.weights.model_path)
        self.model: Any = None
        self.trainer: Trainer | None = None

    def obey(self, message: dict[str, Any]) -> None:
        """Do it. Raises a `TandemError` that rank 0 gets as well, or anything else, which ends us all."""
        op = message["op"]
        if op == "meet":
            meet(self.told, self.device)
        elif op == "model":
            self.model = self._plain_model()
        elif op == "choose":
            log.setLevel(logging.WARNING)  # rank 0 shows the plan
            choose_divided(self.model, self.weights, Hyperparameters(**message["h"]), message)
        elif op == "make":
            h, chosen = Hyperparameters(**message["h"]), Chosen(message["way"], message["budget"])
            self.trainer = make_divided(self.model, self.weights, self.tokenizer, h, chosen, ShardGroup())
        elif op == "expect":
            expect(self._plain_model(), message["ids"])
        else:
            assert self.trainer is not None
            tunes = op == "dry_run" and self.device.type == "cuda"
            with compiling(self.device) if tunes else contextlib.nullcontext():
                obey(self.trainer, message)
        settle(self.device)
        if op == "warm_optimizer":  # the warm-up's end: as on rank 0
            gc.collect()
            gc.freeze()

    def _plain_model(self) -> Any:
        return build_sharded(self.weights.model_path, self.weights.tensors, self.weights.shards, ShardGroup())


def _locked(path: Path, rank: int) -> IO[bytes]:
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb+")
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TandemError(f"another process trains rank {rank} of this server: stop it first") from None
            time.sleep(0.05)


def main() -> int:
    """Until rank 0 ends us, or we cannot go on; the exit code."""
    sock = inherited(sys.argv)
    told = unix_socket.receive(sock)
    if told is None:
        return 0
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {told['rank']}: %(message)s", datefmt="%H:%M:%S")
    try:
        rank = Rank(told)
        unix_socket.send(sock, {"ready": os.getpid()})
        while (message := unix_socket.receive(sock)) is not None:
            raised = None
            try:
                rank.obey(message)
            except TandemError as error:
                raised = type(error).__name__
            if message["op"] != "forget":
                unix_socket.send(sock, {"raised": raised})
            if message["op"] == "write":
                point("applied")
    except Exception as error:
        with contextlib.suppress(unix_socket.WireError):  # rank 0 is gone
            unix_socket.send(sock, {"failed": f"{type(error).__name__}: {error}"[:2000]})
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main())  # no sum that others broke off is waited for
