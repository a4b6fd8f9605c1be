"""The pause and its lease, on a real server: who may hold it, what requests see of it, what a kill leaves behind."""

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import PATIENCE, until
from server_options import SERVER_OPTIONS
from serving_parts import LONG, Background, Victim, completion, events, inside, metric, request, streamed_tokens

from worker.serving.control_client import ServerControl, ServerError, ServerGoneError, server_state
from worker.serving.vllm.framing import MAX_REQUEST
from worker.shared_weights.attach import attach
from worker.shared_weights.weights_client import read_header
from worker.testing.server_process import ServerProcess
from worker.utils import unix_socket

pytestmark = pytest.mark.server


@pytest.fixture
def control(server: ServerProcess) -> Iterator[ServerControl]:
    """The session's server with us as its trainer; its version is put back afterwards."""
    before = read_header(server.run_dir)
    trainer = ServerControl(server.run_dir, "test")
    trainer.connect()
    yield trainer
    trainer.close()
    _put_back(server, before)


def _put_back(server: ServerProcess, before: dict[str, Any]) -> None:
    """Other tests share the server: give it the version it had."""
    if read_header(server.run_dir) == before:
        return
    with ServerControl(server.run_dir, "put back") as trainer:
        trainer.pause()
        attach(server.run_dir).header.adopt(before["lineage"], before["version"])
        trainer.resume(before["version"])


def _serving(server: ServerProcess) -> bool:
    state = server_state(server.run_dir)
    return state["state"] == "serving" and state["trainer"] is None


def test_the_state_is_the_headers(server: ServerProcess, control: ServerControl) -> None:
    header = read_header(server.run_dir)
    state = control.state()
    assert (state["version"], state["lineage"], state["state"]) == (header["version"], header["lineage"], "serving")
    status, _, body = request(server.url, "GET", "/weights/version")
    assert status == 200
    assert msgpack.packb(state["lineage"])[2:] in body


def test_a_second_trainer_is_refused_by_the_firsts_name(server: ServerProcess, control: ServerControl) -> None:
    with pytest.raises(ServerError, match=r"trainer 'test' \(process \d+, since .*stop it first"):
        ServerControl(server.run_dir, "second").connect(leaving=0)
    control.pause()  # the first still holds its place
    control.resume(control.state()["version"])
    control.close()
    until(lambda: _serving(server), "the first trainer's place is free")
    with ServerControl(server.run_dir, "second") as second:
        assert second.state()["trainer"]["name"] == "second"


def test_pause_freezes_and_resume_needs_the_headers_version(server: ServerProcess, control: ServerControl) -> None:
    version = control.state()["version"]
    with pytest.raises(ServerError, match="not paused"):
        control.resume(version)
    (waiting,) = inside(server, True, at=control.pause, undo=lambda: control.resume(version))
    with pytest.raises(ServerError, match="paused already"):
        control.pause()
    frozen = control.state()
    assert (frozen["state"], frozen["in_flight"], frozen["running"]) == ("paused", 1, 1)
    stood = control.stood_s
    with pytest.raises(ServerError, match=f"the header beside the weights says CLEAN, version {version}"):
        control.resume(version + 1)
    header = attach(server.run_dir).header
    header.begin(control.fence)
    with pytest.raises(ServerError, match="APPLYING"):
        control.resume(version)
    header.abandon()
    assert control.state()["state"] == "paused" and control.stood_s == stood
    control.resume(version)
    assert control.stood_s > stood, "a request stood still"
    status, _, body = waiting.result()
    assert status == 200
    assert streamed_tokens(body) == LONG
    stood, paused = control.stood_s, control.paused_s
    until(lambda: control.state()["running"] == 0, "vLLM has let go of the request")
    control.pause()
    control.resume(version)
    assert control.stood_s == stood and control.paused_s > paused, "nobody did"


def test_no_request_fails_under_many_pauses(server: ServerProcess, control: ServerControl) -> None:
    version = control.state()["version"]
    requests = [Background(server, 150, stream=bool(number % 2)) for number in range(8)]
    for _ in range(12):
        assert control.pause() > 0
        requests.append(Background(server, 20, stream=True))  # arrives during a pause
        control.resume(version)
    for one in requests:
        status, headers, body = one.result()
        assert (status, headers["x-weight-version"]) == (200, str(version))
        assert b'"finish_reason":"length"' in body
        assert b"error" not in body


def test_answers_carry_the_versions_they_span(server: ServerProcess, control: ServerControl) -> None:
    first = control.state()["version"]
    _, headers, _ = completion(server, 2)
    assert headers["x-weight-version"] == str(first)
    stream, whole = inside(server, True, False, at=control.pause, undo=lambda: control.resume(first))
    during = Background(server, 2, stream=False)
    header = attach(server.run_dir).header
    header.begin(control.fence)
    header.finish(first + 1)
    control.resume(first + 1)
    _, headers, body = stream.result()
    assert headers["x-weight-version"] == str(first)
    assert events(body)[-1] == f": weight-version {first}-{first + 1}"
    assert events(body)[-2] == "data: [DONE]"
    assert whole.result()[1]["x-weight-version"] == f"{first}-{first + 1}"
    assert during.result()[1]["x-weight-version"] in (str(first + 1), f"{first}-{first + 1}")
    assert completion(server, 2)[1]["x-weight-version"] == str(first + 1)
    assert events(completion(server, 2, stream=True)[2])[-1] == f": weight-version {first + 1}"


@pytest.mark.parametrize("steps", [(), ("begin", "finish")], ids=["before", "after"])
def test_a_clean_server_goes_on_when_its_trainer_is_killed(server: ServerProcess, steps: tuple[str, ...]) -> None:
    before = read_header(server.run_dir)
    victim = Victim(server.run_dir)
    (running,) = inside(server, True, at=lambda: victim.do("pause"), undo=lambda: victim.do("resume"), tokens=600)
    victim.do(*steps)
    assert server_state(server.run_dir)["state"] == "paused"
    arriving = Background(server, 5, stream=False)
    victim.kill()
    until(lambda: _serving(server), "the server goes on")
    applied = before["version"] + ("finish" in steps)
    assert server_state(server.run_dir)["version"] == applied
    status, headers, body = running.result()
    assert (status, headers["x-weight-version"]) == (200, str(before["version"]))
    assert b'"finish_reason":"length"' in body
    assert arriving.result()[1]["x-weight-version"] in (str(applied), f"{before['version']}-{applied}")
    _put_back(server, before)


def test_a_server_that_is_written_to_goes_on_and_its_answers_say_so(
    server: ServerProcess, control: ServerControl
) -> None:
    first = control.state()["version"]
    (running,) = inside(server, True, at=control.begin_hogwild, undo=lambda: (control.pause(), control.resume(first)))
    state = control.state()
    assert (state["state"], state["version"], state["written"]) == ("serving", first, first + 1)
    with pytest.raises(ServerError, match="begin_hogwild"):
        control.begin_hogwild()
    with pytest.raises(ServerError, match="not paused"):
        control.resume(first)
    header = attach(server.run_dir).header
    header.begin(control.fence)
    status, headers, _ = completion(server, 2)
    assert (status, headers["x-weight-version"]) == (200, f"{first}-{first + 1}")
    header.finish(first + 1)
    control.pause()
    with pytest.raises(ServerError, match="begin_hogwild"):
        control.begin_hogwild()
    control.resume(first + 1)
    assert "written" not in control.state()
    status, _, body = running.result()
    assert status == 200 and events(body)[-1] == f": weight-version {first}-{first + 1}"
    assert completion(server, 2)[1]["x-weight-version"] == str(first + 1)


@pytest.mark.parametrize("steps", [("hogwild",), ("hogwild", "begin", "finish")], ids=["before", "after"])
def test_a_server_goes_on_when_who_wrote_to_it_is_killed_with_whole_weights(
    server: ServerProcess, steps: tuple[str, ...]
) -> None:
    before = read_header(server.run_dir)
    victim = Victim(server.run_dir)
    running = Background(server, 300, stream=False)
    victim.do(*steps)
    assert server_state(server.run_dir)["written"] == before["version"] + 1
    victim.kill()
    until(lambda: _serving(server) and "written" not in server_state(server.run_dir), "the lease has ended")
    applied = before["version"] + ("finish" in steps)
    assert server_state(server.run_dir)["version"] == applied
    assert running.result()[0] == 200
    assert completion(server, 2)[1]["x-weight-version"] == str(applied)
    _put_back(server, before)


MALFORMED = st.one_of(
    st.binary(max_size=64),
    st.binary(min_size=1, max_size=64).map(lambda body: struct.pack(">I", len(body)) + body),
    st.integers(MAX_REQUEST + 1, 2**32 - 1).map(lambda length: struct.pack(">I", length)),
    st.dictionaries(
        st.sampled_from(["op", "name", "version", "seconds", "x"]),
        st.one_of(
            st.none(), st.integers(-(2**63), 2**64 - 1), st.text(max_size=200), st.binary(max_size=9), st.floats()
        )
        | st.sampled_from(["resume", "pause", "hello", "begin_hogwild", "renew"])
        | st.lists(st.integers(0, 9), max_size=3),
    ).map(lambda message: unix_socket.pack(message)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.lists(MALFORMED, min_size=1, max_size=4).map(b"".join))
def test_malformed_messages_get_an_error_and_change_nothing(server: ServerProcess, sent: bytes) -> None:
    with unix_socket.connect(str(server.run_dir / "control.sock"), timeout=PATIENCE) as sock:
        try:
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused already, in the middle of it
        replies = []
        try:
            while (reply := unix_socket.receive(sock)) is not None:  # until the server closes: it never hangs
                replies.append(reply)
        except unix_socket.WireError as error:
            assert "reset" in str(error)
    # Only a well-formed hello or pause could be answered with anything else than an error.
    assert all("error" in reply or "version" in reply or "seconds" in reply for reply in replies)
    until(lambda: _serving(server), "the server serves, without a trainer")


def test_a_request_that_never_ends_does_not_hold_up_others(server: ServerProcess, control: ServerControl) -> None:
    with unix_socket.connect(str(server.run_dir / "control.sock")) as sock:
        sock.sendall(b"\x00\x00")
        control.pause()
        assert control.state()["state"] == "paused"
        control.resume(control.state()["version"])
        assert control.state()["state"] == "serving"


@pytest.fixture(scope="module")
def recomputing(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of the last tests' own: it ends with them."""
    options = [*SERVER_OPTIONS, "--running", "recompute"]
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("recomputing"), extra=options) as server:
        yield server


def test_a_recomputing_server_throws_a_request_back_and_the_next_update_waits_for_it(
    recomputing: ServerProcess,
) -> None:
    """The second pause comes at once, and yet finds the request running again."""
    server, counter = recomputing, "vllm:num_preemptions_total"
    with ServerControl(server.run_dir, "recompute") as control:
        version, before = control.state()["version"], metric(server, counter)
        (running,) = inside(server, True, at=control.pause, undo=lambda: control.resume(version))
        control.resume(version)
        control.pause()
        control.resume(version)
        status, _, body = running.result()
    assert status == 200 and streamed_tokens(body) == LONG
    assert metric(server, counter) >= before + 2


def test_a_torn_server_says_so_to_everyone(recomputing: ServerProcess) -> None:
    """And one that is killed, to its trainer: last, since it is the same server."""
    with recomputing as server:
        completion(server, 2)
        half_sent = socket.create_connection(urlsplit(server.url).netloc.split(":"))  # and never ends
        half_sent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        victim = Victim(server.run_dir)
        stream, whole = inside(server, True, False, at=lambda: victim.do("pause"), undo=lambda: victim.do("resume"))
        victim.do("begin")
        arriving = Background(server, 5, stream=True)
        victim.kill()
        until(lambda: server_state(server.run_dir)["state"] == "torn", "the server is torn")

        reason = server_state(server.run_dir)["reason"]
        assert f"process {victim.pid}" in reason
        assert "ended while it wrote version 1" in reason
        status, _, body = stream.result()
        assert status == 200, "its headers had left before"
        assert reason in events(body)[-2]
        assert "[DONE]" not in body.decode()
        for status, headers, body in (whole.result(), arriving.result(), completion(server, 2)):
            assert (status, headers["content-type"]) == (503, "application/json")
            assert reason.encode() in body
            assert "x-weight-version" not in headers
        for path, expected in {"/v1/models": 503, "/health": 503, "/metrics": 200, "/weights/version": 200}.items():
            status, _, body = request(server.url, "GET", path)
            assert status == expected, path
            assert (reason.encode() in body) == (path != "/metrics")

        trainer = ServerControl(server.run_dir, "next")
        assert trainer.connect()["state"] == "torn"
        with pytest.raises(ServerError, match="not paused"):
            trainer.resume(0)
        trainer.pause()
        assert completion(server, 2)[0] == 503, "refused until the weights are whole"
        with pytest.raises(ServerError, match="APPLYING, version 0"):
            trainer.resume(0)
        attach(server.run_dir).header.finish(1)  # as a trainer that has restored them
        trainer.resume(1)
        status, headers, _ = completion(server, 2)
        assert (status, headers["x-weight-version"]) == (200, "1")
        assert server_state(server.run_dir).get("reason") is None
        half_sent.close()
        server.stop()
        with pytest.raises(ServerGoneError, match=r"start it again|gone"):
            trainer.state()
        with pytest.raises(unix_socket.WireError, match="tandem serve"):
            ServerControl(server.run_dir, "late").connect()
        with pytest.raises(unix_socket.WireError, match="tandem serve"):
            read_header(server.run_dir)
