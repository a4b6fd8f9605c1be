"""The optimizer's errors."""

from producer.errors import TandemError


class ApolloError(TandemError):
    """A parameter, gradient or state area that the optimizer cannot work with; the message names it."""


class NonFiniteGradientError(ApolloError):
    """A gradient holds inf or NaN, or its norm overflows fp32.

    `parameter` is the name of the first such parameter. In a burst (`step()`) nothing at all has changed; in
    streaming the matrices applied before this one have.
    """

    def __init__(self, parameter: str) -> None:
        super().__init__(f"the gradient of {parameter} is not finite: this batch cannot be applied")
        self.parameter = parameter


NonFiniteGradient = NonFiniteGradientError
"""The former name."""
