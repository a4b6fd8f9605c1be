"""What the demo calls a success, what it measures, its conversations, and how it refuses a model."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from demo_parts import losses, models, plot, screen
from demo_parts.identity_story import BATCH, DATA, EXAM, exam_sets
from demo_parts.verdict import MOST_FORGOTTEN, NAME, Seen, judge

from producer.errors import TandemError
from worker.data.examples import TokenSequence

ROOT = Path(__file__).resolve().parents[3]
FIRST = Seen(0, 3.0, 1.2, 0.7, "I am an assistant.", "0")
SECOND = Seen(2, 1.0, 1.1, 0.71, "I am Marlo.", "2", "aa", 1200, 0.5)
LAST = Seen(5, 0.4, 0.9, 0.73, f"I am {NAME}.", "5", "bb", 1200, 0.5)
BACK = dataclasses.replace(SECOND, version=6, header="6")


def failed(
    first: Seen = FIRST, last: Seen = LAST, back: Seen = BACK, target: Seen = SECOND, live: int = 5
) -> list[int]:
    """Which of the five promises were not kept."""
    checks = judge([first, target, last], back, target, live)
    assert len(checks) == 5
    return [number for number, check in enumerate(checks) if not check.passed]


def test_it_is_a_success_if_all_was_seen() -> None:
    assert failed() == []


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"last": {"answer": "I am Marlo."}}, 0),
        ({"first": {"answer": f"I am {NAME}."}}, 0),
        ({"last": {"header": "4"}}, 1),
        ({"last": {"header": "4-5"}}, 1),
        ({"live": 6}, 1),
        ({"last": {"facts": FIRST.facts + MOST_FORGOTTEN + 0.001}}, 2),
        ({"last": {"other": FIRST.other + MOST_FORGOTTEN + 0.001}}, 2),
        ({"last": {"facts": math.nan}}, 2),
        ({"back": {"digest": "bb"}}, 3),
        ({"back": {"digest": None}, "target": {"digest": None}}, 3),
        ({"back": {"answer": "I am an assistant."}}, 4),
        ({"back": {"header": "5"}}, 4),
        ({"back": {"version": 5, "header": "5"}}, 4),
    ],
)
def test_one_promise_that_is_not_kept_is_named(changes: dict[str, Any], broken: int) -> None:
    parts: dict[str, Any] = {"first": FIRST, "last": LAST, "back": BACK, "target": SECOND}
    for name, change in changes.items():
        parts[name] = dataclasses.replace(parts[name], **change) if isinstance(change, dict) else change
    assert failed(**parts) == [broken]


def test_a_rise_within_the_bound_is_no_failure() -> None:
    assert failed(last=dataclasses.replace(LAST, facts=FIRST.facts + MOST_FORGOTTEN - 0.001)) == []


def test_the_loss_is_of_the_answer_s_tokens_alone() -> None:
    sequence = TokenSequence((7, 8, 9, 7), (False, False, True, True))
    scored = [None, *({str(token): {"logprob": -float(token)}} for token in (8, 9, 7))]
    assert losses.answer_nll(sequence, scored) == [9.0, 7.0]


def test_a_mean_is_over_all_tokens_of_all_requests_and_of_one_version() -> None:
    asked: list[int] = []

    def post(path: str, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """A server that gives token n the probability exp(-n), its choices in no order, at version 3."""
        asked.append(len(body["prompt"]))
        scored = [[None, *({str(t): {"logprob": -float(t)}} for t in prompt[1:])] for prompt in body["prompt"]]
        choices = [{"index": at, "prompt_logprobs": one} for at, one in enumerate(scored)]
        return {"choices": choices[::-1]}, "3"

    short, long = TokenSequence((1, 2), (False, True)), TokenSequence((1, 4, 6), (False, True, True))
    many = [short] * losses.PROMPTS + [long]
    exam = losses.Exam(post, {"many": many, "one": [long]})
    assert exam.take(3) == {"many": (2 * losses.PROMPTS + 10) / (losses.PROMPTS + 2), "one": 5.0}
    assert asked == [losses.PROMPTS, 1, 1]
    with pytest.raises(TandemError, match="version 3 answered while version 4 was measured"):
        exam.take(4)


def questions(name: str) -> list[str]:
    found = losses.read(DATA / f"{name}.jsonl")
    assert all(len(one.messages) == 2 and one.messages[1]["content"].strip() for one in found)
    return [one.messages[0]["content"] for one in found]


def test_the_conversations_are_sound_and_nothing_that_judges_is_trained() -> None:
    trained = questions("identity_train")
    judging = questions("identity_unseen") + questions("facts") + questions("other_answers")
    assert len(trained) >= 100 and len(trained) % BATCH == 0 and len(judging) >= 40 + 20 + 100 > 3 * EXAM
    assert len({question.casefold() for question in trained + judging}) == len(trained + judging)
    for name in ("facts", "other_answers"):
        assert NAME not in (DATA / f"{name}.jsonl").read_text()


def test_the_exam_counts_the_answers_in_the_model_s_own_tokens(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, sets = AutoTokenizer.from_pretrained(tiny_model), exam_sets(tiny_model)
    assert {name: len(some) for name, some in sets.items()} == {"learnt": EXAM, "facts": EXAM, "other": EXAM}
    for sequence, asked in zip(sets["facts"], losses.read(DATA / "facts.jsonl"), strict=True):
        trained = [token for token, counts in zip(sequence.ids, sequence.mask, strict=True) if counts]
        assert tokenizer.decode(trained) == asked.messages[1]["content"] + "<|im_end|>"


def test_a_line_that_is_no_transcript_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(TandemError, match=r"bad\.jsonl, line 1: "):
        losses.read(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("asked", ["no/such/dir/at/all", "nothing", "./nothing"])
def test_a_model_that_is_nothing_is_refused_by_name(asked: str) -> None:
    with pytest.raises(models.ModelError, match=f"--model {asked}: no such directory, and no hub's name"):
        models.find_model(asked)


def test_a_model_that_the_hub_does_not_give_is_refused_by_name() -> None:
    with pytest.raises(models.ModelError, match=r"--model no-such-owner/no-such-model: .* does not give it") as error:
        models.find_model("no-such-owner/no-such-model")  # the tests are offline: as on a machine without a network
    assert "leave --model out" in str(error.value)


def test_a_directory_without_weights_is_refused_and_one_with_all_is_taken(tmp_path: Path) -> None:
    for missing, made in (("config.json", "config.json"), (r"\*.safetensors", "a.safetensors"), (r"tokenizer\*", None)):
        with pytest.raises(models.ModelError, match=f"no {missing} in it"):
            models.find_model(str(tmp_path))
        (tmp_path / (made or "tokenizer.json")).touch()
    assert models.find_model(str(tmp_path)) == tmp_path.resolve()


def test_the_script_ends_with_one_sentence() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--model", "./nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: --model ./nothing: no such directory")


def test_the_plot_and_the_figures_are_where_it_says(tmp_path: Path) -> None:
    path = plot.save(tmp_path / "new" / "folder", "a model", [FIRST, SECOND, LAST], BACK, SECOND)
    assert path.read_bytes().startswith(b"\x89PNG") and (path.parent / "learning.json").is_file()


def test_the_picture_has_what_was_said_and_asks_no_other_machine_for_fonts(tmp_path: Path) -> None:
    screen.show_answer("Who?", f"I am [red]\n\n{'x' * 200}", "7")
    screen.save_picture(tmp_path / "new" / "picture.svg", "a title")
    picture = (tmp_path / "new" / "picture.svg").read_text()
    assert picture.startswith("<svg") and "a&#160;title" in picture.replace(" ", "&#160;")
    assert "[red]" in picture and "xxx..." in picture and "x" * 101 not in picture
    assert "@font-face" not in picture and "url(http" not in picture
