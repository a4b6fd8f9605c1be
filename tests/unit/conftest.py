"""What several rooms' tests need. torch is imported where it is used: the producer's tests run without it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def room(tiny_model: Path) -> Iterator[Any]:
    """A trainer on a tiny model, and its builder; who uses it leaves it as it was."""
    from few_words import open_room

    with open_room(tiny_model) as made:
        yield made
