"""What /v1/feedback says of itself in /openapi.json.

Must not know: vLLM, Redis.
"""

from typing import Any

_ID = {
    "type": "string",
    "description": "The key of a kept completion, from its answer's header X-Tandem-Completion.",
}
OPINION: dict[str, Any] = {
    "title": "Opinion",
    "description": "What a user said of a kept completion: one or more of rating, correction and comment.",
    "type": "object",
    "required": ["id"],
    "additionalProperties": False,
    "properties": {
        "id": _ID,
        "rating": {
            "description": "true or 1: liked. false or -1: disliked. Between them: by so much.",
            "anyOf": [{"type": "boolean"}, {"type": "number", "minimum": -1, "maximum": 1}],
        },
        "correction": {
            "description": "The answer that should have been given: its text, or a message by the assistant.",
            "anyOf": [{"type": "string"}, {"type": "object"}],
        },
        "comment": {"type": "string", "description": "What should have been otherwise, such as: be shorter."},
        "user": {"type": "string", "description": "Who says it. A second rating by the same user replaces the first."},
    },
}
TRANSCRIPT: dict[str, Any] = {
    "title": "Transcript",
    "description": "A whole conversation to learn from; its fields are those of Producer.enqueue.",
    "type": "object",
    "required": ["messages"],
    "properties": {
        "id": {"type": "string", "description": "Of your choice; an id is trained once."},
        "messages": {"type": "array", "items": {"type": "object"}},
        "user": {"type": "string"},
    },
}
EXAMPLES: dict[str, Any] = {
    "thumbs down": {"value": {"id": "pAl9b1mYQ0uVZ5m3GJ5n2A", "rating": -1, "user": "u-17"}},
    "thumbs up": {"value": {"id": "pAl9b1mYQ0uVZ5m3GJ5n2A", "rating": True}},
    "a better answer": {"value": {"id": "pAl9b1mYQ0uVZ5m3GJ5n2A", "correction": "It closes at 18:00."}},
    "a comment": {"value": {"id": "pAl9b1mYQ0uVZ5m3GJ5n2A", "comment": "Say it in one sentence.", "user": "u-17"}},
    "a whole transcript": {
        "value": {
            "id": "chat-1042",
            "messages": [
                {"role": "user", "content": "When does the shop close?"},
                {"role": "assistant", "content": "At 18:00."},
            ],
        }
    },
}
STATE: dict[str, Any] = {
    "title": "FeedbackState",
    "type": "object",
    "properties": {
        "id": {"type": "string", "description": "Of the transcript; GET /v1/feedback/{id} says where it is."},
        "state": {"type": "string", "examples": ["queued", "started", "finished", "failed", "withdrawn"]},
        "version": {
            "description": "The version of the weights that contains it, once there is one.",
            "anyOf": [{"type": "integer"}, {"type": "null"}],
        },
        "reason": {"type": "string", "description": "Why it failed."},
        "also": {
            "type": "array",
            "items": {"type": "object"},
            "description": "Where several things were said: the same of the other transcripts.",
        },
    },
}
_ERROR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "The field that is wrong."},
                "code": {"type": "integer"},
            },
        }
    },
}
_QUEUED = {"id": "fb-3f1c", "state": "queued", "version": None}
_TRAINED = {"id": "fb-3f1c", "state": "finished", "version": 42}


def _content(schema: dict[str, Any], example: Any = None) -> dict[str, Any]:
    return {"application/json": {"schema": schema} | ({} if example is None else {"example": example})}


def _errors(**codes: str) -> dict[str, Any]:
    return {code[1:]: {"description": said, "content": _content(_ERROR)} for code, said in codes.items()}


_COMMON = {
    "_401": "The key of feedback is missing or wrong.",
    "_422": "A field is wrong; `param` names it.",
    "_503": "Redis is away or full; nothing was queued. Try again after Retry-After.",
}
SECURITY: list[dict[str, Any]] = [{"feedback": []}]
SCHEME: dict[str, Any] = {
    "type": "http",
    "scheme": "bearer",
    "description": "The key of feedback. With --api-key, send the API key here and this one as X-Feedback-Key.",
}
POST: dict[str, Any] = {
    "security": SECURITY,
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"anyOf": [OPINION, TRANSCRIPT]}, "examples": EXAMPLES}},
    },
    "responses": {
        "202": {"description": "It is queued, or was before.", "content": _content(STATE, _QUEUED)},
        **_errors(
            **_COMMON,
            _404="No completion is kept under this key.",
            _413="The body is too large.",
            _429="This user gives too much feedback; see Retry-After.",
        ),
    },
}
GET: dict[str, Any] = {
    "security": SECURITY,
    "responses": {
        "200": {"description": "Where it is.", "content": _content(STATE, _TRAINED)},
        **_errors(**_COMMON, _404="No such transcript."),
    },
}
