"""`tandem enqueue` and `tandem version` as a user runs them: a process, files, pipes and a terminal."""

import json
import os
import pty
import subprocess
import time
from io import BufferedReader, BytesIO
from pathlib import Path

import pytest
import redis
from enqueue_parts import TALK, TANDEM, queued, tandem
from hypothesis import given
from hypothesis import strategies as st

from producer import jsonl, keys
from producer.eviction import Eviction
from worker.testing.redis_server import RedisServer
from worker.versions.eviction_watch import publish


def line(job_id: str, **more: object) -> bytes:
    return json.dumps({"id": job_id, "messages": TALK, **more}).encode()


def test_a_good_file_twice(tmp_path: Path, redis_url: str, store: redis.Redis) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + line("a") + b"\r\n\n" + line("b"))  # a mark, DOS ends, a blank, no end of line
    first = tandem("enqueue", str(file), url=redis_url)
    assert (first.returncode, first.stdout, first.stderr) == (0, "queued 2, already known 0, rejected 0\n", "")
    second = tandem("enqueue", str(file), url=redis_url)
    assert (second.returncode, second.stdout) == (0, "queued 0, already known 2, rejected 0\n")
    assert queued(store) == ["a", "b"]


def test_bad_lines_are_named_and_stop_nothing(tmp_path: Path, redis_url: str, store: redis.Redis) -> None:
    file = tmp_path / "talks.jsonl"
    bad = [b"{", b'{"id": "\xff"}', line("c", weight=7), b"[" * 100_000, b'{"messages": [NaN]}', b"9" * 9000]
    long = b'{"id": "' + b"x" * jsonl.MAX_LINE + b'"}'
    file.write_bytes(b"\n".join([line("a"), *bad, b"", long, line("z")]))
    done = tandem("enqueue", str(file), url=redis_url)
    assert (done.returncode, done.stdout) == (1, "queued 2, already known 0, rejected 7\n")
    assert queued(store) == ["a", "z"]
    errors = done.stderr.splitlines()
    wanted = [
        (2, "not valid JSON"), (3, "not UTF-8: byte 9"), (4, "weight: must be"), (5, "nested too deeply"),
        (6, "NaN"), (7, "too long"), (9, "longer than 33,554,432 bytes"),
    ]  # fmt: skip
    assert len(errors) == len(wanted)
    for error, (number, says) in zip(errors, wanted, strict=True):
        assert error.startswith(f"error: {file}:{number}: ") and says in error and len(error) < 300 + len(str(file))


def test_a_pipe_is_queued_as_it_comes(redis_url: str, store: redis.Redis) -> None:
    """Each line is on the queue before the next is written, though the pipe stays open."""
    with subprocess.Popen(
        [*TANDEM, "enqueue", "-", "--redis", redis_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for job_id in ("a", "b"):
            process.stdin.write(line(job_id) + b"\n")
            process.stdin.flush()
            while job_id not in queued(store):  # the test's own time limit ends this if it never comes
                time.sleep(0.02)
        process.stdin.close()
        assert process.stdout.read() == b"queued 2, already known 0, rejected 0\n"
    assert process.returncode == 0


def test_a_pipe_that_goes_on_is_said_to_go_on(redis_url: str) -> None:
    environment = {**os.environ, "TANDEM_PROGRESS": ""}
    with subprocess.Popen(
        [*TANDEM, "enqueue", "-", "--redis", redis_url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(line("a", messages=[TALK[0], {**TALK[1], "content": "x" * 300_000}]) + b"\n")
        process.stdin.flush()
        lines = (process.stderr.readline() for _ in range(20))  # the first is the note on eviction
        said = next((one for one in lines if one.startswith(b"enqueue: 0.3 MB, ")), b"")
        process.stdin.close()
        assert process.stdout.read() == b"queued 1, already known 0, rejected 0\n"
    assert said.endswith(b" s so far\n"), "what was read is counted"


def test_a_terminal_gets_readable_errors(tmp_path: Path, redis_url: str) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_bytes(line("a") + b"\n{\n")
    ours, theirs = pty.openpty()
    done = subprocess.run([*TANDEM, "enqueue", str(file), "--redis", redis_url], stderr=theirs, stdout=subprocess.PIPE)
    os.close(theirs)
    shown = b""
    with open(ours, "rb", buffering=0) as terminal:
        try:
            while piece := terminal.read(4096):
                shown += piece
        except OSError:  # Linux says so when the other end is closed
            pass
    assert done.stdout == b"queued 1, already known 0, rejected 1\n"
    assert f"error: {file}:2: not valid JSON".encode() in shown


def test_redis_away(tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_bytes(b"\n" + line("a") + b"\n")
    done = tandem("enqueue", str(file), url=f"unix://:hunter2@{tmp_path}/none")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: cannot reach Redis at unix://{tmp_path}/none")
    assert "hunter2" not in done.stderr and "Traceback" not in done.stderr


def test_a_redis_that_goes_away_in_the_middle(tmp_path: Path) -> None:
    with (
        RedisServer(tmp_path / "redis") as server,
        subprocess.Popen(
            [*TANDEM, "enqueue", "-", "--redis", server.url], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process,
    ):
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(line("a") + b"\n")
        process.stdin.flush()
        with redis.Redis.from_url(server.url) as client:
            while "a" not in queued(client):
                time.sleep(0.02)
        server.stop()
        process.stdin.write(line("b") + b"\n")
        process.stdin.close()
        said = process.stderr.read().decode()
    assert process.returncode == 1
    assert "error: cannot reach Redis" in said and "Everything before line 2 of <stdin> was dealt with" in said


def test_a_redis_that_evicts_is_named_and_so_are_its_victims(tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    talk = [TALK[0], {**TALK[1], "content": os.urandom(4000).hex()}]
    file.write_bytes(b"\n".join(line(f"t{i}", messages=talk) for i in range(3000)))
    with RedisServer(tmp_path / "redis") as server, redis.Redis.from_url(server.url) as client:
        limit = client.info("memory")["used_memory"] + 6_000_000
        client.config_set("maxmemory", limit)
        client.config_set("maxmemory-policy", "allkeys-lru")
        publish(client, Eviction("allkeys-lru", limit))
        done = tandem("enqueue", str(file), url=server.url)
        gone = [f"t{i}" for i in range(3000) if not client.exists(f"rq:job:t{i}")]
    assert gone, "nothing was evicted"
    warning, *errors = done.stderr.splitlines()
    assert warning.startswith("warning: Redis evicts keys") and "(maxmemory-policy allkeys-lru)" in warning
    named = [line.split()[2] for line in errors]
    assert errors == [f"error: {file}:{int(i[1:]) + 1}: {i} was queued, and Redis has evicted it" for i in named]
    assert set(named) <= set(gone) and len(named) > 0.9 * len(gone)  # a few more may go after the look
    assert done.stdout == f"queued 3,000, already known 0, rejected 0, lost {len(named):,}\n" and done.returncode == 1


def test_before_the_first_worker_the_policy_is_unknown(tmp_path: Path, redis_url: str) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_bytes(line("a"))
    done = tandem("enqueue", str(file), url=redis_url)
    assert done.returncode == 0
    assert done.stderr == "note: eviction policy of Redis unknown: no worker has published it yet\n"


def test_a_file_that_is_not_there(redis_url: str) -> None:
    done = tandem("enqueue", "nowhere.jsonl", url=redis_url)
    assert done.returncode == 2 and "nowhere.jsonl" in done.stderr


def test_version(redis_url: str, store: redis.Redis) -> None:
    assert tandem("version", url=redis_url).stdout == "0\n"
    store.set(keys.VERSION, 12)
    assert tandem("version", "--redis", redis_url, url="redis://127.0.0.1:1").stdout == "12\n"


@given(st.lists(st.binary(max_size=12).filter(lambda piece: b"\n" not in piece)), st.integers(1, 7), st.integers(1, 10))
def test_lines_do_not_depend_on_how_they_arrive(pieces: list[bytes], block: int, longest: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "BLOCK", block)
        patch.setattr(jsonl, "MAX_LINE", longest)
        got = [item for lines, _ in jsonl.blocks(BufferedReader(BytesIO(b"\n".join(pieces)))) for item in lines]  # type: ignore[arg-type]
    if pieces and not pieces[-1]:
        pieces = pieces[:-1]
    assert got == [(n, None if len(p) > longest else p) for n, p in enumerate(pieces, start=1)]
