"""The guards inside `tandem worker`, on the stand-in: outliers over a restart, and the canary's hold."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_plan import conversation
from chaos_processes import Cluster
from click.testing import CliRunner
from patience import until

from producer import Producer, keys
from worker.cli.resume import command as resume_command
from worker.versions import ledger, pause_switch


@pytest.fixture
def cluster(tiny_model: Path, tmp_path: Path) -> Iterator[Cluster]:
    running = Cluster(tmp_path, tiny_model, options=("--max-jobs", "4", "--linger", "0.02"))
    running.ensure_server()
    yield running
    running.close()


def test_a_strange_transcript_is_set_aside_and_the_rest_of_its_batch_trained(cluster: Cluster) -> None:
    with Producer(cluster.store.url) as producer:
        producer.enqueue_many([conversation(i) for i in range(96)])
        worker = cluster.start_worker("--lr", "3e-3", "--until-empty")
        assert worker.ended(300) == 0, worker.said()
        odd = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "qzx 0x7f }{][ %%@ WvWv ~~|| @@ QQ"}]
        strange = producer.enqueue(odd, id="strange").id
        producer.enqueue_many([conversation(i) for i in range(96, 99)])
        worker = cluster.start_worker("--lr", "3e-3", "--until-empty", "--outliers", "2")  # history: the journal's
        assert worker.ended(300) == 0, worker.said()
        status = producer.status(strange)
    assert status.state == "failed" and "far beyond" in worker.said()
    trained = cluster.redis.hgetall(keys.LEDGER)
    assert {b"t96", b"t97", b"t98"} <= set(trained) and b"strange" not in trained


def test_a_failing_canary_holds_training_while_the_server_serves(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "canary.jsonl"
    file.write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(1000, 1004)))
    with Producer(cluster.store.url) as producer:
        producer.enqueue_many([conversation(i) for i in range(12)])
    flags = ("--canary", str(file), "--canary-every", "2", "--canary-bound", "0.001", "--auto-rollback")
    worker = cluster.start_worker(*flags)
    until(lambda: "no version passed before" in worker.said() or not worker.alive(), "the hold")
    assert worker.alive() and ledger.state(cluster.redis).version == 2
    assert "no version passed before" in worker.said()
    assert cluster.redis.llen(f"rq:queue:{keys.QUEUE}") + cluster.redis.zcard(f"rq:wip:{keys.QUEUE}") == 4
    header = cluster.header()
    assert header is not None and header["state"] == "CLEAN"
    assert CliRunner().invoke(resume_command, ["--redis", cluster.store.url]).exit_code == 0
    until(lambda: pause_switch.pause_reason(cluster.redis) is None or not worker.alive(), "the hold to end")
    until(lambda: ledger.state(cluster.redis).version == 3 or not worker.alive(), "training to go on")
    assert worker.alive(), worker.said()
