"""Parameter groups as plain data."""

from collections.abc import Sequence
from typing import Any


def plain_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups with numbers in place of parameters, counted through, as torch's own optimizers save them.

    Without "shards", which belong to this process."""
    plain, start = [], 0
    for group in groups:
        count = len(group["params"])
        plain.append(
            {k: v for k, v in group.items() if k not in ("params", "shards")}
            | {"params": list(range(start, start + count))}
        )
        start += count
    return plain
