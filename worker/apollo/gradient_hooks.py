"""Gradients taken from their parameters as a backward pass makes them, and handed on in buckets."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

Pairs = list[tuple[Tensor, Tensor]]
"""(parameter, gradient)"""


@contextmanager
def collecting(
    parameters: Sequence[Tensor], bucket_bytes: int, use: Callable[[Pairs], None], size: Callable[[Tensor], int]
) -> Iterator[None]:
    """Inside, gradients leave `parameters` as they come, and go to `use` when they are `bucket_bytes` or more; what is
    left goes at the end. `use` must not keep the list. size: bytes that the gradient of a parameter counts for."""
    bucket: Pairs = []

    def flush() -> None:
        use(bucket)
        bucket.clear()

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        bucket.append((parameter, parameter.grad))
        parameter.grad = None
        if sum(size(parameter) for parameter, _ in bucket) >= bucket_bytes:
            flush()

    hooks = [parameter.register_post_accumulate_grad_hook(take) for parameter in parameters]
    try:
        yield
        flush()
    finally:
        for hook in hooks:
            hook.remove()
