"""Replicas meet where they were told to, nowhere else, and strangers are not let in."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from chaos_processes import Forked
from patience import PATIENCE, until
from replica_parts import follow_until_told, free_port, lead_and_be_stopped, wait_for_a_command

from worker.cli.main import tandem
from worker.distributed.checksum import checksum
from worker.distributed.errors import RendezvousError
from worker.distributed.rendezvous import Address, Rendezvous
from worker.utils.process_state import is_stopped

LEVEL = "TORCH_CPP_LOG_LEVEL"


def fits(hello: dict[str, Any]) -> str | None:
    return None if hello.get("model") == "tiny" else "model is another one"


@pytest.fixture
def leader() -> Iterator[Rendezvous]:
    made = Rendezvous(Address("127.0.0.1", free_port()), 0, 3, seconds=30, secret="ours")
    made.open()
    yield made
    made.close()


def asking(leader: Rendezvous, secret: str, hello: dict[str, Any]) -> str:
    """What replica 1 is told that asks with these."""
    other = Rendezvous(leader.address, 1, 3, seconds=30, secret=secret)
    found: list[str] = []

    def ask() -> None:
        try:
            other.join(hello, lambda: False)
        except RendezvousError as error:
            found.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: leader.asking() == [1], "it asks")
    assert leader.form([1], PATIENCE, fits) is None and leader.asking() == []
    thread.join(PATIENCE)
    other.close()
    return found[0]


def test_another_secret_or_another_model_is_refused_in_a_sentence(leader: Rendezvous) -> None:
    assert "TANDEM_REPLICAS_SECRET is not that of replica 0" in asking(leader, "theirs", {"model": "tiny"})
    assert "replica 1 is refused by replica 0: model is another one" in asking(leader, "ours", {"model": "large"})


def test_one_that_counts_other_replicas_is_refused_before_it_waits(leader: Rendezvous) -> None:
    """Replica 3 of 4 would never be looked at by a replica 0 that was started for 3."""
    for number, count in ((1, 2), (3, 4)):
        other = Rendezvous(leader.address, number, count, seconds=30, secret="ours")
        with pytest.raises(RendezvousError, match=f"--replica {number}/{count}: replica 0 was started for 3 replicas"):
            other.join({"model": "tiny"}, lambda: False)
        other.close()
    assert leader.asking() == []


def test_where_replica_0_is_not_there_one_line_says_so_and_no_trace(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits(looks: int) -> list[str]:
        caplog.clear()
        left = iter([False] * looks)
        other = Rendezvous(Address("127.0.0.1", port), 1, 2, seconds=30)
        assert other.join({}, lambda: next(left, True)) is None
        return [record.getMessage() for record in caplog.records]

    port = free_port()
    said = f"replica 1 waits for replica 0 at 127.0.0.1:{port} (Connection refused)"
    (once,) = waits(3)
    assert once == f"{said}: it is let in when `tandem worker --replica 0/2` runs there"
    assert "c10d" not in capfd.readouterr().err
    monkeypatch.setattr("worker.distributed.asking.AWAY_SECONDS", 0)
    assert [line.startswith(f"{said}, for 0 min so far: ") for line in waits(3)] == [False, True, True]


@pytest.mark.parametrize("joined", [False, True], ids=["asks to be let in", "waits for a command"])
def test_one_whose_replica_0_is_stopped_says_so_and_can_be_told_to_stop(tmp_path: Path, joined: bool) -> None:
    port, out = free_port(), tmp_path / "out"
    leader = Forked(lead_and_be_stopped, (port, str(out), joined), {}, tmp_path / "0.log")
    until(out.exists if joined else lambda: is_stopped(leader.pid), "replica 0 leads, or is stopped")
    other = Forked(follow_until_told, (port,), {}, tmp_path / "1.log")
    until(lambda: "does not answer" in other.said() or not other.alive(), "it notices")
    assert is_stopped(leader.pid) and ("joined" in other.said()) == joined, other.said()
    os.kill(other.pid, signal.SIGTERM)
    assert other.ended() == 0, other.said()
    leader.kill()


def test_torch_is_told_to_keep_its_traces_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica 0 that is killed would else be two screens of them at every other one."""
    for before, after in ((None, "ERROR"), ("INFO", "INFO")):
        monkeypatch.setenv(LEVEL, before or "")
        if before is None:
            monkeypatch.delenv(LEVEL)
        tandem.get_command(click.Context(tandem), "worker")
        assert os.environ[LEVEL] == after


def test_what_is_no_message_is_refused_too(leader: Rendezvous) -> None:
    for nonsense in (b"", b"\x80", b"\xc1garbage", b"x" * 100_000):
        leader._store.set(f"{leader._leader}/join/2", nonsense)
        assert leader.asking() == [2] and leader.form([2], 0, fits) is None and leader.asking() == []


def test_nobody_is_waited_for_longer_than_said(leader: Rendezvous) -> None:
    assert leader.form([1, 2], 0.1, fits) is None
    looks = iter([False, False, True])
    assert leader.form([1, 2], 1e9, fits, lambda: next(looks)) is None and next(looks, None) is None, (
        "nor by one who ends"
    )


def test_it_listens_on_the_address_that_was_named_alone(leader: Rendezvous) -> None:
    port = f"{leader.address.port:04X}"
    with open("/proc/net/tcp") as v4, open("/proc/net/tcp6") as v6:
        listening = [line.split()[1] for line in [*v4, *v6] if line.split()[3] == "0A"]
    assert [one for one in listening if one.endswith(f":{port}")] == [f"0100007F:{port}"]


def test_an_address_in_use_and_one_that_is_none_are_said(leader: Rendezvous) -> None:
    with pytest.raises(RendezvousError, match="cannot be used"):
        Rendezvous(leader.address, 0, 3, seconds=30).open()
    for text in ("host", "host:", ":1", "host:70000", "host:x"):
        with pytest.raises(RendezvousError, match="write HOST:PORT"):
            Address.parse(text)
    assert Address.parse("[::1]:29400") == Address("::1", 29400)
    assert Address("127.0.0.9", 1).is_loopback and not Address("10.0.0.5", 1).is_loopback


def test_a_checksum_sees_one_bit_in_any_tensor() -> None:
    tensors = [torch.arange(6, dtype=torch.bfloat16).view(2, 3), torch.arange(4.0), torch.arange(9, dtype=torch.uint8)]
    known = checksum(tensors)
    assert checksum([one.clone() for one in tensors]) == known
    assert checksum([torch.nn.functional.pad(tensors[0], (0, 2))[:, :3], *tensors[1:]]) == known, "any strides"
    for tensor in tensors:
        flat = tensor.view(torch.uint8).view(-1)
        flat[-1] ^= 1
        assert checksum(tensors) != known
        flat[-1] ^= 1
    assert checksum(tensors) == known


def test_who_waits_for_a_command_learns_that_the_group_is_closed(tmp_path: Path) -> None:
    """Its own connections, to replica 0, need not end for that."""
    port, outs = free_port(), [tmp_path / str(number) for number in range(3)]
    processes = [
        Forked(wait_for_a_command, (n, 3, port, str(out)), {}, tmp_path / f"{n}.log") for n, out in enumerate(outs)
    ]
    until(lambda: all(out.exists() and out.read_text() for out in outs[:2]), "both to have noticed")
    assert "replica was lost" in outs[0].read_text() and outs[1].read_text() == "replica 0 closed the group"
    (tmp_path / "done").touch()
    assert [process.ended() for process in processes] == [0, 0, 0]
