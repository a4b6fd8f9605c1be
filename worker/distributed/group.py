"""A group of replicas that stand in one place of the protocol: what they tell each other, and tensors between them.

    group.gather(message, seconds)      every member's message, at the leader (place 0); None elsewhere
    group.tell(message, seconds)        the leader's message, at every member
    group.in_turn(message)              the same, to one half after the other has answered
    group.exchange(message)             every member's message, at every member
    group.copy(tensor, source)          a member's tensor, at every member
    group.add_later(tensors)            sums, under way; group.settle() waits for a GPU, and says whether they are whole
    group.hand(tensor, place), take     a tensor from one to one; say, hear: a message
    group.call(), group.called()        a command comes: waiting has no limit, and notices a leader that died

Must not know: Redis, vLLM, versions, the optimizer.
Invariants: whatever goes wrong on the wire closes the group and is a `GroupLostError`: the others notice, since their
connections end. What a GPU was asked for and does not end is given up after `seconds` (device_watch.py). A message of
the leader goes to each member by itself: one that is gone keeps it from nobody else.
"""

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from worker.distributed import messages
from worker.distributed.asking import Asker, Away, waiting
from worker.distributed.device_watch import DeviceWatch
from worker.distributed.errors import GroupLostError
from worker.utils.messages import WireError

Message = dict[str, Any]
SILENT_SECONDS = 30.0
"""How long replica 0 may not answer before a follower says so."""


class Group:
    """members: the replicas' numbers, by place; `place`: ours. store: where commands are announced, under `prefix`.
    seconds: how long a member is waited for."""

    def __init__(self, store: Any, prefix: str, members: Sequence[int], place: int, seconds: float) -> None:
        self.members, self.place, self.seconds = list(members), place, seconds
        self._store, self._prefix, self._calls = store, prefix, 0
        self.closed: str | None = None
        """Why it is closed; None while it is open."""
        self.lost: set[int] = set()
        """Members that the leader knows to be gone."""
        self._watch, self._asker = DeviceWatch(seconds, _abort), Asker()

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def leads(self) -> bool:
        return self.place == 0

    @property
    def others(self) -> range:
        """The places of the leader's followers."""
        return range(1, self.size)

    def gather(self, message: Message, seconds: float | None = None) -> list[Message] | None:
        """Every member's, by place, at the leader."""
        with self.guarded():
            if not self.leads:
                messages.send(message, 0, seconds or self.seconds)
                return None
            return [message, *(self._from(place, seconds or self.seconds) for place in self.others)]

    def tell(self, message: Message | None = None, seconds: float | None = None) -> Message:
        """The leader's. Every member that is there has it, also where this raises for one that is not."""
        if not self.leads:
            with self.guarded():
                return messages.receive(0, seconds or self.seconds)
        assert message is not None
        self._check()
        with self._each() as reached:
            for place in self.others:
                reached(place, partial(messages.send, message, place, seconds or self.seconds))
        return message

    def in_turn(self, message: Message) -> None:
        """The leader: `message` to so many that half of all, with itself, have nothing to do; to more when they have
        answered, each within a third of `seconds`: who waits for its turn does not give up before. One that ended keeps
        it from nobody; one that hangs, from later turns, since gloo then ends all connections. Raises at the end."""
        self._check()
        most, seconds = self.size // 2, self.seconds / 3
        with self._each() as reached:
            for first in range(1, self.size, most):
                turn = range(first, min(first + most, self.size))
                told = [at for at in turn if reached(at, partial(messages.send, message, at, seconds))]
                for place in told:
                    reached(place, partial(messages.receive, place, seconds))

    def say(self, message: Message, place: int) -> None:
        """To one member."""
        with self.guarded():
            messages.send(message, place, self.seconds)

    def hear(self, place: int) -> Message:
        """From one member."""
        with self.guarded():
            return messages.receive(place, self.seconds)

    def hand(self, tensor: torch.Tensor, place: int) -> None:
        """A tensor of any layout, to one member."""
        with self.guarded():
            self._end(dist.isend(tensor.contiguous(), place), tensor)

    def take(self, tensor: torch.Tensor, place: int) -> None:
        """Into a tensor of any layout, from one member."""
        with self.guarded():
            found = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            self._end(dist.irecv(found, place), found)
            tensor.copy_(found)

    def exchange(self, message: Message) -> list[Message]:
        """Every member's, by place."""
        gathered = self.gather(message)
        return list(self.tell({"all": gathered} if gathered is not None else None)["all"])

    def copy(self, tensor: torch.Tensor, source: int) -> None:
        """`tensor`, contiguous, becomes what it is at place `source`."""
        with self.guarded():
            self._end(dist.broadcast(tensor, source, async_op=True), tensor)

    def all_of(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every member's `tensor` (contiguous; of one shape and dtype), by place."""
        with self.guarded():
            found = [torch.empty_like(tensor) for _ in self.members]
            self._end(dist.all_gather(found, tensor, async_op=True), tensor)
            return found

    def add_later(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Each of `tensors` becomes the sum of all, in an order that the library chooses: on a GPU. What is returned
        has to be called before they are used: it makes what the device does next wait for them, and nobody else."""
        with self.guarded():
            works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]

        def wait() -> None:
            with self.guarded():
                for work, tensor in zip(works, tensors, strict=True):
                    self._end(work, tensor)

        return wait

    def settle(self) -> None:
        """Wait until a GPU has done what it was asked for. Raises `GroupLostError` where a sum was given up: then
        nothing that came of it may be used."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._check()

    def call(self) -> None:
        """The leader: a command follows, by `tell`."""
        self._check()
        with self.guarded():
            self._store.set(f"{self._prefix}/call/{self._calls}", b"1")
            if self._calls > 1:
                self._store.delete_key(f"{self._prefix}/call/{self._calls - 2}")
            self._calls += 1

    def called(self, pause: Callable[[float], None] = time.sleep) -> Iterator[None]:
        """A follower: yields as long as there is no command, a few times a second and more often at first; also while
        replica 0 does not answer."""
        self._check()
        wait, away = 0.001, Away(SILENT_SECONDS)
        while True:
            with self.guarded():
                answer = self._asker.submit(self._announced)
                for _ in waiting(answer):
                    away.say(
                        "replica 0 does not answer: it is stopped, hangs, or is cut off", "this replica waits for it"
                    )
                    yield
                away.back()
                called, closed = answer.result()
                if called:
                    self._calls += 1
                    return
                if closed:
                    raise GroupLostError("replica 0 closed the group")
            yield
            pause(wait)
            wait = min(wait * 1.2, 0.02)

    def _announced(self) -> tuple[bool, bool]:
        """Whether a command comes, and whether the group is closed."""
        if self._store.check([f"{self._prefix}/call/{self._calls}"]):
            return True, False
        return False, self._store.check([f"{self._prefix}/closed"])

    def close(self, reason: str = "closed") -> None:
        """End all connections, so that whoever waits for us is told. Idempotent."""
        if self.closed is None:
            self.closed = reason
            self._asker.close()
            if self.leads:  # who waits for a command waits at the store, and sees no connection end
                with contextlib.suppress(Exception):
                    self._store.set(f"{self._prefix}/closed", b"1")
            self._watch.close()
            if torch.cuda.is_available():  # NCCL's goodbye waits for the others', who may wait for ours elsewhere
                with contextlib.suppress(Exception):
                    _abort()
            with contextlib.suppress(Exception):
                dist.destroy_process_group()

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """What goes wrong inside closes the group, as a `GroupLostError`."""
        self._check()
        try:
            yield
        except GroupLostError as error:
            self.close(str(error))
            raise
        except (RuntimeError, ValueError, TypeError, WireError) as error:
            self.close(f"a replica was lost ({_reason(error)})")
            raise GroupLostError(str(self.closed)) from None

    @contextlib.contextmanager
    def _each(self) -> Iterator[Callable[[int, Callable[[], object]], bool]]:
        """What is done with each member by itself: inside, (place, work) -> whether it was there for `work`. Raises at
        the end if one was not."""
        lost: dict[int, str] = {}

        def reached(place: int, work: Callable[[], object]) -> bool:
            try:
                work()
            except (RuntimeError, GroupLostError) as error:
                lost[self.members[place]] = _reason(error)
                return False
            return True

        yield reached
        if lost:
            self.lost |= lost.keys()
            self.close("; ".join(f"replica {member} was lost ({reason})" for member, reason in lost.items()))
            raise GroupLostError(str(self.closed))

    def _from(self, place: int, seconds: float) -> Message:
        try:
            return messages.receive(place, seconds)
        except RuntimeError:
            self.lost.add(self.members[place])
            raise

    def _end(self, work: Any, tensor: torch.Tensor) -> None:
        """Of a collective: on a CPU its end is awaited, on a GPU what the device does next waits for it."""
        work.wait()
        if tensor.is_cuda:
            event = torch.cuda.Event()
            event.record()
            self._watch.began(event.query)

    def _check(self) -> None:
        if self.closed is None and self._watch.failed:
            self.close(f"a replica took no part in a sum for {self.seconds:g} s")
        if self.closed is not None:
            raise GroupLostError(self.closed)


def _abort() -> None:
    if dist.group.WORLD is not None:
        dist.group.WORLD.abort()


def _reason(error: Exception) -> str:
    """What it says. What it holds on to is let go of: an unfinished transfer would keep the group's connections open,
    and nobody would learn that it is closed."""
    traceback.clear_frames(error.__traceback__)
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return said.partition("] ")[2].partition(". This is typically")[0][:300] or said[:300]
