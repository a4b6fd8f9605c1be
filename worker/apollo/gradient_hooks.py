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


class OneBehind:
    """Buckets on their way to `use`: one that `before` says is still changing is used when the next one has come.

    before: is given each first, and returns None, or what has to be called before the bucket is used.
    """

    def __init__(self, before: Callable[[Pairs], Callable[[], None] | None], use: Callable[[Pairs], None]) -> None:
        self._before, self._use = before, use
        self._waiting: tuple[Pairs, Callable[[], None]] | None = None

    def give(self, bucket: Pairs) -> None:
        """The next one. The list is not kept."""
        ready = self._before(bucket) if bucket else None
        self.finish()
        if ready is None:
            self._use(bucket)
        else:
            self._waiting = (list(bucket), ready)

    def finish(self) -> None:
        """Use what waits."""
        if self._waiting is not None:
            (bucket, ready), self._waiting = self._waiting, None
            ready()
            self._use(bucket)
