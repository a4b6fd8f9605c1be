"""The error of attaching: what the server shares and what the trainer needs do not fit."""

from producer.errors import TandemError


class AttachError(TandemError):
    """The server's weights cannot be trained by this process; says which parameter or flag, and what to do."""
