"""A server whose weights are divided is refused by who trains whole ones, and one whose ranks do not fit by all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from worker.serving.vllm.weight_service import WeightService
from worker.shared_weights.errors import AttachError
from worker.shared_weights.ranks import check_ranks, refuse_divided
from worker.shared_weights.weights_client import rank_dir
from worker.utils.shard import Shard

LINEAGE = "0" * 32


def answer(rank: int) -> dict[str, Any]:
    shards = {"down": Shard((4, 8), 1, ((4 * rank, 4),)).plain(), "norm": None}
    return {"lineage": LINEAGE, "rank": rank, "ranks": 2, "shards": shards}


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """What the two ranks in tmp_path say; a test changes it."""
    said = [answer(0), answer(1)]
    services = [WeightService(rank_dir(tmp_path, rank), {"shards": lambda rank=rank: said[rank]}) for rank in (0, 1)]
    yield said
    for service in services:
        service.close()


def test_ranks_that_fit_pass(tmp_path: Path, answers: list[dict[str, Any]]) -> None:
    check_ranks(tmp_path, answer(1), 10.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lineage": "1" * 32}, "rank 1 belongs to another start of the server"),
        ({"rank": 0}, "rank 1 belongs to another start"),
        ({"shards": {"norm": None}}, "rank 1 holds no part of down"),
        ({"shards": answer(0)["shards"]}, "do not make up its model: down: index 0 of dimension 1 lies on two ranks"),
        ({"shards": {"down": {"pieces": 3}, "norm": None}}, "not the description of a shard"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(
    tmp_path: Path, answers: list[dict[str, Any]], change: dict[str, Any], message: str
) -> None:
    answers[1] |= change
    with pytest.raises(AttachError, match=message):
        check_ranks(tmp_path, answer(0), 10.0)


def test_a_trainer_of_whole_weights_refuses_parts() -> None:
    refuse_divided({"ranks": 1}, None)
    refuse_divided({}, None)
    with pytest.raises(AttachError, match=r"divided over 2 processes \(--tensor-parallel-size 2\)"):
        refuse_divided(answer(0), None)
    with pytest.raises(AttachError, match="says that it is rank 1"):
        refuse_divided(answer(1), 0)
