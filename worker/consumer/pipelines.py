"""What goes out on a pipeline, rewritten: fewer, longer commands; and hashes changed only where they exist.

Must not know: RQ.
"""

from collections.abc import Collection
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


UPDATE = """
local kinds, at = {}, 1
for i, key in ipairs(KEYS) do
  local count, kind = tonumber(ARGV[at]), redis.call('TYPE', key).ok
  if kind == 'hash' then redis.call('HSET', key, unpack(ARGV, at + 1, at + count)) end
  kinds[i], at = kind, at + 1 + count
end
return kinds
"""
"""HSET for hashes that exist. Answers what each key is: hash, none, or a wrong type."""

WRONG_TYPE = ("string", "list", "set", "zset", "stream")


def update_only(pipe: Pipeline, keys: Collection[str], first: int = 0) -> None:
    """From command `first` on, make of all HSETs on `keys` one that changes them only where they exist.

    A job that Redis lost must not come back as a hash with a status and no transcript: nobody could read it, and its id
    would count as known.
    """
    fields: dict[str, list[Any]] = {}
    kept: list[Any] = []
    place = None
    for arguments, options in pipe.command_stack[first:]:
        if arguments[0] == "HSET" and arguments[1] in keys:
            place = len(kept) if place is None else place
            fields.setdefault(arguments[1], []).extend(arguments[2:])
        else:
            kept.append((arguments, options))
    if place is None:
        return
    values = [item for pairs in fields.values() for item in (len(pairs), *pairs)]
    kept.insert(place, (("EVAL", UPDATE, len(fields), *fields, *values), {}))
    pipe.command_stack[first:] = kept
