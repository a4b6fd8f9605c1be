"""An error as it may be kept in Redis and logged: without what it may quote of a transcript.

Must not know: Redis, RQ, torch.
"""

import traceback

from producer.errors import TandemError


def told(error: BaseException) -> str:
    """An error as it may be kept and logged. Ours: the sentence. Any other: its frames and type, and its causes', but
    never the message, which may quote a transcript (a KeyError, a UnicodeEncodeError)."""
    if isinstance(error, TandemError):
        return f"{type(error).__name__}: {error}"
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    parts = ["Traceback (most recent call last):"]
    for one in reversed(chain):
        parts += ["".join(traceback.format_tb(one.__traceback__)).rstrip(), type(one).__qualname__]
    return "\n".join(filter(None, parts)) + " (message withheld: it may quote the transcript)"
