"""Before anything is trained: trainer, transformers and server say the same of one short row, under the present
weights.

Three computations that have nothing in common but the weights: the trainer's own (`Trainer.token_nll`), transformers'
forward on the same memory, and the engine's, as for any request. See `worker.trainer.proof`.

Must not know: Redis.
Invariants: no flag skips it; nothing is written; what differs beyond rounding is a `ProofError` with both numbers.
"""

import logging
from typing import Any

import torch

from worker.orchestrator.rank_trainers import RankTrainers
from worker.serving.control_client import ServerControl
from worker.serving.protocol import MAX_ROW
from worker.shared_weights.attach import AttachedWeights
from worker.trainer.proof import check_loss, prove_trainer
from worker.trainer.trainer import Trainer

log = logging.getLogger("tandem")


def prove(
    trainer: Trainer,
    weights: AttachedWeights,
    control: ServerControl,
    tokenizer: Any,
    ranks: RankTrainers | None = None,
) -> None:
    """ranks: the others, of a divided trainer; transformers' forward is then divided, too, and the server's alone is
    another computation. Raises `ProofError`, or `ServerError` when the server does not compute the row."""
    most = min(trainer.room.longest, int(weights.server_info["max_model_len"]) - 1, MAX_ROW)
    model, expected_of = (weights.build_model(), None) if ranks is None else (ranks.plain_model(), ranks.expect)
    expected = prove_trainer(trainer, model, tokenizer, most, expected_of)
    served = -torch.tensor(control.score(expected.ids), dtype=torch.float32)
    if not torch.isfinite(expected.nll).all():
        return
    off = check_loss(
        expected,
        served,
        "what the server computes",
        "The server does not compute from the weights that it shares, or it and transformers understand this model"
        " differently: it cannot be trained while these versions serve it",
    )
    log.info(
        "the loss is the model's: %.2f nats a token on %d tokens; the server's is within %.3f, rounding explains %.3f",
        float(expected.nll.mean()), len(expected.ids), off, expected.bound,
    )  # fmt: skip
