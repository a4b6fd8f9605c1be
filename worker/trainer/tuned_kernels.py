"""Kernels that run as a table says, without the autotuner's candidates; what the table does not know is tuned as ever.

    table = shipped_table(device)        # None, with a line in the log, where there is none for this card and Triton
    with tuned_kernels(table) as tuned:
        ...                              # forward and backward
    tuned.known, tuned.timed             # how many kernels came from the table, and how many were tuned here
    tuned.chosen                         # both, as (kernel, source, key, options): what a table is made of

A cold warm-up compiles one candidate of a kernel instead of ten, and times none. Why not fla's own store of
configurations (FLA_CONFIG_DIR): it names a kernel by its function alone, looks at neither source nor Triton's version,
raises where a configuration does not compile, and leaves out the kernels that fla tunes by Triton's own decorator.
Parts of Triton that are not its interface, checked on 3.6 and 3.9: `Autotuner.run`, `.cache`, `.keys`, `.arg_names`,
`.nargs`, `.prune_configs`, `.base_fn`, `JITFunction.cache_key`. Where they are not there, a line in the log says so.

Must not know: the server.
Invariants: a kernel runs by one of its own candidates, whatever a table says; one that does not compile or launch is
tuned instead, with a line in the log. Outside of the context Triton is as it was, but keeps what was chosen.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from worker.trainer.tuned_table import SHIPPED, Card, Key, Options, Table, TableError, is_scalar, read, table_for

log = logging.getLogger(__name__)


@dataclass
class Tuned:
    """What was chosen for kernels that have several candidates; one with two keys counts as two."""

    table: Table | None
    known: int = 0
    timed: int = 0
    chosen: list[tuple[str, str, Key, Options]] = field(default_factory=list)
    other_sources: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        if self.table is None:
            return f"{self.timed} kernels were tuned"
        known = f"{self.known} of {self.known + self.timed} kernels run as tuned on {self.table.card.name}"
        return known + (f", {self.timed} were tuned here" if self.timed else "")

    def note(self, kernel: str, source: str, key: Key, options: Options, *, known: bool) -> None:
        if known:
            self.known += 1
        else:
            self.timed += 1
        if all(map(is_scalar, (*key, *options.values()))):
            self.chosen.append((kernel, source, key, options))

    def recorded(self, card: Card, triton: str) -> Table:
        """All that was chosen, as a table of `card`."""
        table = Table(card, triton)
        for kernel, source, key, options in self.chosen:
            table.add(kernel, source, key, options)
        return table


def card_of(device: torch.device) -> Card:
    """The GPU `device`."""
    found = torch.cuda.get_device_properties(device)
    return Card(found.name, (found.major, found.minor), found.multi_processor_count)


def shipped_table(card: Card, path: Path = SHIPPED) -> Table | None:
    """The table for `card` and the installed Triton, of the file that ships with the package. Why there is none stands
    in the log: kernels are tuned then, which takes a cold start a minute or two."""
    try:
        import triton

        if (table := table_for(read(path), card, triton.__version__)) is None:
            log.info("no table of tuned kernels for %s with triton %s: they are tuned", card.name, triton.__version__)
        return table
    except TableError as error:
        log.warning("%s. Kernels are tuned instead, which takes longer", error)
    except ImportError:
        log.info("Triton is not installed: no kernels to tune")
    return None


@contextmanager
def tuned_kernels(table: Table | None) -> Iterator[Tuned]:
    """Until the end of the context, in this process. table: None has all kernels tuned, and says what was chosen."""
    tuned = Tuned(table)
    try:
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction

        run, _ = Autotuner.run, (Autotuner.prune_configs, JITFunction.cache_key)
    except (ImportError, AttributeError) as error:
        log.warning("this Triton takes no table of tuned kernels, and the warm-up takes longer: %s", error)
        yield tuned
        return

    def run_as_known(self: Any, *arguments: Any, **meta: Any) -> Any:
        if len(self.configs) < 2 or (key := _key(self, arguments, meta)) in self.cache:
            return run(self, *arguments, **meta)
        kernel, source = f"{self.base_fn.__module__}.{self.base_fn.__qualname__}", source_of(self)
        if (candidate := _known(tuned, self, (kernel, source, key), arguments, meta)) is not None:
            self.cache[key] = candidate
            try:
                result = run(self, *arguments, **meta)
                if self.best_config is candidate:
                    tuned.note(kernel, source, key, candidate.all_kwargs(), known=True)
                    return result
            except Exception as error:  # What is no fault of the candidate is met again by tuning.
                log.warning("%s does not run as the table says (%s), and is tuned: %s", kernel, candidate, error)
            del self.cache[key]
        result = run(self, *arguments, **meta)
        if key in self.cache:
            tuned.note(kernel, source, key, self.cache[key].all_kwargs(), known=False)
        else:
            log.warning("this Triton keeps its choice for %s by another key than is known here: no table fits", kernel)
        return result

    Autotuner.run = run_as_known
    try:
        yield tuned
    finally:
        Autotuner.run = run


def _key(tuner: Any, arguments: tuple[Any, ...], meta: dict[str, Any]) -> Key:
    """What Triton keeps a winner by, as `Autotuner.run` computes it."""
    named = dict(zip(tuner.arg_names, arguments, strict=False)) | meta
    given = {name: value for name, value in named.items() if name in tuner.arg_names}
    values = [given[name] for name in tuner.keys if name in given]
    return (*values, *(str(value.dtype) for value in given.values() if hasattr(value, "dtype")))


def source_of(tuner: Any) -> str:
    """Triton's digest of the kernel's source and of all that it calls."""
    kernel = tuner.fn
    while not hasattr(kernel, "cache_key"):
        kernel = kernel.fn
    return str(kernel.cache_key)


def _known(
    tuned: Tuned, tuner: Any, which: tuple[str, str, Key], arguments: tuple[Any, ...], meta: dict[str, Any]
) -> Any:
    """The candidate of the kernel itself that the table names; None: it names none, or none that the kernel has."""
    kernel, source, key = which
    if tuned.table is None:
        return None
    if tuned.table.knows_otherwise(kernel, source):
        tuned.other_sources.add(kernel)
    if (options := tuned.table.winner(kernel, source, key)) is None:
        return None
    tuner.nargs = dict(zip(tuner.arg_names, arguments, strict=False))
    found = next((one for one in tuner.prune_configs(meta) if one.all_kwargs() == options), None)
    if found is None:
        log.warning("%s has no candidate %s, which the table says, and is tuned", kernel, options)
    return found
