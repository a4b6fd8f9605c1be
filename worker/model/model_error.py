"""The error of a model that cannot be trained on this device.

Must not know: torch.
"""

from producer.errors import TandemError


class ModelError(TandemError):
    """A kernel package is missing or of a version that cannot be used, or a model does something that packed rows, or
    their kernels, do not know."""
