"""Which version a figure is of, while versions come: against a small HTTP server that says what vLLM's would.

Real vLLM, and a real worker beside it: tests/server/test_evaluation_server.py, tests/end_to_end/test_end_to_end.py.
"""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.data.examples import TokenSequence
from worker.operations.evaluation.cases import Case, CaseSet
from worker.operations.evaluation.evaluator import Evaluator, Model
from worker.operations.evaluation.found import SPARE, At, Found
from worker.operations.evaluation.live import LiveError, Server

END = 9
LINEAGE = "a" * 32


class Fake:
    """A server whose word 5 costs 1 nat and word 6 costs 2 at version 1, each a tenth less with every version. It
    answers (5, END)."""

    def __init__(self) -> None:
        self.version, self.lineage, self.state = 1, LINEAGE, "serving"
        self.span: str | None = None
        self.key: str | None = None
        self.ends = True
        self.bodies: list[dict[str, Any]] = []
        self.before: Callable[[int], None] = lambda number: None
        self.looked: Callable[[int], None] = lambda number: None
        self.looks = 0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    self.say(200, {"data": [{"id": "m", "max_model_len": 64}]})
                else:
                    fake.looks += 1
                    fake.looked(fake.looks)
                    self.say(
                        200, {"version": fake.version, "lineage": fake.lineage, "state": fake.state, "reason": "r"}
                    )

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if fake.key and self.headers["authorization"] != f"Bearer {fake.key}":
                    return self.say(401, {})
                fake.bodies.append(body)
                fake.before(len(fake.bodies))
                choices = [fake.choice(body, prompt) | {"index": i} for i, prompt in enumerate(body["prompt"])]
                return self.say(200, {"choices": choices[::-1]})

            def say(self, status: int, answer: Any) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("X-Weight-Version", fake.span or str(fake.version))
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = False
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def choice(self, body: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
        if "prompt_logprobs" in body:
            scored = [None, *({str(t): {"logprob": -(t - 4) * 0.9 ** (self.version - 1)}} for t in prompt[1:])]
            return {"prompt_logprobs": scored, "finish_reason": "length"}
        if not self.ends:
            return {"token_ids": [5], "finish_reason": "length"}
        return {"token_ids": [5, END], "finish_reason": "stop"}

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def fake() -> Iterator[Fake]:
    running = Fake()
    yield running
    running.close()


def sequence(*answer: int) -> TokenSequence:
    return TokenSequence((1, 2, *answer), (False, False, *[True] * len(answer)))


def case(number: int, *answer: int, rejected: tuple[int, ...] = ()) -> Case:
    other = (sequence(*rejected),) if rejected else ()
    return Case(number, f"c-{number}", (sequence(*answer),), other, (1, 2), (*answer, END))


CASES = [case(i, 5) if i % 2 else case(i, 6, 6) for i in range(40)]


def server(fake: Fake, key: str | None = None) -> Server:
    return Server(fake.url, lambda tokens: " ".join(map(str, tokens)), key)


def versions(found: list[Found]) -> set[int]:
    return {one.at.version for one in found}


def test_losses_margins_and_answers(fake: Fake) -> None:
    told: list[int] = []
    first, second, third = server(fake).measure(
        [case(1, 5), case(2, 6, 6), case(3, 5, rejected=(6, 5))], tell=told.append
    )
    assert first.at == At(1, LINEAGE) and (first.score.nll, first.score.tokens, first.score.exact) == (1.0, 1, True)
    assert first.answer == (5,) and first.score.margin is None
    assert (second.score.nll, second.score.loss, second.score.exact) == (4.0, 2.0, False)
    assert third.score.margin == 1.5 - 1.0 and third.score.won is True and told == [3]
    scoring, answering = fake.bodies
    assert scoring["cache_salt"] == answering["cache_salt"] and scoring["store"] is answering["store"] is False
    assert answering["stop_token_ids"] == [END] and answering["max_tokens"] == min(2 * 3 + SPARE, 62)


def test_a_long_context_cuts_no_other_answer(fake: Fake) -> None:
    long = Case(2, "long", (sequence(5),), (), (1,) * 61, (5, END))
    first, second, third = server(fake).measure([case(1, 6, 6, 6), long, case(3, 5)])
    rooms = [(len(body["prompt"]), body["max_tokens"]) for body in fake.bodies if "stop_token_ids" in body]
    assert rooms == [(2, 2 * 4 + SPARE), (1, 64 - 61)]
    assert (first.score.exact, second.score.exact, third.score.exact) == (False, True, True)


def test_half_an_answer_is_a_sentence() -> None:
    """A server that is killed while it answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def half() -> None:
            client, _ = listening.accept()
            with client:
                client.recv(4096)
                client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{")

        thread = threading.Thread(target=half)
        thread.start()
        with pytest.raises(LiveError, match="cannot be asked"):
            Server(f"http://127.0.0.1:{listening.getsockname()[1]}", str).at()
        thread.join()


def test_what_was_measured_is_said_where_redis_went_away(fake: Fake, tmp_path: Path) -> None:
    away = redis.Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0))
    cases = CaseSet("facts.jsonl", (case(1, 5),), "d1", {})
    model = Model(tmp_path, None, None, LINEAGE)  # type: ignore[arg-type]
    evaluator = Evaluator(cases, "facts", model, server(fake), away, tmp_path)
    result = evaluator.live()
    assert result.whole is not None and result.whole.loss == 1.0 and evaluator.unstored
    assert "could not be stored" in result.remarks[0]


def test_an_answer_that_goes_on_is_not_the_reference_that_it_begins_with(fake: Fake) -> None:
    fake.ends = False
    (found,) = server(fake).measure([case(1, 5)])
    assert found.answer == (5,) and found.score.exact is False


def test_without_answers_none_is_asked_for(fake: Fake) -> None:
    (found,) = server(fake).measure([case(1, 5)], answers=False)
    assert found.answer is None and found.score.exact is None and len(fake.bodies) == 1


def test_each_chunk_has_a_salt_of_its_own(fake: Fake) -> None:
    server(fake).measure(CASES)
    assert len({body["cache_salt"] for body in fake.bodies}) == 3, "40 cases, 16 a chunk"


def test_a_version_that_moves_within_a_chunk_or_between_two_leaves_no_older_figure(fake: Fake) -> None:
    def before(number: int) -> None:
        fake.version += number in (2, 7)

    fake.before = before
    found = server(fake).measure(CASES)
    assert versions(found) == {3}
    assert [round(one.score.nll, 6) for one in found[:2]] == [round(4 * 0.9**2, 6), round(0.9**2, 6)]


def test_a_version_that_never_stands_still_is_an_error(fake: Fake) -> None:
    def before(number: int) -> None:
        fake.version += 1

    fake.before = before
    with pytest.raises(LiveError, match=r"tandem pause.*--at VERSION"):
        server(fake).measure(CASES[:4])


def test_where_versions_come_between_all_chunks_each_figure_has_its_own(fake: Fake) -> None:
    def looked(number: int) -> None:
        fake.version += number > 1 and number % 2  # before the first look of each chunk but the first

    fake.looked = looked
    found = server(fake).measure(CASES)
    assert len(versions(found)) > 1
    for one, asked in zip(found, CASES, strict=True):
        at_first = 1.0 if asked.tokens == 1 else 4.0
        assert one.score.nll == pytest.approx(at_first * 0.9 ** (one.at.version - 1))


def test_a_write_under_the_request_is_not_one_version(fake: Fake) -> None:
    """Hogwild: the version is still 1, and parts of 2 may be in the answer."""
    fake.span = "1-2"
    with pytest.raises(LiveError, match="the version moved each time"):
        server(fake).measure(CASES[:2])


def test_old_prefixes_are_not_read_whatever_the_header_says_of_them(fake: Fake) -> None:
    """--prefix-max-age: the span begins at the oldest prefix that others may read; the salt keeps us from it."""
    fake.version, fake.span = 4, "2-4"
    assert versions(server(fake).measure(CASES[:2])) == {4}


def test_a_server_that_was_started_again_is_noticed(fake: Fake) -> None:
    def before(number: int) -> None:
        fake.lineage = "b" * 32 if number > 2 else LINEAGE

    fake.before = before
    with pytest.raises(LiveError, match="was started again meanwhile"):
        server(fake).measure(CASES[:20])


def test_a_torn_server_says_why(fake: Fake) -> None:
    fake.state = "torn"
    with pytest.raises(LiveError, match="refuses to serve: r"):
        server(fake).measure(CASES[:1])


def test_a_key_is_sent_and_a_missing_one_is_named(fake: Fake) -> None:
    fake.key = "k"
    assert server(fake, "k").measure(CASES[:1])
    with pytest.raises(LiveError, match=r"401: give its key with --api-key-file"):
        server(fake).measure(CASES[:1])


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[", "file:///etc/passwd"])
def test_what_is_no_server_is_named(url: str) -> None:
    with pytest.raises(LiveError, match="--url"):
        Server(url, str).at()
