"""Parameter groups as plain data, and back."""

from collections.abc import Sequence
from typing import Any

from worker.apollo.errors import ApolloError


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


def check_groups(groups: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> None:
    """Raises `ApolloError` if `saved` are not as many parameters, group by group."""
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        raise ApolloError("the saved optimizer has other parameter groups than this one")


def load_groups(groups: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> None:
    """Everything in `saved` but the parameters, into `groups`."""
    for group, plain in zip(groups, saved, strict=True):
        group.update({k: v for k, v in plain.items() if k != "params"})
