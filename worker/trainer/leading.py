"""A trainer whose model is divided over ranks, as rank 0 leads it: whatever computes over all ranks is done by all.

    trainer = LeadingTrainer(model, optimizer, ..., lead=ranks)     # on rank 0; a plain `Trainer` on the others
    obey(trainer, message)                                          # on the others: what rank 0's trainer does now

The batch is not divided: every rank reads the same rows, and has the gradients of its own part of the weights. What is
decided by them is the same on each, bit for bit, because sums are. Must not know: Redis, vLLM, the header, versions.

Invariant: a method that needs a sum over ranks is called on all ranks or on none, with the same arguments and threads.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from worker.data.example_codec import example_of, plain_example
from worker.data.examples import Example
from worker.distributed.errors import GroupLostError
from worker.trainer.gradients import Gradients, Limit
from worker.trainer.outliers import ToldLimit
from worker.trainer.sharing import Alone, InTurn
from worker.trainer.teachers import Teachers
from worker.trainer.trainer import Trainer
from worker.trainer.weighting import RULES, Rule, weighted_mean
from worker.utils.fault_injection import point

T = TypeVar("T")
Message = dict[str, Any]


class Lead(Protocol):
    """What tells the other ranks: `worker.distributed.rank_processes.RankProcesses`."""

    def together(self, message: Message, work: Callable[[], T]) -> T:
        """`work()`, while the others do what `message` says."""

    def tell(self, message: Message) -> None:
        """The others, which need not answer."""


class LeadingTrainer(Trainer):
    """`Trainer` on rank 0. lead: tells the others; the rest as `Trainer` has it."""

    def __init__(self, *arguments: Any, lead: Lead, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lead, self._inside = lead, False

    def begin(self, examples: Sequence[Example], limit: Limit | None = None, rule: Rule = weighted_mean) -> Gradients:
        told = {"most": limit.loss_limit(), "k": limit.k} if limit is not None else None
        number = next(number for number, known in RULES.items() if known is rule)
        how = {"limit": told, "rule": number, "way": self.way, "parts": self.sharing.parts}
        return self._all("begin", partial(super().begin, examples, limit, rule), examples, **how)

    def prepare(self) -> None:
        self._all("prepare", super().prepare)

    def write(self) -> None:
        self._all("write", partial(_written, super().write, self))

    def forget(self) -> None:
        if not self._inside:
            with suppress(GroupLostError):  # who is lost keeps nothing; the next step finds out
                self._lead.tell({"op": "forget"})
        super().forget()

    def gradient_norm(self) -> float | None:
        return self._all("gradient_norm", super().gradient_norm)

    def skip(self) -> None:
        self._all("skip", super().skip)

    def dry_run(self, examples: Sequence[Example], few_layers: bool = False) -> None:
        self._all("dry_run", partial(super().dry_run, examples, few_layers), examples, few_layers=few_layers)

    def warm_optimizer(self) -> None:
        self._all("warm_optimizer", super().warm_optimizer)

    def score(self, examples: Sequence[Example]) -> dict[str, float]:
        return self._all("score", partial(super().score, examples), examples)

    def expectations(self, examples: Sequence[Example]) -> Teachers:
        return self._all("expectations", partial(super().expectations, examples), examples)

    def drift(self, examples: Sequence[Example], then: Teachers) -> dict[str, float]:
        return self._all("drift", partial(super().drift, examples, then), examples, then=then.plain())

    def token_nll(self, example: Example) -> torch.Tensor:
        return self._all("token_nll", partial(super().token_nll, example), [example])

    def _all(self, op: str, work: Callable[[], T], examples: Sequence[Example] = (), **more: Any) -> T:
        """On all ranks; what one of these calls in turn, all are in already."""
        if self._inside:
            return work()
        self._inside = True
        try:
            plain = [plain_example(example) for example in examples]
            message = {"op": op, "examples": plain, "threads": torch.get_num_threads(), **more}
            return self._lead.together(message, work)
        finally:
            self._inside = False


def obey(trainer: Trainer, message: Message) -> None:
    """On another rank: what `LeadingTrainer` does on rank 0 at this moment. Raises what it raises there."""
    if message["op"] == "forget":
        trainer.forget()
        return
    torch.set_num_threads(int(message["threads"]))
    examples = [example_of(plain) for plain in message["examples"]]
    _OBEYED[message["op"]](trainer, examples, message)


def _begin(trainer: Trainer, examples: list[Example], message: Message) -> None:
    told, parts = message["limit"], int(message["parts"])
    trainer.way = message["way"]
    trainer.sharing = InTurn(parts) if parts > 1 else Alone()
    limit = ToldLimit(float(told["most"]), float(told["k"])) if told is not None else None
    trainer.begin(examples, limit, RULES[message["rule"]])


def _write(trainer: Trainer, examples: list[Example], message: Message) -> None:
    point("applying")
    _written(trainer.write, trainer)


def _written(write: Callable[[], None], trainer: Trainer) -> None:
    """All writes, and their end awaited: rank 0 may say that they are done."""
    write()
    trainer.optimizer.check()


_OBEYED: dict[str, Callable[[Trainer, list[Example], Message], object]] = {
    "begin": _begin,
    "write": _write,
    "prepare": lambda trainer, examples, message: trainer.prepare(),
    "gradient_norm": lambda trainer, examples, message: trainer.gradient_norm(),
    "skip": lambda trainer, examples, message: trainer.skip(),
    "dry_run": lambda trainer, examples, message: trainer.dry_run(examples, message["few_layers"]),
    "warm_optimizer": lambda trainer, examples, message: trainer.warm_optimizer(),
    "score": lambda trainer, examples, message: trainer.score(examples),
    "expectations": lambda trainer, examples, message: trainer.expectations(examples),
    "drift": lambda trainer, examples, message: trainer.drift(examples, Teachers.read(message["then"])),
    "token_nll": lambda trainer, examples, message: trainer.token_nll(examples[0]),
}
