"""Fewer, longer Redis commands: what was queued member by member on one key goes out as one command.

Must not know: RQ, what the keys mean.
"""

from typing import Any

from redis.client import Pipeline

_SHARED = ("HSET", "SADD", "ZADD", "ZREM", "SREM", "EXPIRE")


def merge(pipe: Pipeline, first: int = 0) -> None:
    """From command `first` on, send as one what RQ queued job by job on the same key: ZADDs to a registry, say.

    Nearly half the time of a batch of no-ops went into packing and parsing them. Within one begin or settle RQ only
    adds to a key or only removes from it, so that order does not matter; commands with flags are left alone.
    """
    kept: dict[Any, tuple[list[Any], dict[str, Any]]] = {}
    for position, (arguments, options) in enumerate(pipe.command_stack[first:]):
        name = arguments[0]
        place: Any = position
        if name == "DEL":
            place = ("DEL",)
        elif name in _SHARED and arguments[2] not in (b"NX", b"XX"):
            place = tuple(arguments[:2])
        if place in kept and name != "EXPIRE":
            kept[place][0].extend(arguments[len(place) :])
        else:
            kept[place] = (list(arguments), options)
    pipe.command_stack[first:] = [(tuple(arguments), options) for arguments, options in kept.values()]
