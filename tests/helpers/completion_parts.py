"""Recorded completions, as a server would keep them."""

from typing import Any

from hypothesis import strategies as st

from producer.completions import Completion

QUESTION = [{"role": "user", "content": "Who wrote Faust?"}]
ANSWER = {"role": "assistant", "content": "Goethe."}


def completion(**changes: Any) -> Completion:
    """One with everything that a record can hold; `changes` are fields of it."""
    fields: dict[str, Any] = {
        "id": "chatcmpl-7",
        "created": 1_795_000_000.5,
        "model": "tiny",
        "messages": QUESTION,
        "answer": ANSWER,
        "token_ids": [5, 6, 7],
        "logprobs": [-0.5, -1.25, 0.0],
        "versions": (3, 4),
        "user": "u7",
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    return Completion(**fields | changes)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
"""Values of every type, valid or not."""
