"""What the teachers of a micro-batch expect at each trained token, found once and read by every pass after it.

    teachers = Teachers.of_reading(examples)     # nothing yet, but who has one
    for batch in batches(teachers.reading):      # what they read, by example
        teachers.add(batch, hidden, head)        # forward passes without gradients
    soft = teachers.of(batch)                    # for the tokens of a batch of what the students read

Must not know: the optimizer, Redis, versions.
Invariant: a student's k-th trained token has the distribution that the teacher has at its k-th, however the sequences
of either are divided among rows and passes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from worker.data.example_codec import example_of, plain_example
from worker.data.examples import Example
from worker.data.packing import Batch
from worker.model.output_head import OutputHead
from worker.model.soft_targets import Soft, teacher_targets
from worker.trainer.losses import has_teacher


class Teachers:
    """Of `examples`, by their order."""

    def __init__(self, examples: Sequence[Example] = ()) -> None:
        self.examples = list(examples)
        taught = [bool(one.teachers) and has_teacher(one.kind) for one in examples]
        self.reading = [replace(one, sequences=one.teachers if has else ()) for one, has in zip(examples, taught,
                        strict=True)] if any(taught) else []  # fmt: skip
        """The examples in whose place stands what their teachers read; empty where nobody has one."""
        counts = torch.tensor([one.trained_tokens for one in self.reading], dtype=torch.int64)
        self._first = counts.cumsum(0) - counts  # place of each example's first token among all [examples]
        self._has = torch.tensor(taught, dtype=torch.bool)
        self._places: list[Tensor] = []
        self._parts: list[Soft] = []
        self._all: Soft | None = None

    def add(self, batch: Batch, hidden: Tensor, head: OutputHead) -> None:
        """What is expected at the trained tokens of `batch`, of `reading`. hidden: [N, H]."""
        self._places.append(self._first[batch.examples] + batch.order)
        self._parts.append(teacher_targets(hidden, head.weight, head.after, head.vocabulary))

    def rows(self, batch: Batch) -> Tensor:
        """int64 [M], on the host: which trained tokens of a student's `batch` have a teacher."""
        if not self.reading:
            return torch.zeros(0, dtype=torch.int64)
        return self._has[batch.examples].nonzero()[:, 0]

    def of(self, batch: Batch) -> Soft | None:
        """For those, what is expected; None where there are none."""
        rows = self.rows(batch)
        if not len(rows):
            return None
        which = self._first[batch.examples[rows]] + batch.order[rows]
        every = self._in_order()
        return every.at(rows.to(every.ids.device), which.to(every.ids.device))

    def plain(self) -> dict[str, Any]:
        """In msgpack types, complete: for another process that reads the same rows."""
        every = self._in_order()
        return {
            "examples": [plain_example(example) for example in self.examples],
            "ids": every.ids.cpu().numpy().tobytes(),
            "log_q": every.log_q.cpu().numpy().tobytes(),
        }

    @staticmethod
    def read(plain: dict[str, Any]) -> "Teachers":
        """What `plain` made, on the host."""
        found = Teachers([example_of(item) for item in plain["examples"]])
        tokens = sum(example.trained_tokens for example in found.reading)
        ids = torch.frombuffer(bytearray(plain["ids"]), dtype=torch.int64).view(tokens, -1)
        log_q = torch.frombuffer(bytearray(plain["log_q"]), dtype=torch.float32).view(tokens, -1)
        found._all = Soft(torch.arange(tokens), ids, log_q)
        return found

    def _in_order(self) -> Soft:
        if self._all is None:
            order = torch.cat(self._places).argsort().to(self._parts[0].ids.device)
            whole = Soft(
                order, *(torch.cat(parts) for parts in zip(*((p.ids, p.log_q) for p in self._parts), strict=True))
            )
            self._all, self._parts = whole.at(order, order), []
        return self._all


NO_TEACHERS = Teachers()
