"""What goes out on a pipeline, and what comes back: fewer, longer commands; and whose fault an error is.

Must not know: RQ, what the keys mean.
"""

import re
from collections.abc import Mapping
from typing import Any

import redis
from redis.client import Pipeline

_AWAY = (redis.ConnectionError, redis.TimeoutError, redis.exceptions.OutOfMemoryError, redis.ReadOnlyError)
_REFUSES = re.compile(r"(?:^|: -)(?:OOM|READONLY|MISCONF|NOREPLICAS|MASTERDOWN|UNBLOCKED) ")


def own_words(error: Exception) -> str:
    """What Redis said. redis-py puts the command in front of it, whose arguments do not belong in a log."""
    return str(error).rpartition(" of pipeline caused error: ")[2]


def retryable(error: Exception) -> bool:
    """Whether Redis is away, full or takes no writes: nobody's fault here, and ended one day. Wait and go on.

    redis-py 8.1 has a class of its own for some of these only, and for none that a script of Redis 6.2 met ("Error
    running script ...: -OOM command not allowed ..."). MISCONF: the last save failed, the disk is full, say.
    """
    return isinstance(error, _AWAY) or (
        isinstance(error, redis.ResponseError) and bool(_REFUSES.search(own_words(error)))
    )


def execute(pipe: Pipeline, owned: Mapping[str, str]) -> tuple[list[Any], dict[str, str]]:
    """EXEC, where a job whose keys are of a wrong type must not hold up the others.

    A command that fails inside EXEC does not undo the rest. owned: key -> the job it belongs to. Returns the answers,
    and per job with a broken key that key; an error on any other key is raised.
    """
    names = [command[0][1] for command in pipe.command_stack]
    answers = pipe.execute(raise_on_error=False)
    broken: dict[str, str] = {}
    for key, answer in zip(names, answers, strict=True):
        if isinstance(answer, Exception):
            if key not in owned:
                raise answer
            broken[owned[key]] = key
    return answers, broken


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
