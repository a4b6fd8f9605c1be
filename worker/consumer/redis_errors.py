"""Whose fault an error of Redis is: Redis' own, and it passes; or that of one job's keys.

Must not know: RQ.
"""

import re
from collections.abc import Mapping
from typing import Any

import redis
from redis.client import Pipeline

from producer.connection import own_words
from worker.consumer.pipelines import UPDATE, WRONG_TYPE

__all__ = ["execute", "own_words", "retryable"]

_AWAY = (redis.ConnectionError, redis.TimeoutError, redis.exceptions.OutOfMemoryError, redis.ReadOnlyError)
_REFUSES = re.compile(r"(?:^|: -)(?:OOM|READONLY|MISCONF|NOREPLICAS|MASTERDOWN|UNBLOCKED|BUSY) ")


def retryable(error: Exception) -> bool:
    """Whether Redis is away, full, busy or takes no writes: nobody's fault here, and ended one day. Wait and go on.

    redis-py 8.1 has a class of its own for some of these only, and for none that a script of Redis met ("Error running
    script ...: -OOM command not allowed ..."). MISCONF: the last save failed, the disk is full, say. BUSY: a script
    of somebody's is running.
    """
    return isinstance(error, _AWAY) or (
        isinstance(error, redis.ResponseError) and bool(_REFUSES.search(own_words(error)))
    )


def execute(pipe: Pipeline, owned: Mapping[str, str]) -> tuple[list[Any], dict[str, str]]:
    """EXEC, where a job whose keys are of a wrong type must not hold up the others.

    A command that fails inside EXEC does not undo the rest. owned: key -> the job it belongs to. Returns the answers,
    and per job with a broken key that key; an error on any other key is raised.
    """
    commands = [arguments for arguments, _ in pipe.command_stack]
    answers = pipe.execute(raise_on_error=False)
    broken: dict[str, str] = {}
    for command, answer in zip(commands, answers, strict=True):
        if command[:2] == ("EVAL", UPDATE) and isinstance(answer, list):
            keys = command[3 : 3 + int(command[2])]
            broken |= {owned[key]: key for key, kind in zip(keys, answer, strict=True) if kind.decode() in WRONG_TYPE}
        elif isinstance(answer, Exception):
            if command[1] not in owned:
                raise answer
            broken[owned[command[1]]] = command[1]
    return answers, broken
