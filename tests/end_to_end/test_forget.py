"""`tandem forget USER`: what is left is what would be there if the user had never said anything."""

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
from completion_parts import completion
from durable_parts import QUIET, Site, transcripts
from test_rollback import run_batches

from producer import keys
from producer.completions import Completion, save
from producer.said import user_digest

SECRET = "the patient said something private"


def recorded(site: Site, user: str, text: str) -> Completion:
    asked = [{"role": "user", "content": text}]
    one = completion(user=user, messages=asked, tools=None, chat_template_kwargs={})
    save(site.redis, one, 3600, 1 << 24)
    return one


def files(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*.journal"))


def test_a_user_goes_from_queue_records_journal_and_weights(site: Site, tmp_path: Path, tiny_model: Path) -> None:
    bobs = transcripts("bob", 3)
    marys = {"id": "mary-0", "messages": copy.deepcopy(bobs[0]["messages"]), "meta": {"user": "mary"}}
    marys["messages"][0]["content"] = SECRET
    one = recorded(site, "mary", SECRET)
    site.producer.enqueue_many([marys, bobs[0]])
    rated = site.producer.rate(one.key, 1).id
    site.producer.enqueue_many([bobs[1]])
    site.work(*QUIET)  # version 1: mary-0 and bob-0; version 2: the rating and bob-1
    site.producer.correct(one.key, "Better.", user="mary")
    site.producer.enqueue_many([bobs[2]])
    before = site.everything()

    plan = site.tandem("forget", "mary", "--dry-run")
    assert "would go: 1 queued transcripts, 2 transcripts of ended jobs, 1 recorded completions" in plan
    assert "made again without 2 transcripts, which were trained in versions 1, 2" in plan
    assert site.everything() == before and SECRET.encode() in files(site.state)
    said = site.tandem("forget", "mary")
    assert "version 3 is live: it is version 2 without " in said and "mary-0" in said and rated in said
    assert "gone: texts and tokens in 2 batches of the journal" in said and "backups" in said
    assert site.agree() == 3 and site.everything() == run_batches(tiny_model, tmp_path / "w", [[bobs[0]], [bobs[1]]])

    nowhere(site)
    assert "nothing is known of this user" in site.tandem("forget", "mary")
    site.work(*QUIET)
    assert site.agree() == 4 and site.manifest(4)["jobs"] == '["bob-2"]'
    whole = site.everything()
    site.recover(from_journal=True)  # every batch is still there, with empty places
    assert site.agree() == 4 and site.everything() == whole
    assert site.ledger().keys() == {"mary-0", "bob-0", "bob-1", "bob-2", rated}
    assert not site.producer.enqueue(bobs[0]["messages"], id="mary-0").new, "the id is never trained again"


def nowhere(site: Site) -> None:
    """Neither the text nor the user is in Redis or in the journal."""
    assert SECRET.encode() not in files(site.state) and b"mary@" not in files(site.state)
    for name in site.redis.keys("*"):
        kind = site.redis.type(name)
        read: dict[bytes, Any] = {b"string": site.redis.get, b"hash": site.redis.hgetall}
        text = repr(read[kind](name) if kind in read else "")
        assert SECRET not in text and user_digest("mary") not in text, name


@pytest.mark.slow
def test_what_cannot_be_taken_out_is_said_and_stays_findable(site: Site) -> None:
    """The only checkpoint that the journal still reaches back to holds the transcript: no version can be made
    without it."""
    site.producer.enqueue_many([{**transcripts("x", 1)[0], "meta": {"user": "mary"}}])
    site.work("--checkpoint-every", "1", "--no-checkpoint-at-stop")
    for path in sorted((site.state / "journal").glob("*.journal"))[:-1]:
        path.unlink()  # as pruning does, once checkpoints cover it
    before = site.everything()
    said = site.tandem("forget", "mary", code=1)
    assert "still in weights and journal: 1 transcripts: x-0" in said and "why: version 1 cannot be made" in said
    assert site.everything() == before and site.redis.exists("rq:job:x-0") == 0


@pytest.mark.slow
def test_without_a_server_redis_alone_can_be_cleared(site: Site) -> None:
    one = recorded(site, "mary", SECRET)
    site.producer.rate(one.key, 1)
    site.work(*QUIET)
    site.producer.rate(one.key, -1)
    site.server.kill()
    refused = site.tandem("forget", "mary", code=1)
    assert "error: " in refused and site.redis.llen("rq:queue:feedback") == 1, "nothing was changed"
    said = site.tandem("forget", "mary", "--redis-only", code=1)
    assert "gone: 1 queued transcripts" in said and "--redis-only was given" in said
    assert SECRET.encode() in files(site.state) and site.redis.llen("rq:queue:feedback") == 0
    site.start_server()
    said = site.tandem("forget", "mary")
    assert "version 2 is live: it is version 1 without fb-" in said and SECRET.encode() not in files(site.state)


@pytest.mark.slow
def test_killed_on_the_way_it_can_be_repeated(site: Site) -> None:
    """Its rollback is journaled, the weights are half written: the next worker ends that, the next call the rest."""
    site.producer.enqueue_many([{**one, "meta": {"user": "mary"}} for one in transcripts("x", 1)])
    site.producer.enqueue_many(transcripts("y", 1))
    site.work(*QUIET)
    process = site.start("forget", "mary", fault="restored")
    assert process.ended() == -signal.SIGKILL, process.said()
    site.is_torn()
    site.work(*QUIET)
    assert site.agree() == 2 and b"number of x 0" in files(site.state)
    said = site.tandem("forget", "mary")
    assert "texts and tokens in 1 batches" in said and b"number of x 0" not in files(site.state)
    assert site.agree() == 2 and site.redis.hget(keys.DROPPED, "x-0") == b"2" and not site.redis.exists("rq:job:x-0")
