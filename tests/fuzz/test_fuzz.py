"""A little of `benchmarks/fuzz.py`: malformed input at every door, on the real parts."""

import os
import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from fuzz_bytes import Evil, Watch
from fuzz_targets import targets
from hypothesis import HealthCheck, given, settings

from worker.testing.redis_server import RedisServer

NAMES = ("QueueRead", "QueueDrain", "WeightsSocket", "ControlSocket", "Answers", "Record", "HeaderBytes")
NAMES += ("JournalFile", "JournalRecords", "Opinions", "PlantedRecords", "FeedbackBodies", "Exports")


@pytest.fixture(scope="module")
def doors(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with targets(redis_server.url, tmp_path_factory.mktemp("fuzz")) as found:
        yield {type(target).__name__: target for target in found}


def test_every_target_is_tested_here(doors: dict[str, Any]) -> None:
    assert sorted(doors) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_malformed_input_is_accounted_for_and_runs_nothing(doors: dict[str, Any], name: str) -> None:
    target, outcomes = doors[name], Counter[str]()

    @settings(max_examples=max(4, 60 // target.size), deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=target.cases)
    def run(case: Any) -> None:
        found = target.take(case)
        assert sum(found.values()) == target.size
        outcomes.update(found)

    with Watch() as seen:
        run()
    assert seen == [] and sum(outcomes.values()) >= 4


def test_the_watch_sees_what_it_must() -> None:
    with Watch() as seen:
        os.system("true")
        pickle.loads(pickle.dumps(Evil()))
    assert {"os.system", "pickle.find_class"} <= set(seen)
