"""The processes of the other ranks of one divided trainer: rank 0 starts them, tells them what to do, and ends them.

    others = RankProcesses([sys.executable, "-m", ...], ranks=2, seconds=300)
    others.start({"run_dir": ...})                    # each says that it is ready; then they are one process group
    found = others.together({"op": "begin"}, work)    # all do it at once: each other rank by its command, we by `work`
    others.close()

    sock = inherited(sys.argv)                        # in such a process: where commands come from
    meet(message)                                     # the process group

Commands and answers are msgpack on a socket pair that only parent and child have. What is computed together goes
through torch.distributed's default process group, on the loopback interface: gloo, and on GPUs NCCL for what lies
there.

Must not know: Redis, vLLM, versions, the optimizer.
Invariants: what only one rank fails at ends all of them, as a `GroupLostError` that says why: nobody waits for a rank
that does something else. When `together` returns, the devices are through with it, too. The others die with rank 0's
process, however it dies. One that is stopped while it is needed is ended (`rank_watch`).
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from producer.errors import TandemError
from worker.distributed import device_watch
from worker.distributed.device_watch import DeviceWatch
from worker.distributed.errors import GroupLostError
from worker.distributed.rank_watch import Other, RankWatch, Tell
from worker.utils import unix_socket
from worker.utils.child_process import die_with_parent
from worker.utils.fault_injection import environment_of_rank
from worker.utils.process_state import is_stopped

T = TypeVar("T")
Message = dict[str, Any]
WHY_SECONDS = 5.0
"""How long is waited for what a rank says of its end, once the group is lost."""
GONE_SECONDS = 1.0
"""How long a process whose connection is lost may take to be gone."""
END_SECONDS = 10.0
"""How long a rank that was told to end may take."""
CPU = torch.device("cpu")
FIRST_SUMS = (8, 1 << 19, 1 << 25)
"""Numbers of each of the first sums on GPUs. NCCL makes its buffers when a sum of their size first needs them: they are
to be there before anybody asks how much memory is free."""
ASKED = (signal.SIGINT, signal.SIGTERM)
"""What asks a process to end: a terminal's Ctrl-C and systemd ask the whole group, and rank 0 answers for it."""


class SumsLostError(RuntimeError):
    """Sums on a GPU timed out, or somebody who takes part in them is gone: what they left means nothing."""


class RankProcesses:
    """command: starts one; two numbers are added, of a file and of our process. seconds: how long a rank is waited
    for. tell: hears who is waited for (`RankWatch`). device: of rank 0's weights."""

    def __init__(
        self,
        command: Sequence[str],
        ranks: int,
        seconds: float,
        tell: Tell = lambda others, since: None,
        device: torch.device = CPU,
    ) -> None:
        self.command, self.ranks, self.seconds, self.device = list(command), ranks, seconds, device
        self.watch = RankWatch(tell)
        self._sums: DeviceWatch | None = None
        self._folder: Path | None = None
        self.others: list[Other] = []
        self.lost: str | None = "not started"
        """Why there is no group; None while there is one."""

    def start(self, told: Message) -> None:
        """Start one process a rank but 0, and form the group. told: what each needs to make itself ready.

        For the main thread. Raises `GroupLostError`, with what a rank said, when one of them cannot be.
        """
        self.close()
        self.lost = None
        if self.device.type == "cuda":
            self._sums = self.watch.device = DeviceWatch(self.seconds, _abort, whose="ranks")
        self._folder = folder = Path(tempfile.mkdtemp(prefix="tandem-ranks-"))  # for us alone
        try:
            meeting = {"ranks": self.ranks, "store": str(folder / "store"), "seconds": self.seconds}
            with self.watch.over(self.others):
                for rank in range(1, self.ranks):
                    self.others.append(self._spawn(rank))
                for other in self.others:
                    self._send(other, {**told, **meeting, "rank": other.rank})
                self.hear()
            self.together({"op": "meet"}, lambda: meet({**meeting, "rank": 0}, self.device))
        except BaseException:
            self.close()
            raise
        if self.device.type == "cpu":  # NCCL may look into its store later
            self._remove_folder()

    def together(self, message: Message, work: Callable[[], T]) -> T:
        """`work()` here while every other rank does what `message` says. Raises what all of them raise alike (a
        `TandemError`), and `GroupLostError` for everything else."""
        with self.watch.over(self.others):
            return self._together(message, work)

    def _together(self, message: Message, work: Callable[[], T]) -> T:
        self.tell(message)
        failed: TandemError | None = None
        try:
            result = work()
            self.check()
            settle(self.device)
            self.check()
        except GroupLostError:
            raise
        except TandemError as error:  # follows from what all have
            failed = error
        except Exception as error:
            said = str(error).partition(". This is typically")[0]  # gloo goes on and on
            self._lose(f"rank 0 failed: {type(error).__name__}: {said}", error)
        except BaseException:
            self.close()
            raise
        ours = None if failed is None else type(failed).__name__
        for other, answer in zip(self.others, self.hear(), strict=True):
            if (theirs := answer.get("raised")) != ours:
                self._lose(f"{other.name} said {theirs or 'that all is well'}, and rank 0 {ours or 'that all is well'}")
        if failed is not None:
            raise failed
        return result

    def check(self) -> None:
        """As `worker.model.shard_group.Watch.check`. Raises `SumsLostError`."""
        if self._sums is not None and self._sums.failed:
            raise SumsLostError("a sum over ranks timed out, or a rank is gone")

    def began(self, ended: Callable[[], bool]) -> None:
        """As `worker.model.shard_group.Watch.began`."""
        if self._sums is not None:
            self._sums.began(ended)

    def tell(self, message: Message) -> None:
        """Every other rank, which need not answer."""
        if self.lost is not None:
            raise GroupLostError(self.lost)
        for other in self.others:
            self._send(other, message)

    def hear(self) -> list[Message]:
        """What every other rank answers, in their order."""
        return [self._receive(other) for other in self.others]

    def ended(self) -> str | None:
        """Which rank's process is there no more; None while all are."""
        gone = [other for other in self.others if other.process.poll() is not None]
        return _end_of(gone[0]) if gone else self.lost

    def close(self) -> None:
        """End the others and the group. Idempotent."""
        self.lost = self.lost or "the ranks were ended"
        for other in self.others:
            other.sock.close()
        if self._sums is not None:
            self._sums.close()
            with contextlib.suppress(Exception):  # NCCL's goodbye would wait for the others'
                _abort()
        self._sums = self.watch.device = None
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        for other in self.others:
            try:
                other.process.wait(0 if is_stopped(other.process.pid) else END_SECONDS)
            except subprocess.TimeoutExpired:
                other.process.kill()
                other.process.wait()
        self.others = []
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def _spawn(self, rank: int) -> Other:
        ours, theirs = socket.socketpair()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)  # it has them blocked until it ignores them
        try:
            with theirs:
                process = subprocess.Popen(
                    [*self.command, str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno()],
                    env=environment_of_rank(rank),
                    stdin=subprocess.DEVNULL,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.settimeout(self.seconds)
        return Other(rank, process, ours)

    def _send(self, other: Other, message: Message) -> None:
        try:
            unix_socket.send(other.sock, message)
        except unix_socket.WireError as error:
            self._lose(f"{other.name}: {error}")

    def _receive(self, other: Other) -> Message:
        self.watch.silent = other
        try:
            answer = unix_socket.receive(other.sock)
        except unix_socket.WireError as error:
            self._lose(f"{other.name}: {error}")
        if answer is None:
            self._lose(_end_of(other))
        if "failed" in answer:
            self._end_all(f"{other.name} failed: {answer['failed']}")
        return answer

    def _lose(self, reason: str, cause: BaseException | None = None) -> NoReturn:
        """End all, and say why: what a rank that ended says comes before what the others noticed of it. Where somebody
        was waited for in vain, it is whoever is silent."""
        words = [(other, _last_words(other)) for other in self.others]
        dead = [why[1] for _, why in words if why is not None and why[0]]
        said = [why[1] for _, why in words if why is not None]
        silent = [other.name for other, why in words if why is None]
        if silent and "timed out" in str(cause).lower():
            reason = f"{', '.join(silent)} did not answer within {self.seconds:g} s, and was ended"
        self._end_all(next(iter([*dead, *said]), reason), cause)

    def _end_all(self, reason: str, cause: BaseException | None = None) -> NoReturn:
        self.lost = reason
        for other in self.others:
            other.process.kill()  # it holds nothing, and may wait for somebody
        self.close()
        raise GroupLostError(reason) from cause


def meet(message: Mapping[str, Any], device: torch.device = CPU) -> None:
    """Form the default process group, on the loopback interface, whatever the environment names for replicas: gloo, and
    NCCL for what lies on a GPU. device: of this rank's weights; NCCL takes what it keeps of the GPU's memory now."""
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    device_watch.watch_alone()
    gpu = device.type == "cuda"
    limit = timedelta(seconds=float(message["seconds"]))
    store = f"file://{message['store']}"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo", store, limit,
        rank=int(message["rank"]), world_size=int(message["ranks"]),
    )  # fmt: skip
    for size in FIRST_SUMS if gpu else ():
        dist.all_reduce(torch.zeros(size, dtype=torch.bfloat16, device=device))
    settle(device)


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _abort() -> None:
    if dist.group.WORLD is not None:
        dist.group.WORLD.abort()


def inherited(arguments: Sequence[str]) -> socket.socket:
    """In a rank's process: the socket on which commands come. The process dies with its parent; what asks it to end
    asks its parent, which ends it."""
    number, parent = int(arguments[-2]), int(arguments[-1])
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for asked in ASKED:
        signal.signal(asked, signal.SIG_IGN)
    return socket.socket(fileno=number)


def _end_of(other: Other) -> str:
    if other.why is not None:
        return other.why
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = other.process.wait(WHY_SECONDS)
        return f"{other.name} {f'was killed by signal {-code}' if code < 0 else f'ended with code {code}'}"
    return f"{other.name} closed its connection"


def _last_words(other: Other) -> tuple[bool, str] | None:
    """Whether it is dead without a word, and what is to be said of its end; None where it goes on."""
    try:
        other.sock.settimeout(WHY_SECONDS)
        while (answer := unix_socket.receive(other.sock)) is not None:
            if "failed" in answer:
                return False, f"{other.name} failed: {answer['failed']}"
        return True, _end_of(other)
    except (unix_socket.WireError, OSError):  # it is silent, or was killed with something unread
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.process.wait(GONE_SECONDS)
            return True, _end_of(other)
        return None
