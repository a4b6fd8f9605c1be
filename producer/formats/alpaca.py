"""Alpaca's instructions: {"instruction", "input", "output", "system", "history"}."""

from typing import Any

from .. import users
from ..errors import InvalidTranscriptError
from ..plain import as_text
from . import ratings, sharegpt
from .record import Record


def read(value: dict[str, Any]) -> Record:
    said = {"role": "assistant", "content": as_text(value.get("output"), "output")}
    fields = {"messages": [*asked(value), said], "train_on": "last"} | sharegpt.tools(value)
    return Record(fields=fields, id=value.get("id"), rating=ratings.beside(value), users=users.beside(value))


def asked(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation up to the answer. The input stands below its instruction, after an empty line."""
    found = sharegpt.system(value)
    history = value.get("history") or []
    if not isinstance(history, list):
        raise InvalidTranscriptError("history", "must be a list of pairs [question, answer]")
    for index, pair in enumerate(history):
        where = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise InvalidTranscriptError(where, "must be a pair [question, answer]")
        found += [
            {"role": "user", "content": as_text(pair[0], f"{where}[0]")},
            {"role": "assistant", "content": as_text(pair[1], f"{where}[1]")},
        ]
    instruction = as_text(value.get("instruction"), "instruction")
    given = value.get("input")
    text = f"{instruction}\n\n{as_text(given, 'input')}" if given else instruction
    return [*found, {"role": "user", "content": text}]
