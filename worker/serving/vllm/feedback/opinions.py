"""The body of POST /v1/feedback: what it says, and which calls of the producer that is.

Must not know: vLLM.
Invariants: a field that is not known, or says nothing that can be learnt, is refused by name; everything that is said
is checked before anything is queued; each thing said is a transcript of its own, and saying it again changes nothing.
"""

from typing import Any

from producer import AsyncProducer, users
from producer.completions import is_key
from producer.errors import InvalidTranscriptError, UnknownCompletionError
from producer.opinions import Opinion
from producer.outcomes import AsyncEnqueued
from producer.plain import as_text, listed, path
from producer.transcript import FIELDS, Transcript

SAID = {"correction": Opinion.correction, "comment": Opinion.comment, "rating": Opinion.rating}
"""What may be said. Of several, the first in this order is the one whose transcript is answered first."""
_KNOWN = ("id", *SAID, "user")


def read(body: dict[str, Any], user: str | None) -> tuple[str, list[Opinion]]:
    """(the completion's key, what is said of it). Raises InvalidTranscriptError, UnknownCompletionError."""
    for name, value in body.items():
        if name not in _KNOWN and value not in (None, "", [], {}):
            hint = f"is not known here. Known: {listed(_KNOWN)}; or give a whole transcript, with messages"
            raise InvalidTranscriptError(path("", name).lstrip("."), hint)
    if body.get("id") in (None, ""):
        raise InvalidTranscriptError("id", "is missing: give the key from the answer's header X-Tandem-Completion")
    key = as_text(body["id"], "id")
    given = {name: body[name] for name in SAID if body.get(name) not in (None, "")}
    if not given:
        raise InvalidTranscriptError("rating", f"is missing: say one of {listed(SAID)}")
    said = [SAID[name](value, user) for name, value in given.items()]
    if "correction" in given and any(one.kind == "rating" and one.value > 0 for one in said):
        raise InvalidTranscriptError("rating", "comes beside a correction, and says that the answer was liked")
    if not is_key(key):
        raise UnknownCompletionError(
            "no completion is kept under this id: give the key from the answer's header X-Tandem-Completion, not the"
            " completion's own id"
        )
    return key, said


async def say(producer: AsyncProducer, key: str, said: list[Opinion]) -> list[AsyncEnqueued]:
    """Queue what is said. Raises the producer's errors; what came before the one that failed is queued."""
    return [await producer.say(key, opinion) for opinion in said]


async def hand_in(producer: AsyncProducer, body: dict[str, Any], user: str | None) -> list[AsyncEnqueued]:
    """Queue a whole transcript; its user goes into meta, where `tandem forget` looks. Raises the producer's errors."""
    whole = Transcript.from_dict({name: value for name, value in body.items() if name != "user"})
    fields = {name: getattr(whole, name) for name in FIELDS if name != "chosen"}
    if user is not None:
        fields["meta"] = users.into(whole.meta, [user])
    return [await producer.enqueue(**fields)]
