"""The ranks of a server with --tensor-parallel-size: do their parts make up the tensors, and are they one server's?

Each rank exports its part by itself (`weights_client.rank_dir`). A trainer of one rank asks all of them here before it
binds anything. Must not know: Redis, vLLM.
"""

from pathlib import Path
from typing import Any

from worker.shared_weights import weights_client
from worker.shared_weights.errors import AttachError
from worker.utils.shard import Shard, ShardError, check_complete


class DividedError(AttachError):
    """A server's weights are divided over `ranks` processes, and this trainer takes those of one."""

    def __init__(self, ranks: int) -> None:
        super().__init__(
            f"the server's weights are divided over {ranks} processes (--tensor-parallel-size {ranks}), and"
            " whoever asked can only take weights that lie in one"
        )
        self.ranks = ranks


def refuse_divided(info: dict[str, Any], rank: int | None) -> None:
    """Raise `AttachError` where a server's description `info` is not what the trainer of `rank` can take; None: the
    trainer of a whole model."""
    ranks = int(info.get("ranks", 1))
    if rank is None and ranks > 1:
        raise DividedError(ranks)
    if rank is not None and int(info.get("rank", 0)) != rank:
        raise AttachError(f"the server's process in the folder of rank {rank} says that it is rank {info.get('rank')}")


def check_ranks(run_dir: Path, info: dict[str, Any], timeout: float) -> None:
    """Ask every rank of the server in `run_dir` which parts it holds. info: one rank's description.

    Raises `AttachError` naming a tensor whose parts are not the whole once, or the whole on each rank.
    """
    ranks = int(info["ranks"])
    answers = [
        weights_client.ask(weights_client.rank_dir(run_dir, rank), "shards", timeout)[0] for rank in range(ranks)
    ]
    for rank, answer in enumerate(answers):
        if (answer["lineage"], answer["rank"], answer["ranks"]) != (info["lineage"], rank, ranks):
            raise AttachError(f"rank {rank} belongs to another start of the server: restart the server")
    try:
        parts = [{name: read(plain) for name, plain in answer["shards"].items()} for answer in answers]
        for name in sorted(set().union(*parts)):
            if missing := [rank for rank, known in enumerate(parts) if name not in known]:
                raise AttachError(f"rank {missing[0]} holds no part of {name}")
            check_complete(name, [known[name] for known in parts])
    except ShardError as error:
        raise AttachError(f"the ranks of this server do not make up its model: {error}") from None


def read(plain: dict[str, Any] | None) -> Shard | None:
    """The shard that was sent as `plain`; None: the whole."""
    return None if plain is None else Shard.read(plain)
