"""Where replicas meet: a store of torch.distributed that replica 0 keeps, and how a group is made of who is there.

    meeting = Rendezvous(address, number, count, seconds=300, secret="...")
    group = meeting.form(hello, wait=60)           # replica 0: of those who ask within `wait` seconds
    group = meeting.join(hello, stopping)          # every other one: asks, and waits until it is let in

    leader                       who leads: a new number for each life of replica 0
    LEADER/count                 of how many replicas
    LEADER/join/N                what replica N asked with last: a nonce, and its hello
    LEADER/place/NONCE           the answer: the group's number and members, or why not

Must not know: Redis, vLLM, versions, the optimizer.
Invariants: the store listens on the address that was named, and nowhere else. What asks and what answers carries a
digest made with the secret: a replica of another fleet is not let in. The store and the connections between members are
not encrypted, and torch.distributed checks nobody: whoever reaches them can stop training or change gradients.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import msgpack
import torch
import torch.distributed as dist

from worker.distributed import device_watch
from worker.distributed.asking import Asker, Away, OverError
from worker.distributed.errors import GroupLostError, RendezvousError
from worker.distributed.group import Group
from worker.utils.messages import WireError, unpack

T = TypeVar("T")

MAX_REPLICAS = 64
PACE = 0.05
"""Seconds between two looks."""
KNOCK_SECONDS = 5.0
"""How long an answer is waited for where a packet may be lost on its way."""
CLIENT_SECONDS = 600.0
"""How long torch tries to reach a replica 0 that does not answer, until it writes a trace of its stack."""
LOST = "no connection, or one that was lost"
Check = Callable[[dict[str, Any]], str | None]
"""Given a hello: why its replica cannot take part; None if it can."""


@dataclass(frozen=True)
class Address:
    """Where the store listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """HOST:PORT. Raises `RendezvousError`."""
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise RendezvousError(f"--rendezvous {text}: write HOST:PORT, as 127.0.0.1:29400")
        return cls(host.strip("[]"), int(port))

    @property
    def is_loopback(self) -> bool:
        return self.host == "localhost" or self.host.startswith("127.") or self.host == "::1"


class Rendezvous:
    """number: this replica's, of `count`. seconds: how long a member is waited for. kept: the store is another
    process's (torchrun's agent), which everybody finds at `address`."""

    def __init__(
        self, address: Address, number: int, count: int, *, seconds: float, secret: str = "", kept: bool = False
    ) -> None:
        if not 1 < count <= MAX_REPLICAS or not 0 <= number < count:
            raise RendezvousError(
                f"--replica {number}/{count}: write I/N, with N from 2 to {MAX_REPLICAS} and I below N"
            )
        self.address, self.number, self.count = address, number, count
        self.seconds, self._secret, self._kept = seconds, secret.encode(), kept
        self._store: Any = None
        self._leader = ""
        self._groups = 0
        self._answered: dict[int, str] = {}
        self._asker, self._away, self._silent = Asker(), Away(), Away(KNOCK_SECONDS)
        if address.is_loopback:  # torch.distributed would listen on the host's other addresses
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, "lo")
        device_watch.watch_alone()

    # -- replica 0 ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Replica 0: keep the store. Raises `RendezvousError` where the address cannot be listened on."""
        try:
            self._store = self._client() if self._kept else self._listen()
        except (OSError, RuntimeError) as error:
            raise RendezvousError(
                f"--rendezvous {self.address.host}:{self.address.port} cannot be used ({error}): is another replica 0"
                " running? Name another port to all replicas"
            ) from None
        self._leader = secrets.token_hex(8)
        self._store.set(f"{self._leader}/count", str(self.count).encode())
        self._store.set("leader", self._leader.encode())

    def asking(self) -> list[int]:
        """Replica 0: who asked to be let in and has no answer yet."""
        keys = {n: f"{self._leader}/join/{n}" for n in range(1, self.count)}
        return [n for n, key in keys.items() if self._store.check([key]) and self._asked(n)[0] != self._answered.get(n)]

    def form(
        self, expected: Collection[int], wait: float, fits: Check, stopping: Callable[[], bool] = lambda: False
    ) -> Group | None:
        """Replica 0: a group of those who ask, as soon as all who are `expected` do, and at the latest after `wait`
        seconds or once `stopping()`; None if nobody does. Raises `GroupLostError` where one of them is gone again."""
        deadline = time.monotonic() + wait
        while not set(expected) <= set(self.asking()) and time.monotonic() < deadline and not stopping():
            time.sleep(PACE)
        let_in: dict[int, str] = {}
        for number in self.asking():
            nonce, hello = self._asked(number)
            self._answered[number] = nonce
            reason = "its TANDEM_REPLICAS_SECRET is not that of replica 0" if hello is None else fits(hello)
            if reason is None:
                let_in[number] = nonce
            else:
                self.refuse(number, reason)
        if not let_in:
            return None
        members = [0, *let_in]
        self._groups += 1
        for nonce in let_in.values():
            self._answer(nonce, {"group": self._groups, "members": members})
        return self._connect(self._groups, members)

    def refuse(self, number: int, reason: str) -> None:
        """Replica 0: `number`, which asks, is told why it cannot take part; its worker ends."""
        nonce, _ = self._asked(number)
        self._answered[number] = nonce
        self._answer(nonce, {"refused": reason})

    def _asked(self, number: int) -> tuple[str, dict[str, Any] | None]:
        """(nonce, hello) of the last time; hello None: made with another secret, or no message at all."""
        raw = bytes(self._store.get(f"{self._leader}/join/{number}"))
        try:
            message = unpack(raw)
            nonce, body, mac = str(message["nonce"])[:64], bytes(message["hello"]), bytes(message["mac"])
            fine = hmac.compare_digest(mac, self._mac(f"{number} {nonce}", body))
            return nonce, unpack(body) if fine else None
        except (WireError, ValueError, KeyError, TypeError):
            return hashlib.sha256(raw).hexdigest(), None

    def _answer(self, nonce: str, answer: dict[str, Any]) -> None:
        body = msgpack.packb(answer)
        message = {"answer": body, "mac": self._mac(f"answer {nonce}", body)}
        self._store.set(f"{self._leader}/place/{nonce}", msgpack.packb(message))

    # -- every other one ------------------------------------------------------------------------------------------

    def join(self, hello: dict[str, Any], stopping: Callable[[], bool]) -> Group | None:
        """Ask to be let in, until it is so; None once `stopping()`. Raises `RendezvousError` when it is refused."""
        while not stopping():
            try:
                if self._store is None:
                    self._knock()
                    self._store = self._patiently(self._client, stopping)
                answer = self._ask(hello, stopping)
            except (RuntimeError, OSError) as error:  # nobody is there (any more)
                self._store = None
                self._say(self._away, getattr(error, "strerror", None) or LOST)
                time.sleep(10 * PACE)
                continue
            except OverError:
                break
            self._away.back()
            if answer is None:
                continue
            if "refused" in answer:
                raise RendezvousError(f"replica {self.number} is refused by replica 0: {answer['refused']}")
            with contextlib.suppress(GroupLostError):  # one of them is gone already: ask again
                return self._connect(int(answer["group"]), [int(one) for one in answer["members"]])
        return None

    def _knock(self) -> None:
        """Raises OSError where nobody listens: torch's client would write traces of its stack to the log, at each
        try."""
        socket.create_connection((self.address.host, self.address.port), KNOCK_SECONDS).close()

    def _say(self, away: Away, why: str) -> None:
        who = f"replica {self.number} waits for replica 0 at {self.address.host}:{self.address.port} ({why})"
        away.say(who, f"it is let in when `tandem worker --replica 0/{self.count}` runs there")

    def _patiently(self, work: Callable[[], T], stopping: Callable[[], bool]) -> T:
        """`work()`, which asks replica 0. Raises `OverError` once `stopping()`."""
        answer = self._asker.call(work, stopping, lambda: self._say(self._silent, "it does not answer"))
        self._silent.back()
        return answer

    def _ask(self, hello: dict[str, Any], stopping: Callable[[], bool]) -> dict[str, Any] | None:
        """The answer; None if replica 0 is another one now."""
        store, ask = self._store, partial(self._patiently, stopping=stopping)
        if not ask(lambda: store.check(["leader"])):
            time.sleep(PACE)
            return None
        nonce, body = secrets.token_hex(8), msgpack.packb(hello)
        self._leader = ask(lambda: store.get("leader")).decode()
        ask(self._check_count)
        asked = {"nonce": nonce, "hello": body, "mac": self._mac(f"{self.number} {nonce}", body)}
        ask(lambda: store.set(f"{self._leader}/join/{self.number}", msgpack.packb(asked)))
        key = f"{self._leader}/place/{nonce}"
        while not ask(lambda: store.check([key])):
            if stopping() or ask(lambda: store.get("leader")).decode() != self._leader:
                return None
            time.sleep(PACE)
        message = unpack(bytes(ask(lambda: store.get(key))))
        if not hmac.compare_digest(bytes(message["mac"]), self._mac(f"answer {nonce}", bytes(message["answer"]))):
            raise RendezvousError("TANDEM_REPLICAS_SECRET is not that of replica 0: give all replicas the same one")
        return unpack(bytes(message["answer"]))

    def _check_count(self) -> None:
        """Replica 0 looks for nobody whose number is not below its own N: it could be waited for for ever."""
        said = bytes(self._store.get(f"{self._leader}/count"))
        if said != str(self.count).encode():
            raise RendezvousError(
                f"--replica {self.number}/{self.count}: replica 0 was started for {said[:20].decode(errors='replace')}"
                " replicas; give all of them the same N"
            )

    # -- both -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the store; whoever waits at it notices."""
        self._asker.close()
        self._store = None

    def _connect(self, number: int, members: list[int]) -> Group:
        """Raises `GroupLostError`."""
        prefix = f"{self._leader}/{number}"
        place = members.index(self.number)
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=dist.PrefixStore(prefix, self._store),
                rank=place,
                world_size=len(members),
                timeout=timedelta(seconds=self.seconds),
            )
        except (RuntimeError, ValueError) as error:
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
            raise GroupLostError(f"the group of replicas {members} could not be made ({error})") from error
        return Group(self._store, prefix, members, place, self.seconds)

    def _listen(self) -> Any:
        """A store on our own socket: torch's would listen on every address of the host."""
        family = socket.AF_INET6 if ":" in self.address.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        with contextlib.ExitStack() as given_up:
            given_up.callback(listening.close)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((self.address.host, self.address.port))
            listening.listen()
            given_up.pop_all()
        return dist.PrefixStore(
            "tandem",
            dist.TCPStore(
                self.address.host,
                self.address.port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listening.detach(),
                timeout=timedelta(seconds=self.seconds),
            ),
        )

    def _client(self) -> Any:
        host, port, limit = self.address.host, self.address.port, timedelta(seconds=CLIENT_SECONDS)
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
        store.set_timeout(timedelta(seconds=5))
        return dist.PrefixStore("tandem", store)

    def _mac(self, purpose: str, body: bytes) -> bytes:
        return hmac.digest(self._secret, f"tandem {purpose} ".encode() + body, "sha256")
