"""How the work of a micro-batch is divided among replicas, and how the parts are put together.

    Alone()          all of it, here: one trainer, as ever
    Ranks(group)     our part here, the others' at the group's other members
    InTurn(n)        n parts here, one after the other: a version of n replicas, made again by one process

Must not know: Redis, vLLM, the header, versions.
Invariants: a part follows from the batch and the number of parts alone. Gradients of parts are added in the order of
parts, each addition rounded to the gradient's dtype: so `InTurn(n)` has, on a CPU, the bits that n replicas have. What
goes wrong in one member's part is raised at every member, at the same point, as `SharedFailureError`.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from worker.apollo import ApolloMini
from worker.data.division import divided, has_work
from worker.data.examples import Example
from worker.distributed.errors import GroupLostError, SharedFailureError
from worker.distributed.group import Group
from worker.distributed.sums import begin_sum, sum_in_order
from worker.model.factors import Factors, Product, Rows
from worker.model.gradient_factors import GradientFactors
from worker.trainer.token_sums import TokenSums

T = TypeVar("T")
Found = tuple[TokenSums, dict[str, float]]
"""What the tokens add up to, and which examples cannot be trained, each with its loss."""
Pairs = list[tuple[Tensor, Tensor]]
"""(parameter, gradient)"""
STREAMED_BYTES = 1 << 30
"""Of gradients that are held back while they are streamed."""


class Alone:
    """One trainer, one part. The others are told apart by what they do besides."""

    parts = 1

    def divide(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        """The parts that are computed here."""
        return [examples]

    def together(self, work: Callable[[], T]) -> T:
        """`work()`, which may fail at one member alone."""
        return work()

    def whole(self, work: Callable[[], Found]) -> Found:
        """What `work` found, of all parts."""
        return work()

    def part_done(self, parameters: Sequence[Tensor]) -> None:
        """The gradients of a part are there."""

    def all_done(self, parameters: Sequence[Tensor], factors: GradientFactors | None) -> None:
        """Gradients, and factors if there are any, become those of all parts."""


class InTurn(Alone):
    """n parts, one after the other."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self._sums: dict[int, Tensor] = {}

    def divide(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        self._sums.clear()
        return [part for part in divided(examples, self.parts) if has_work(part)]

    def part_done(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if id(parameter) in self._sums:
                self._sums[id(parameter)] += parameter.grad
            else:
                self._sums[id(parameter)] = parameter.grad
            parameter.grad = None

    def all_done(self, parameters: Sequence[Tensor], factors: GradientFactors | None) -> None:
        for parameter in parameters:
            parameter.grad = self._sums.pop(id(parameter), None)
        if factors is not None:
            factors.settle()


class Ranks(Alone):
    """Our part here, the others' at the other members of `group`."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.parts = group.size
        self.busy: list[int] = []
        """The places of those who have anything to do."""

    def divide(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        every = divided(examples, self.parts)
        self.busy = [place for place, part in enumerate(every) if has_work(part)]
        return [every[self.group.place]]

    def together(self, work: Callable[[], T]) -> T:
        result, _ = self._exchanged(work, lambda result: {})
        return result

    def whole(self, work: Callable[[], Found]) -> Found:
        (sums, _), every = self._exchanged(work, _plain)
        bad: dict[str, float] = {}
        sums.clear()
        for found in every:  # in the order of places, and all but one are zero: exact
            sums.nll += _tensor(found["nll"])
            sums.taught += _tensor(found["taught"])
            bad |= found["bad"]
        return sums, bad

    def _exchanged(self, work: Callable[[], T], plain: Callable[[T], dict[str, Any]]) -> tuple[T, list[dict[str, Any]]]:
        failed: Exception | None = None
        try:
            result = work()
            message = plain(result)
        except GroupLostError:
            raise
        except Exception as error:
            failed = error
            message = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        every = self.group.exchange(message)
        for place, found in enumerate(every):
            if "failed" in found:
                raise SharedFailureError(f"replica {self.group.members[place]}: {found['failed']}") from failed
        return result, every

    def all_done(self, parameters: Sequence[Tensor], factors: GradientFactors | None) -> None:
        if factors is not None:
            factors.settle()
            self._gather(parameters, factors)
        ours = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]
        lists = self.group.exchange({"gradients": ours})
        having = {place: set(lists[place]["gradients"]) for place in self.busy}
        for places, indices in _by_owners(having).items():
            gradients = []
            for i in indices:
                if parameters[i].grad is None:
                    parameters[i].grad = torch.zeros_like(parameters[i])
                gradients.append(parameters[i].grad)
            sum_in_order(self.group, [one for one in gradients if one is not None], places)
        self.group.settle()

    # -- streaming ------------------------------------------------------------------------------------------------

    def stream(self, loss: Tensor | None, optimizer: ApolloMini, parameters: Sequence[Tensor], scale: float) -> None:
        """One step, in which every bucket becomes that of all members before it is applied. loss: of our part; None:
        we have none, and apply what the others have. Raises `GroupLostError`."""
        if loss is None:
            optimizer.begin(scale)
            try:
                with torch.no_grad():
                    self._follow(parameters, optimizer.update_many)
            except BaseException:
                optimizer.abandon()
                raise
            optimizer.finish()
            self.group.settle()
            return
        order = {id(parameter): i for i, parameter in enumerate(parameters)}
        # On a GPU one bucket is added up while the next is computed: two, where one trainer has one.
        held = STREAMED_BYTES // 2 if parameters[0].is_cuda else STREAMED_BYTES
        with optimizer.streaming(held, step_scale=scale, before=partial(self._add_bucket, order=order)):
            loss.backward()  # type: ignore[no-untyped-call]
        self.group.settle()
        if len(self.busy) < self.group.size and self.group.closed is None:
            with suppress(GroupLostError):  # all is added up: who is lost now is lost for the next step
                self.group.tell({"bucket": None} if self.group.leads else None)

    def _add_bucket(self, pairs: Pairs, order: dict[int, int]) -> Callable[[], None] | None:
        """The leader says which gradients are meant, and everybody else looks whether these are theirs. order: a
        parameter's number, by its id."""
        numbers = [order[id(parameter)] for parameter, _ in pairs]
        if self.group.tell({"bucket": numbers})["bucket"] != numbers:
            reason = f"replica {self.group.members[self.group.place]} streams its gradients in another order"
            self.group.close(reason)
            raise GroupLostError(reason)
        return begin_sum(self.group, [gradient for _, gradient in pairs], self.busy)

    def _follow(self, parameters: Sequence[Tensor], use: Callable[[Pairs], None]) -> None:
        while (numbers := self.group.tell()["bucket"]) is not None:
            pairs = [(parameters[i], torch.zeros_like(parameters[i])) for i in numbers]
            sum_in_order(self.group, [gradient for _, gradient in pairs], self.busy)
            use(pairs)

    # -- factors --------------------------------------------------------------------------------------------------

    def _gather(self, parameters: Sequence[Tensor], factors: GradientFactors) -> None:
        """Everybody's factors at every member, in the order of places: what is formed of them needs no one else."""
        known = [parameter for parameter in parameters if factors.takes(parameter)]
        tensors: list[Tensor] = []
        table: dict[int, int] = {}

        def number(tensor: Tensor) -> int:
            if id(tensor) not in table:
                table[id(tensor)] = len(tensors)
                tensors.append(tensor)
            return table[id(tensor)]

        ours = []
        for i, parameter in enumerate(known):
            if (kept := factors.of(parameter)) is not None:
                ours.append([i, [_plain_pass(one, number) for one in kept.passes]])
        shapes = [[list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for tensor in tensors]
        every = self.group.exchange({"factors": ours, "shapes": shapes})
        merged: dict[int, Factors] = {}
        for place in self.busy:
            found = every[place]
            if place == self.group.place:
                theirs = tensors
            else:
                device = parameters[0].device
                theirs = [torch.empty(s, dtype=getattr(torch, d), device=device) for s, d in found["shapes"]]
            for tensor in theirs:
                self.group.copy(tensor, place)
            for i, passes in found["factors"]:
                entry = merged.setdefault(i, Factors(known[i]))
                entry.passes += [_pass_of(one, theirs) for one in passes]
        factors.replace(merged.values())


def _by_owners(having: dict[int, set[int]]) -> dict[tuple[int, ...], list[int]]:
    """Which gradients are whose: the places that have them -> their numbers, ascending."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i in sorted(set().union(*having.values())):
        found.setdefault(tuple(place for place in sorted(having) if i in having[place]), []).append(i)
    return found


def _plain(found: Found) -> dict[str, Any]:
    sums, bad = found
    return {"nll": sums.nll.numpy().tobytes(), "taught": sums.taught.numpy().tobytes(), "bad": bad}


def _tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.float64).view(-1, 2)


def _plain_pass(one: tuple[list[Product], list[Rows]], number: Callable[[Tensor], int]) -> list[Any]:
    products, rows = one
    return [
        [[number(p.left), number(p.right), p.first] for p in products],
        [[number(r.rows), number(r.values)] for r in rows],
    ]


def _pass_of(plain: list[Any], tensors: list[Tensor]) -> tuple[list[Product], list[Rows]]:
    products, rows = plain
    return [Product(tensors[a], tensors[b], first) for a, b, first in products], [
        Rows(tensors[a], tensors[b]) for a, b in rows
    ]
