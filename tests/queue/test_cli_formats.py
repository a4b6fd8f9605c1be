"""`tandem enqueue` with files of other formats, as a user runs it: what is queued, what is said, the exit code."""

import json
import subprocess
from pathlib import Path

import redis
from enqueue_parts import TALK, TANDEM, queued, tandem

from producer import Producer
from producer.formats import READ
from producer.transcript import Transcript, trained_turns

FOLDER = Path(__file__).parents[1] / "data" / "formats"
LOGS = FOLDER.parent / "client_logs"


def queue(url: str, ids: list[str]) -> list[Transcript]:
    """The transcripts that the worker would take."""
    with Producer(url) as producer:
        jobs = [producer.job(job_id) for job_id in ids]
    return [Transcript.from_dict(job.args[0]) for job in jobs if job is not None]


def test_a_file_of_each_format(redis_url: str, store: redis.Redis) -> None:
    """Each id once, and nothing that was disliked or rejected as an answer to give."""
    counts = {"alpaca": 2, "langfuse": 6, "langsmith": 5, "litellm": 2, "messages": 5, "openwebui": 4, "sharegpt": 4}
    counts |= {"trl": 5, "pairs": 6, "openai-preference": 1}
    everything = sorted(FOLDER.iterdir())
    assert sorted(counts) == sorted(item.name for item in READ) == sorted(path.stem for path in everything)
    for path in everything:
        before = len(queued(store))
        done = tandem("enqueue", str(path), url=redis_url)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"queued {counts[path.stem]}, already known 0, rejected 0\n")
        assert done.stderr == "" if path.stem == "messages" else done.stderr.startswith(f"note: {path} holds ")
        assert len(queued(store)) == before + counts[path.stem]
    done = tandem("enqueue", str(FOLDER / "sharegpt.jsonl"), url=redis_url)
    assert done.stdout.startswith("queued 0, already known 4")
    found = queue(redis_url, queued(store))
    assert len(found) == sum(counts.values())
    for item in found:
        trained = [item.messages[turn]["content"] for turn in trained_turns(item.messages, item.train_on)]
        assert ("BAD" in " ".join(trained)) == (item.kind == "disliked")
        assert (item.rejected is not None) == (item.kind == "correction")


def test_what_is_left_out_is_counted_and_said(redis_url: str, store: redis.Redis) -> None:
    done = tandem("enqueue", "--dislikes", "leave-out", str(FOLDER / "openwebui.json"), url=redis_url)
    assert done.stdout.splitlines() == [
        "queued 2, already known 0, rejected 0",
        "2 disliked answers left out: --dislikes leave-out was given",
        "2 feedback entries without a rating left out: whether these answers were liked is not known",
        "1 request that failed left out: there is no answer to learn",
        "1 answer that was cut off left out: the model would learn to stop in the middle",
    ]
    assert queued(store) == [f"00000000-0000-4000-8000-00000000000{n}" for n in (1, 3)]
    for pairs, kind in (("leave-out", None), ("chosen", "demonstration")):
        done = tandem("enqueue", "--pairs", pairs, str(FOLDER / "openai-preference.jsonl"), url=redis_url)
        assert done.stdout.startswith(f"queued {0 if kind is None else 1}, ")
        assert [item.kind for item in queue(redis_url, queued(store)[2:])] == ([] if kind is None else [kind])


def test_a_dry_run_asks_no_redis_and_queues_nothing(redis_url: str, store: redis.Redis) -> None:
    done = tandem("enqueue", "--dry-run", "--pairs", "chosen", str(FOLDER / "pairs.jsonl"), url="unix:///nowhere")
    assert (done.returncode, done.stdout) == (0, "pairs: would queue 6, rejected 0\nkinds: demonstration 6\n")
    done = tandem("enqueue", "--dry-run", str(LOGS / "other_transcript_shapes.jsonl"), url=redis_url)
    assert done.returncode == 1 and done.stdout.splitlines() == [
        "sharegpt: would queue 1, rejected 6",
        "kinds: demonstration 1",
        "rejected and not reported one by one: 5 more of other formats"
        " (langfuse 1, langsmith 1, litellm 1, librechat 1, openai-responses 1)",
    ]
    _note, error = done.stderr.splitlines()
    assert ":2: record: here the file changes from ShareGPT's conversations to Alpaca's instructions" in error
    assert queued(store) == []


def test_a_file_of_no_format_is_refused_once(tmp_path: Path, redis_url: str, store: redis.Redis) -> None:
    file = tmp_path / "talks.csv"
    file.write_text("question,answer\n" + "q,a\n" * 100)
    done = tandem("enqueue", str(file), url=redis_url)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {file}: looks like a CSV (2 columns): convert")
    assert queued(store) == []


def test_lines_without_ids_are_queued_once_however_often_the_file_is_sent(redis_url: str, store: redis.Redis) -> None:
    data = b"\n".join(json.dumps({"messages": TALK, "weight": weight}).encode() for weight in (1, 0.5, 1))
    for queues, knows in ((2, 1), (0, 3)):
        done = tandem("enqueue", "-", url=redis_url, stdin=data)
        assert done.stdout == f"queued {queues}, already known {knows}, rejected 0\n"
    assert len(queued(store)) == 2


def test_help_lists_the_formats() -> None:
    said = subprocess.run([*TANDEM, "enqueue", "--help"], capture_output=True, text=True).stdout
    assert all(f"    {item.name}  " in said and item.title in said for item in READ)
    table = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    assert all(f"| `{item.name}` |" in table for item in READ)
