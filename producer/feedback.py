"""What users said of an answer: a rating of it, or the answer that they wrote instead.

    demonstration   messages                                an answer to imitate
    liked           messages, rating > 0                    an answer to imitate, as much as it was liked
    disliked        messages, rating < 0                    an answer to give no more
    correction      messages, chosen, rejected              an answer to prefer to another

Must not know: Redis, RQ.
Invariants: validation raises `InvalidTranscriptError` only, which quotes no text; normalising is idempotent.
"""

import math
from typing import Any, Literal

from .errors import InvalidTranscriptError
from .messages import normalise, says_something
from .plain import PlainCopy, kind
from .reasoning import unfit

Kind = Literal["demonstration", "liked", "disliked", "correction"]
"""What a transcript says of the turns it trains."""


def as_rating(value: Any) -> float | None:
    """A rating from -1 to 1, but not 0; true and false are thumbs up and down. Raises InvalidTranscriptError."""
    if value is None or isinstance(value, bool):
        return None if value is None else 1.0 if value else -1.0
    if not isinstance(value, int | float):
        raise InvalidTranscriptError("rating", f"must be true, false, or a number from -1 to 1, not {kind(value)}")
    if not -1 <= value <= 1 or not math.isfinite(value):
        raise InvalidTranscriptError("rating", "must lie between -1 and 1; scale it: of five stars, 1 is -1 and 5 is 1")
    if value == 0:
        raise InvalidTranscriptError("rating", "0 is neither liked nor disliked: leave the transcript out")
    return float(value)


def as_answer(value: Any, where: str, copy: PlainCopy) -> dict[str, Any]:
    """One message by the assistant in its one form; a string is its content. Raises InvalidTranscriptError."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    message = copy({"content": value} if isinstance(value, str) else value, where)
    if not isinstance(message, dict) or message.get("role", "assistant") != "assistant":
        raise InvalidTranscriptError(where, "must be one answer: its text, or one message by the assistant")
    try:
        (answer,), left_out = normalise([{"role": "assistant"} | message], copy)
    except InvalidTranscriptError as error:
        raise InvalidTranscriptError(error.field.replace("messages[0]", where, 1), error.problem) from None
    if left_out:
        raise InvalidTranscriptError(f"{where}.weight", "is 0: leave the answer out, or give it weight 1")
    if not says_something(answer):
        raise InvalidTranscriptError(where, "is empty; leave it out if there was no such answer")
    if problem := unfit(answer["content"]):
        raise InvalidTranscriptError(f"{where}.content", problem)
    return answer


def pair(
    messages: list[dict[str, Any]], chosen: Any, rejected: Any, copy: PlainCopy
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """(the conversation with the chosen answer last, the rejected one or None). Raises InvalidTranscriptError.

    Without `chosen`, the last of `messages` is the answer that was chosen.
    """
    if rejected is None:
        if chosen is not None:
            raise InvalidTranscriptError("chosen", "comes without rejected: put the answer into messages, as the last")
        return messages, None
    if chosen is not None:
        messages = [*messages, as_answer(chosen, "chosen", copy)]
        if len(messages) > 1 and messages[-2]["role"] == "assistant":
            raise InvalidTranscriptError("messages", "end with an answer; give the conversation up to it")
    elif messages[-1]["role"] != "assistant":
        raise InvalidTranscriptError("chosen", "is missing: give the better answer as chosen, or as the last message")
    answer = as_answer(rejected, "rejected", copy)
    if answer == messages[-1]:
        raise InvalidTranscriptError("rejected", "is the very answer that was chosen; there is nothing to prefer")
    return messages, answer


def kind_of(rating: float | None, rejected: Any) -> Kind:
    """The kind, by the fields."""
    if rejected is not None:
        return "correction"
    return "demonstration" if rating is None else "liked" if rating > 0 else "disliked"
