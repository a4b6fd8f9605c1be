"""`tandem feedback` as a user runs it: what is queued, what is said of it, and how it ends."""

from pathlib import Path

import pytest
import redis
from click.testing import CliRunner, Result
from enqueue_parts import tandem
from opinion_parts import queued, recorded

from producer import InvalidTranscriptError, UnknownCompletionError
from producer.cli_feedback import command
from producer.completions import new_key
from producer.errors import TandemError
from worker.consumer.jobs import open_queue
from worker.consumer.transitions import fetch


def feedback(url: str, *arguments: str, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(command, [*arguments, "--redis", url], input=stdin)


def test_a_thumb_from_a_terminal(redis_url: str, connection: redis.Redis) -> None:
    one = recorded(connection)
    done = tandem("feedback", one.key, "--rating", "-1", "--user", "u1", url=redis_url)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"rating: queued {queued(connection)[0]}\n", "")
    unknown = tandem("feedback", new_key(), "--rating", "1", url=redis_url)
    assert unknown.returncode == 1 and unknown.stdout == ""
    assert unknown.stderr.startswith("error: no completion is recorded under this key")
    assert "Traceback" not in unknown.stderr


@pytest.mark.parametrize(("word", "rating"), [("up", 1), ("DOWN", -1), ("0.25", 0.25), ("true", 1), ("-1", -1)])
def test_a_rating_in_words_or_numbers(redis_url: str, connection: redis.Redis, word: str, rating: float) -> None:
    feedback(redis_url, recorded(connection).key, "--rating", word)
    (job,) = fetch(open_queue(connection), queued(connection))
    assert job is not None and job.transcript().rating == rating


def test_what_replaces_and_what_cancels_out_is_said(redis_url: str, connection: redis.Redis) -> None:
    key = recorded(connection).key
    said = [("1", "u1"), ("1", "u1"), ("0.5", "u1"), ("-0.5", "u2"), ("-1", "u3")]
    lines = [feedback(redis_url, key, "--rating", number, "--user", user).output for number, user in said]
    assert [line.split()[1] for line in lines] == ["queued", "known", "replaced", "withdrawn", "queued"]


@pytest.mark.parametrize("how", ["text", "file", "stdin", "at"])
def test_a_correction_from_text_or_file(redis_url: str, connection: redis.Redis, tmp_path: Path, how: str) -> None:
    better = "@Goethe did, in 1808 – über\nzwei Zeilen"
    (tmp_path / "better.txt").write_text(better)
    given = {"text": better[1:], "file": f"@{tmp_path}/better.txt", "stdin": "@-", "at": f"@{better}"}[how]
    done = feedback(redis_url, recorded(connection).key, "--correction", given, stdin=better.encode())
    assert done.exit_code == 0 and done.output.startswith("correction: queued fb-")
    (job,) = fetch(open_queue(connection), queued(connection))
    assert job is not None
    assert job.transcript().messages[-1]["content"] == (better[1:] if how == "text" else better)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rating", "much"], "--rating: must be a number"),
        (["--rating", "nan"], "rating: must lie between"),
        (["--rating", "5"], "rating: must lie between -1 and 1; scale it"),
        (["--correction", "  "], "correction: is empty"),
        (["--correction", "Goethe."], "correction: is the very answer"),
        (["--correction", "@/no/such/file"], "--correction: cannot read /no/such/file (No such file"),
        (["--comment", " "], "comment: is empty"),
        (["--rating", "1", "--user", ""], "user: is empty"),
    ],
)
def test_what_is_refused_names_its_flag_and_queues_nothing(
    redis_url: str, connection: redis.Redis, arguments: list[str], says: str
) -> None:
    done = feedback(redis_url, recorded(connection).key, *arguments)
    assert done.exit_code == 1 and queued(connection) == []
    said = str(done.exception) if isinstance(done.exception, TandemError) else done.output
    assert said.removeprefix("error: ").startswith(says)


def test_several_things_at_once_are_a_line_each(redis_url: str, connection: redis.Redis) -> None:
    key = recorded(connection).key
    done = feedback(redis_url, key, "--comment", "Too short.", "--correction", "Better.", "--rating", "-1")
    assert [line.split(" fb-")[0] for line in done.output.splitlines()] == [
        "rating: queued",
        "correction: queued",
        "comment: queued",
    ]
    jobs = fetch(open_queue(connection), queued(connection))
    assert [job.transcript().kind for job in jobs] == ["disliked", "correction", "comment"]


def test_nothing_said_is_a_mistake_of_usage(redis_url: str, connection: redis.Redis) -> None:
    done = feedback(redis_url, recorded(connection).key)
    assert done.exit_code == 2 and "--rating, --correction or --comment" in done.output


def test_a_bad_part_keeps_everything_back_and_an_unknown_key_too(redis_url: str, connection: redis.Redis) -> None:
    one = recorded(connection)
    bad = feedback(redis_url, one.key, "--rating", "1", "--correction", "")
    assert isinstance(bad.exception, InvalidTranscriptError) and queued(connection) == []
    unknown = feedback(redis_url, one.id, "--rating", "1")
    assert isinstance(unknown.exception, UnknownCompletionError) and queued(connection) == []


def test_a_file_that_is_no_text_is_refused(redis_url: str, connection: redis.Redis, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    done = feedback(redis_url, recorded(connection).key, "--correction", f"@{tmp_path}/bytes")
    assert isinstance(done.exception, TandemError) and "not text in UTF-8" in str(done.exception)
