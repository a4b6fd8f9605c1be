"""The candidates of a Triton kernel, compiled side by side before the autotuner times them one after the other.

    with parallel_compile() as compiled:
        ...  # forward and backward: what they tune is compiled by as many threads as there are CPUs
    compiled.candidates, compiled.threads

The autotuner compiles a candidate when it is about to time it, one at a time: most of a cold warm-up. Here the first
timing of a kernel compiles all its candidates. Private parts of Triton, checked on 3.6 and read on 3.9:
`Autotuner._bench`, `.nargs`, `.prune_configs`, and `AsyncCompileMode`. Where they are not there, a line in the log says
so, and kernels are compiled one after the other.

Must not know: the server.
Invariants: nothing is launched by compiling, and the autotuner chooses by its own timings, as without this. Outside of
the context Triton is as it was.
"""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)
MOST_THREADS = 32


@dataclass
class Compiled:
    """What was compiled side by side."""

    threads: int
    kernels: int = 0
    candidates: int = 0

    def __str__(self) -> str:
        return f"{self.candidates} candidates of {self.kernels} kernels were compiled by {self.threads} threads"


@contextmanager
def parallel_compile() -> Iterator[Compiled]:
    """Until the end of the context, in this process."""
    compiled = Compiled(min(MOST_THREADS, len(os.sched_getaffinity(0))))
    try:
        from triton.runtime._async_compile import AsyncCompileMode
        from triton.runtime.autotuner import Autotuner

        bench, _ = Autotuner._bench, Autotuner.prune_configs
    except (ImportError, AttributeError) as error:
        log.warning("this Triton compiles kernels one after the other, and the warm-up takes longer: %s", error)
        yield compiled
        return
    tuned: int | None = None  # the arguments of the call that is tuned now: tuning is never nested

    def bench_all_compiled(self: Any, *arguments: Any, config: Any, **meta: Any) -> Any:
        nonlocal tuned
        if tuned != id(self.nargs):
            tuned = id(self.nargs)
            candidates = self.prune_configs(meta)
            # A candidate that does not compile fails when it is timed, as ever.
            with AsyncCompileMode(pool, ignore_errors=True):
                for candidate in candidates:
                    self.fn.run(*arguments, **(meta | candidate.all_kwargs() | {"warmup": True}))
            compiled.kernels += 1
            compiled.candidates += len(candidates)
        return bench(self, *arguments, config=config, **meta)

    with ThreadPoolExecutor(compiled.threads, thread_name_prefix="compile") as pool:
        Autotuner._bench = bench_all_compiled
        try:
            yield compiled
        finally:
            Autotuner._bench = bench
