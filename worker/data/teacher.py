"""What a teacher is shown: the conversation of a transcript, with what was said of the answer beside the question.

The teacher is the same weights. It is asked with the comment (or the demonstration) and then reads the very answer that
the student reads without: where the two expect different next tokens, there is something to learn
(`worker.trainer.losses.distillation`).

Must not know: torch, transformers.
Invariant: nothing but the text of one user message changes, the last before the answer.
"""

import json
from collections.abc import Sequence
from typing import Any

from producer.transcript import Transcript

Message = dict[str, Any]

COMMENT = "{question}\n\n{comment}"
"""In the user's own words, as if said at once: of eight wordings tried on a small model, what it followed most, and
what moved its other answers least. No words of ours: they would be of one language. DESIGN.md has the figures."""
DEMONSTRATION = "{question}\n\nThis is an example of a good answer:\n\n{answer}\n\nAnswer in your own words."
"""In the manner of arXiv 2601.19897, whose teacher is asked to answer itself after an example. Only this was tried."""


def needs_teacher(transcript: Transcript) -> bool:
    """Whether its loss compares with a teacher's."""
    return transcript.kind in ("comment", "distilled")


def shown(transcript: Transcript, messages: Sequence[Message]) -> list[Message]:
    """`messages`, which end with an answer, as the teacher is shown them. Where no user message comes before the answer
    (truncated away), they are as they were."""
    answer = messages[-1]
    asked = next((i for i in range(len(messages) - 2, -1, -1) if messages[i]["role"] == "user"), None)
    if asked is None:
        return list(messages)
    question = messages[asked]["content"]
    if transcript.comment is not None:
        text = COMMENT.format(question=question, comment=transcript.comment)
    else:
        text = DEMONSTRATION.format(question=question, answer=_text(answer))
    return [*messages[:asked], messages[asked] | {"content": text}, *messages[asked + 1 :]]


def _text(answer: Message) -> str:
    """All that an answer says, its tool calls as JSON."""
    parts = [answer.get("reasoning_content", ""), answer.get("content", "")]
    if calls := answer.get("tool_calls"):
        parts.append(json.dumps(calls, ensure_ascii=False))
    return "\n\n".join(part for part in parts if part)
