"""The tokens that the engine samples for a request, and their log-probabilities, beside the answer made of them.

A request that is kept carries a `Samples` in a context variable from the middleware to the call that hands it to the
engine (private_api.watch_samples). Must not know: vLLM, Redis.
Invariants: what the client gets is not changed; a request that is handed to the engine in more than one call (tools
that the server runs, beam search) has no tokens of its own and is not kept.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

LEAST = -9999.0
"""For a log-probability of minus infinity, as in vLLM's own answers."""


class Samples:
    """Tokens and log-probabilities by choice.

    logprobs: whether the engine's are those of the model itself; others are not taken. wanted: says, once the request's
    body has been read, whether the request is kept.
    """

    def __init__(self, logprobs: bool, wanted: Callable[[], bool]) -> None:
        self.logprobs = logprobs
        self.calls = 0
        self._wanted = wanted
        self._tokens: dict[int, list[int]] = {}
        self._logprobs: dict[int, list[float] | None] = {}

    def begin(self) -> bool:
        """The request is handed to the engine: whether to say what that samples for it."""
        self.calls += 1
        return self.calls == 1 and self._wanted()

    def take(self, index: int, tokens: Sequence[int], logprobs: Sequence[Any] | None, *, more: bool) -> None:
        """What the engine said of one choice. more: only what is new, else all so far.

        logprobs: for each token {token: an object with `logprob`}, or None.
        """
        if not more or index not in self._tokens:
            self._tokens[index], self._logprobs[index] = [], [] if self.logprobs else None
        self._tokens[index].extend(tokens)
        known = self._logprobs[index]
        if known is None:
            return
        found = [at.get(token) for token, at in zip(tokens, logprobs or (), strict=False)]
        if len(found) != len(tokens) or None in found:
            self._logprobs[index] = None
        else:
            known.extend(max(float(one.logprob), LEAST) for one in found)

    def of(self, index: int) -> tuple[list[int], list[float] | None]:
        """(tokens, log-probabilities or None) of a choice."""
        return self._tokens.get(index, []), self._logprobs.get(index)


CURRENT: ContextVar[Samples | None] = ContextVar("tandem_samples", default=None)
"""That of the request which is being handled, where it may be kept."""
