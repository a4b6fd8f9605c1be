"""What the benchmarks on a GPU compute by themselves, checked where there is none: counts, texts, load, records."""

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from aiohttp import web
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import old_prefixes
from agreement import compare
from contestants import Ours, make_peers, make_weights
from flops import layer_weights, step_flops
from load import ClosedLoop
from patience import PATIENCE
from record import OutOfTime, Part, Record, Until
from serving_loads import Load
from shapes import text_config, text_facts, write_shape
from texts import build, conversation, random_examples, text_builder
from transformers import AutoTokenizer

from worker.memory.plan import Way
from worker.shared_weights import bind
from worker.utils import torch_setup


@pytest.mark.parametrize("size", ["tiny", "0.8B", "27B"])
def test_the_weights_that_multiply_are_those_of_the_model_s_linear_layers(size: str) -> None:
    torch_setup.prepare()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text_config(size), dtype=torch.bfloat16)
    linear = [module.weight.numel() for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert layer_weights(text_facts(size)) == sum(linear)


def test_of_a_mixture_those_count_that_a_token_meets() -> None:
    torch_setup.prepare()
    facts = text_facts("35B-A3B")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text_config("35B-A3B"), dtype=torch.bfloat16)
    body = {name: weight.numel() for name, weight in model.model.named_parameters() if weight.dim() > 1}
    met = facts["num_experts_per_tok"] / facts["num_experts"]
    expected = 0.0
    for name, numbers in body.items():
        if "embed_tokens" not in name and "conv1d" not in name:
            expected += numbers * (met if ".experts." in name else 1)
    assert layer_weights(facts) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", ["Llama-3.1-8B", "Qwen3-8B", "gemma-3-1b", "tiny-llama"])
def test_so_are_those_of_other_models_and_their_shape_is_written(size: str, tmp_path: Path) -> None:
    model = bind.on_meta(write_shape(size, tmp_path / "model", context=4096))
    linear = [module.weight.numel() for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
    assert layer_weights(text_facts(size)) == sum(linear)
    words = len(AutoTokenizer.from_pretrained(tmp_path / "model"))
    assert model.config.vocab_size == text_facts(size)["vocab_size"] == words
    assert step_flops(text_facts(size), [2048]).model > 6 * 2047 * (sum(linear) + model.lm_head.weight.numel())


def test_operations_of_the_27b_are_those_of_its_design() -> None:
    """About 208 billion a token at 4,096 tokens, with what is computed again (the design notes' own figure)."""
    flops = step_flops(text_facts("27B"), [4096])
    assert (flops.model + flops.recompute) / 4096 == pytest.approx(208e9, rel=0.01)
    assert step_flops(text_facts("27B"), [512] * 8).model < flops.model


def test_texts_have_the_tokens_that_were_asked_for(tmp_path: Path) -> None:
    builder = text_builder(write_shape("tiny", tmp_path / "model"))
    for tokens in (64, 512, 1000):
        text = conversation(builder, "some", tokens)
        assert tokens - 8 < build(builder, text).tokens <= tokens
        assert text == conversation(builder, "some", tokens) != conversation(builder, "other", tokens)


def test_contestants_train_the_same_weights_and_keep_nothing(tmp_path: Path) -> None:
    folder = write_shape("tiny", tmp_path / "model")
    tensors = make_weights(folder, torch.device("cpu"))
    assert tensors["model.layers.0.mlp.up_proj.weight"].float().std().item() == pytest.approx(0.02, rel=0.02)
    assert tensors["model.layers.0.linear_attn.A_log"].dtype == torch.float32
    assert tensors["model.norm.weight"].abs().max() == 0
    peers = make_peers(folder, tensors)
    model, tokenizer = bind.build_model(folder, tensors), AutoTokenizer.from_pretrained(folder)
    ways: tuple[Way, ...] = ("streaming", "factors", "burst")
    ours = [Ours(model, tokenizer, way=way, budget=256) for way in ways]
    examples = random_examples([64, 64], 4096, seed=1)
    for one in [*ours, *peers]:
        before = tensors["lm_head.weight"].clone()
        halves = one.step(examples)
        assert halves.first > 0 and halves.second > 0
        assert not torch.equal(tensors["lm_head.weight"], before), one.name
        assert all(p.grad is None for m in (model, peers[0].model) for p in m.parameters()), one.name


def test_agreement_is_of_the_same_tokens() -> None:
    found = compare([torch.tensor([-1.0, -2.0])], [torch.tensor([-1.5, -2.0])])
    assert (found.mean, found.most, found.tokens) == (0.25, 0.5, 2)


def test_loads_are_what_their_names_say() -> None:
    mixed = Load.parse("8x128+3500")
    assert (mixed.clients, mixed.lengths, mixed.longest(128)) == (8, (128, 3500), 3628)
    prompts = mixed.prompts(0, 900)
    lengths = {len(next(prompts)), *(len(prompts.send([1])) for _ in range(20))}
    assert lengths == {128, 3500}
    chat = Load.parse("2xchat100")
    turns = chat.prompts(1, 900)
    first = next(turns)
    second = turns.send([7] * 10)
    assert len(first) == 100 and second[:110] == [*first, *[7] * 10] and len(second) > 110
    longest = max(len(turns.send([7] * 10)) for _ in range(20))
    assert longest + 10 <= chat.longest(10), "a server of that length takes it"
    assert next(chat.prompts(0, 900)) != first == next(chat.prompts(1, 900)) != next(chat.prompts(1, 900, turn=1))
    for wrong in ("128", "0x128", "4x", "4xchat", "4x12,8"):
        with pytest.raises(ValueError, match="is no load"):
            Load.parse(wrong)


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[str]]]:
    """(url, behaviours) of an HTTP server that streams as vLLM does; each request takes the first behaviour."""
    behaviours: list[str] = []
    ready, stopping, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    ports: list[int] = []

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        behaviour = behaviours.pop(0) if behaviours else "well"
        if behaviour == "refuse":
            return web.json_response({"error": "torn"}, status=503)
        answer = web.StreamResponse()
        await answer.prepare(request)
        for done in range(1, body["max_tokens"] + 1):
            event: dict[str, Any] = {"choices": [{"text": ""}], "usage": {"completion_tokens": done}}
            if behaviour == "say" and done == 2:
                event = {"error": {"message": "torn"}}
            await answer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            if behaviour == "break" and done == 2:
                return answer
            await asyncio.sleep(0.002)
        await answer.write(b"data: [DONE]\n\n")
        return answer

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", complete)
        app.router.add_get("/metrics", _metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.append(runner.addresses[0][1])
        ready.set()
        await stopping.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(PATIENCE)
    yield f"http://127.0.0.1:{ports[0]}", behaviours
    loop.call_soon_threadsafe(stopping.set)
    thread.join()
    loop.close()


async def _metrics(_: web.Request) -> web.Response:
    return web.Response(text='vllm:cache_config_info{engine="0",block_size="384",mamba_block_size="8"} 1.0\n')


def test_a_prompt_within_the_first_block_is_not_checked_for_old_prefixes(
    endpoint: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rig, record = SimpleNamespace(url=endpoint[0]), Record(tmp_path / "r.json")
    builder: Any = None
    assert record.part("old", lambda part: old_prefixes.check(cast(Any, rig), builder, 384, (8, 8), part))
    record.summary()
    assert (
        "a prompt of 384 tokens ends within the cache's first block, of 384" in capsys.readouterr().out.splitlines()[-2]
    )


def test_the_load_counts_every_token_and_every_failure(endpoint: tuple[str, list[str]]) -> None:
    url, behaviours = endpoint
    behaviours += ["refuse", "say", "break"]
    started = time.monotonic()  # before the first request, which may fail before this thread runs again
    with ClosedLoop(url, "m", load=Load.parse("2x8"), max_tokens=5) as load:
        while load.between(started, time.monotonic()).requests < 4:
            time.sleep(0.01)
    served = load.between(started, time.monotonic())
    assert served.failed == len(load.failures) == 3, load.failures
    reasons = " ".join(reason for _, reason in load.failures)
    assert "status 503" in reasons and "the stream says" in reasons and "after 2 of 5" in reasons
    assert served.tokens == 5 * served.requests + 1 + 2, "those before the error, and before the break"


def test_a_record_keeps_no_password_of_a_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = ["redis://:secret@127.0.0.1:6379/0", "unix://:secret@/run/redis.sock?db=0"]
    monkeypatch.setattr("sys.argv", ["serving.py", "--url", "http://127.0.0.1:8000", *urls])
    Record(tmp_path / "r.json").save()
    text = (tmp_path / "r.json").read_text()
    assert "secret" not in text and "http://127.0.0.1:8000 redis://127.0.0.1:6379/0 unix:///run/redis.sock" in text


def test_a_part_that_fails_is_recorded_and_goes_no_further(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.json")

    def broken(part: Part) -> None:
        part["figure"] = 1
        raise ValueError("why")

    def untrue(part: Part) -> None:
        part.check("two is one", False)

    assert not record.part("broken", broken) and not record.part("untrue", untrue)
    assert record.part("sound", lambda part: part.check("true", True))
    read = json.loads(record.path.read_text())["parts"]
    assert read["broken"]["figure"] == 1 and read["broken"]["error"] == "ValueError: why"
    assert read["untrue"]["failed checks"] == ["two is one"] and read["sound"]["ok"]


def test_the_end_of_the_time_ends_everything(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.json")
    until = Until(0.05)
    with pytest.raises(OutOfTime):
        record.part("slow", lambda part: time.sleep(60))
    until.disarm()
    assert "over" in json.loads(record.path.read_text())["parts"]["slow"]["error"]
