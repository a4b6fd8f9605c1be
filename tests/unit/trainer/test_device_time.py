"""What a step takes of a device, counted in the rows that its passes went over."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from stack_parts import transcripts
from transformers import AutoTokenizer

from producer.transcript import Transcript
from worker.checkpoint import model_directory
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example
from worker.memory.plan import Way
from worker.trainer.device_time import PROMPT, DeviceTime
from worker.trainer.factory import make_builder, make_trainer
from worker.trainer.kernel_warmup import warm_up
from worker.utils import torch_setup

H = Hyperparameters(max_length=128)


def test_nothing_is_known_until_a_pass_was_timed() -> None:
    time = DeviceTime()
    time.forward(100)
    assert time.seconds() == math.inf
    time.learn(tokens=1000, seconds=2.0)
    assert time.seconds() == pytest.approx(100 / 3 * 0.002)
    time.backward(100)
    assert time.seconds() == pytest.approx(100 * 0.002)
    time.begin()
    assert time.seconds() == 0


def test_a_cpu_learns_from_each_step() -> None:
    time = DeviceTime()
    time.took(3.0)
    assert time.seconds() == math.inf and time.prompt_token_s == 0, "nothing was computed"
    time.forward(90)
    time.took(3.0)
    assert time.seconds() == pytest.approx(3.0) and time.prompt_token_s == pytest.approx(PROMPT * 0.1)


@pytest.mark.parametrize(("way", "part"), [("burst", 1.0), ("factors", 1.0), ("streaming", 1 / 3)])
def test_a_step_counts_its_rows_and_streaming_the_pass_before_the_pause_alone(
    tiny_model: Path, way: Way, part: float
) -> None:
    torch_setup.prepare()
    model, tokenizer = model_directory.load(tiny_model)
    trainer = make_trainer(model, model.named_parameters(), tokenizer, H, state=None, way=way)
    builder = make_builder(AutoTokenizer.from_pretrained(tiny_model), tiny_model, H)
    examples = [builder.build(Transcript.from_dict(item), item["id"]) for item in transcripts("time", 2)]
    report = warm_up(trainer)
    trainer.device_time.learn(tokens=1, seconds=1.0)
    for _ in range(2):  # from one step to the next nothing is carried
        trainer.begin(examples)
        assert trainer.device_time.seconds() == pytest.approx(part * 2 * 128)
    trainer.forget()
    assert report.seconds["again"] > 0


def test_the_warm_up_times_the_longest_row_without_a_teacher(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_setup.prepare()
    model, tokenizer = model_directory.load(tiny_model)
    trainer = make_trainer(model, model.named_parameters(), tokenizer, Hyperparameters(max_length=512), state=None)
    dry_run, ran = trainer.dry_run, []

    def watched(examples: Sequence[Example], few_layers: bool = False) -> None:
        ran.append((sum(example.tokens for example in examples), sum(example.teacher_tokens for example in examples)))
        dry_run(examples, few_layers)

    monkeypatch.setattr(trainer, "dry_run", watched)
    report = warm_up(trainer)
    assert [ran[0], ran[-1]] == [(512, 512), (512, 0)]  # a teacher's pass would make a token dearer
    trainer.device_time.begin()
    trainer.device_time.forward(512)
    trainer.device_time.backward(512)
    assert trainer.device_time.seconds() == pytest.approx(report.seconds["again"])
