"""The body of POST /v1/feedback: what it says, and which call of the producer that is.

Must not know: vLLM.
Invariants: a field that is not known, or says nothing that can be learnt, is refused by name; one call of the producer
for each thing that is said, and each can be repeated.
"""

from typing import Any, Literal

from producer import AsyncProducer
from producer.completions import is_key
from producer.errors import InvalidTranscriptError, UnknownCompletionError
from producer.outcomes import AsyncEnqueued
from producer.plain import as_text, listed, path
from producer.transcript import FIELDS, Transcript

What = Literal["correction", "rating"]
SAID: tuple[What, ...] = ("correction", "rating")
"""The first of these that a body has is the one whose transcript is answered."""
_KNOWN = ("id", *SAID, "user")


def read(body: dict[str, Any]) -> tuple[str, dict[What, Any]]:
    """(the completion's key, what is said of it). Raises InvalidTranscriptError, UnknownCompletionError."""
    for name, value in body.items():
        if name not in _KNOWN and value not in (None, "", [], {}):
            hint = f"is not known here. Known: {listed(_KNOWN)}; or give a whole transcript, with messages"
            raise InvalidTranscriptError(path("", name).lstrip("."), hint)
    if body.get("id") in (None, ""):
        raise InvalidTranscriptError("id", "is missing: give the key from the answer's header X-Tandem-Completion")
    key = as_text(body["id"], "id")
    said: dict[What, Any] = {name: body[name] for name in SAID if body.get(name) not in (None, "")}
    if not said:
        raise InvalidTranscriptError("rating", f"is missing: say {listed(SAID)} of the answer")
    if "correction" in said and "rating" in said:
        liked = said.pop("rating")
        if liked is True or (isinstance(liked, int | float) and liked > 0):
            raise InvalidTranscriptError("rating", "comes beside a correction, and says that the answer was liked")
    if not is_key(key):
        raise UnknownCompletionError(
            "no completion is kept under this id: give the key from the answer's header X-Tandem-Completion, not the"
            " completion's own id"
        )
    return key, said


async def opinion(producer: AsyncProducer, key: str, said: dict[What, Any], user: str | None) -> AsyncEnqueued:
    """Queue what is said; what became of the first. Raises the producer's errors."""
    if "correction" in said:
        return await producer.correct(key, said["correction"], user=user)
    return await producer.rate(key, said["rating"], user=user)


async def transcript(producer: AsyncProducer, body: dict[str, Any]) -> AsyncEnqueued:
    """Queue a whole transcript. Raises the producer's errors."""
    fields = {name: value for name, value in body.items() if name != "user"}
    whole = Transcript.from_dict(fields)
    return await producer.enqueue(**{name: getattr(whole, name) for name in FIELDS if name != "chosen"})
