"""What a device has computed for a step, in seconds that it would take with nothing else to do.

A GPU that also serves gives each process turns, and a trainer that launches many small kernels does not fill its own:
the time that passes until gradients are there says little of what they took from the server. The tokens of the passes
do.
Must not know: the server.
Invariant: on a GPU a token costs what it costs in the longest row, which keeps the device busy: at least what it takes
in a shorter one, where no layer is computed twice. On a CPU it costs what it has cost in the last step.
"""

import math

FORWARD = 1 / 3
"""Of a pass forward and backward, in products."""
PROMPT = 1 / 4
"""Of a GPU's longest row, whose layers are computed twice forward: what a server does for a prompt. A CPU computes
them once, in wider types than a server's."""


class DeviceTime:
    """Of one trainer. Until `learn`, nothing is known."""

    def __init__(self) -> None:
        self._token_s = 0.0
        self._tokens = 0.0  # of passes forward and backward; of one without the other, its part

    def learn(self, tokens: int, seconds: float) -> None:
        """A pass forward and backward over a row of `tokens` tokens, all kernels compiled, took `seconds`."""
        self._token_s = seconds / tokens

    @property
    def prompt_token_s(self) -> float:
        """Seconds that the device needs for a token of a server's prompt; 0 where nothing is known."""
        return PROMPT * self._token_s

    def begin(self) -> None:
        """A step begins."""
        self._tokens = 0.0

    def forward(self, tokens: int) -> None:
        """A pass forward over a row of `tokens` tokens."""
        self._tokens += FORWARD * tokens

    def backward(self, tokens: int) -> None:
        """A pass backward."""
        self._tokens += (1 - FORWARD) * tokens

    def took(self, seconds: float) -> None:
        """All since `begin` took `seconds`: what a token costs, where no warm-up has said so."""
        if self._tokens:
            self._token_s = seconds / self._tokens

    def seconds(self) -> float:
        """Since `begin`; infinite where nothing is known."""
        return self._tokens * self._token_s if self._token_s else math.inf
