"""What a stack of matrices is: the one shape that says a parameter holds a mixture's experts.

Must not know: torch.
"""

from collections.abc import Sequence


def is_stack(shape: Sequence[int]) -> bool:
    """Whether a parameter is matrices on top of each other, [E, rows, cols], as transformers has experts. A depthwise
    convolution [C, 1, K] is not: what lies on top of each other there are vectors."""
    return len(shape) == 3 and min(shape[1:]) > 1
