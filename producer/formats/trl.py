"""TRL's data sets: prompts with completions, rated ones (KTO), and preference pairs; texts or conversations.

A plain prompt becomes what the user said, and a plain completion the answer, without the white space around it.
Pairs are read as LLaMA-Factory and UltraFeedback write them too: with an instruction, a question or conversations in
place of the prompt, or as two whole conversations.
"""

from typing import Any

from .. import users
from ..errors import InvalidTranscriptError
from ..plain import kind
from . import alpaca, chat, ratings, sharegpt
from .record import Record, differ


def read(value: dict[str, Any]) -> Record:
    """{"prompt", "completion"} and perhaps a label: true for liked, false for disliked."""
    asked = sharegpt.system(value) + _asked(value["prompt"], "prompt")
    said = _said(value["completion"], "completion")
    return _record(value, chat.answered(asked, said, "completion"))


def read_pair(value: dict[str, Any]) -> Record:
    """{"prompt", "chosen", "rejected"}."""
    better, worse = _said(value["chosen"], "chosen"), _said(value["rejected"], "rejected")
    whole = [said[0].get("role") != "assistant" for said in (better, worse)]
    if any(whole):  # each is a conversation of its own, and both begin with the prompt
        if not all(whole):
            raise InvalidTranscriptError("rejected", "begins with another role than chosen; send both in one form")
        same = next((i for i, (a, b) in enumerate(zip(better, worse, strict=False)) if a != b), None)
        if same is None:
            same = min(len(better), len(worse))
        asked, better, worse = better[:same], better[same:], worse[same:]
        if not asked or not better or not worse:
            raise InvalidTranscriptError("chosen", "and rejected must be one conversation with two different answers")
    else:
        asked = _prompt(value)
    differ(better, worse)
    return _record(value, chat.answered(asked, better, "chosen"), rejected=worse)


def _record(value: dict[str, Any], fields: dict[str, Any], rejected: list[Any] | None = None) -> Record:
    fields |= sharegpt.tools(value)
    if isinstance(value.get("chat_template_kwargs"), dict):
        fields["chat_template_kwargs"] = value["chat_template_kwargs"]
    return Record(
        fields=fields, id=value.get("id"), rating=ratings.beside(value), rejected=rejected, users=users.beside(value)
    )


def _prompt(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation before a pair's two answers, in whichever field it is."""
    if value.get("conversations") is not None:
        return sharegpt.turns(value, "conversations")
    if value.get("instruction") is not None:
        return alpaca.asked(value)
    for name in ("prompt", "question"):
        if value.get(name) is not None:
            return sharegpt.system(value) + _asked(value[name], name)
    raise InvalidTranscriptError("prompt", "is missing: chosen and rejected are answers, and to what is not said")


def _asked(value: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    return _turns(value, where)


def _said(value: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value.strip()}]
    return _turns([value] if isinstance(value, dict) else value, where)


def _turns(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InvalidTranscriptError(where, f"must be a text or a list of messages, not {kind(value)}")
    return [sharegpt.turn(item, f"{where}[{index}]") for index, item in enumerate(value)]
