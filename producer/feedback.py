"""What users said of an answer: a rating of it, the answer that they wrote instead, or a comment.

    demonstration   messages                                an answer to imitate
    distilled       messages, method "distill"              the same, from the model that has been shown it
    liked           messages, rating > 0                    an answer to imitate, as much as it was liked
    disliked        messages, rating < 0                    an answer to give no more
    correction      messages, chosen, rejected              an answer to prefer to another
    comment         messages, comment                       an answer to give as if the comment had been said before it

Must not know: Redis, RQ.
Invariants: validation raises `InvalidTranscriptError` only, which quotes no text; normalising is idempotent.
"""

import math
from typing import Any, Literal

from .errors import InvalidTranscriptError
from .messages import normalise, says_something
from .plain import PlainCopy, kind
from .reasoning import unfit

Kind = Literal["demonstration", "distilled", "liked", "disliked", "correction", "comment"]
"""What a transcript says of the turns it trains."""

Method = Literal["imitate", "distill"]
"""How a demonstration is learnt: by its likelihood, or from the model itself, once it has been shown it."""

MAX_COMMENT = 8192
"""Characters of a comment."""


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


def as_comment(value: Any) -> str | None:
    """What a user said of the answer, without the space around it. Raises InvalidTranscriptError."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidTranscriptError("comment", f"must be the text that was said of the answer, not {kind(value)}")
    text = str.__str__(value).strip()
    if not text:
        raise InvalidTranscriptError("comment", "is empty; leave it out if nothing was said")
    if len(text) > MAX_COMMENT:
        problem = f"has {len(text)} characters, the limit is {MAX_COMMENT}: shorten it"
        raise InvalidTranscriptError("comment", problem)
    return text


def as_method(value: Any) -> Method:
    """How a demonstration is learnt. Raises InvalidTranscriptError."""
    if value is None or value == "imitate":
        return "imitate"
    if value != "distill":
        raise InvalidTranscriptError("method", 'must be "imitate" (the default) or "distill"')
    return "distill"


def check_alone(*, rating: Any, rejected: Any, comment: Any, method: Method) -> None:
    """A transcript says one thing of its answer. Raises InvalidTranscriptError."""
    if rejected is not None and rating is not None:
        raise InvalidTranscriptError("rating", "comes beside rejected, which says already which answer is better")
    if comment is not None and (rating is not None or rejected is not None):
        other = "rating" if rating is not None else "rejected"
        raise InvalidTranscriptError("comment", f"comes beside {other}: send two transcripts, one for each")
    if method == "distill" and not (rating is None and rejected is None and comment is None):
        problem = '"distill" is for demonstrations: leave it out beside rating, rejected or comment'
        raise InvalidTranscriptError("method", problem)


def check_asked(messages: list[dict[str, Any]], turns: list[int], field: str) -> None:
    """There is a question before each of these answers, beside which a teacher is told more: see
    `worker.data.teacher`. Raises InvalidTranscriptError."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    if turns[0] < first:
        raise InvalidTranscriptError(field, "needs a user message before the answer: the model is shown it beside that")


def kind_of(rating: float | None, rejected: Any, comment: str | None = None, method: Method = "imitate") -> Kind:
    """The kind, by the fields."""
    if rejected is not None:
        return "correction"
    if comment is not None:
        return "comment"
    if method == "distill":
        return "distilled"
    return "demonstration" if rating is None else "liked" if rating > 0 else "disliked"
