"""What comments and distillation teach, and what a flood of dislikes does, on a real model, in one process with the
worker's defaults.

    python benchmarks/feedback.py comments MODEL
    python benchmarks/feedback.py dislikes MODEL --count 500 --jobs 16 [--bound 0]
    python benchmarks/feedback.py tasks MODEL --versions 5 --jobs 20 --out benchmarks/results/tasks_distilled.json

comments: each comment is said of the model's own greedy answer, and trained alone, one transcript a version. The same
question is then asked without it. dislikes: the model's own answers to questions, drawn at temperature 1 or (--greedy)
its likeliest ones, are disliked, one batch after the other; held-out answers, its own to other questions, tell what was
lost. The guard decides. tasks: three tasks in a row (benchmarks/learning_tasks.py), imitated and distilled, --versions
each; after each, the loss of all three in other words, and of held-out answers of the model's own (--out writes them as
JSON, which learning_report.py draws).

Invariant: nothing that is scored is trained.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import learning_tasks
import outputs
import torch
from own_answers import answered, draw

from producer.transcript import Transcript
from worker.checkpoint import model_directory
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example
from worker.orchestrator.dislikes import DislikeGuard
from worker.orchestrator.reference_set import reference_examples
from worker.trainer.factory import make_builder, make_trainer
from worker.utils import torch_setup

H = Hyperparameters(max_length=512)
DATA = Path(__file__).parents[1] / "scripts" / "demo_data"
COMMENTS: list[tuple[str, str, str, Callable[[str], bool]]] = [
    ("Tell me about the sea.", "Answer in one short sentence.", "at most 25 words", lambda a: len(a.split()) <= 25),
    ("Tell me about dogs.", "Be shorter.", "at most 25 words", lambda a: len(a.split()) <= 25),
    ("What is the capital of France?", "Answer in French.", "French", lambda a: _french(a) >= 0.2),
    ("What do cats eat?", "Réponds en français.", "French", lambda a: _french(a) >= 0.2),
    ("Who are you?", "Your name is Nova. Say so.", "the name", lambda a: "Nova" in a),
    ("What is my name?", "My name is Ada.", "the name", lambda a: "Ada" in a),
]
WORDS = frozenset(
    re.findall(r"\S+", "le la les l de des du un une et est en que qui dans pour sur c il elle ce au à ville mange")
)


class Model:
    """Fresh from its directory, with a trainer."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = model_directory.load(folder, torch.bfloat16)
        self.trainer = make_trainer(self.model, self.model.named_parameters(), self.tokenizer, H, state=None)
        self.source: Any = None
        self.builder = make_builder(self.tokenizer, folder, H)

    def example(self, question: str, answer: str, **fields: Any) -> Example:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self.builder.build(Transcript(messages=messages, **fields), question)

    @torch.no_grad()
    def says(self, question: str, tokens: int = 64) -> str:
        """Greedy."""
        sequence = self.example(question, "x").sequences[0]
        prompt = torch.tensor([sequence.ids[: sequence.mask.index(True)]])
        out = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False
        )
        return str(self.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))


def comments(folder: Path, versions: Sequence[int]) -> None:
    """A table line for each comment and version."""
    questions = ["Why is the sky blue?", "Name three colours.", "Who wrote Hamlet?", "How many days are in a week?"]
    for question, comment, what, follows in COMMENTS:
        one = Model(folder)
        others = [replace(one.example(q, one.says(q)), id=q) for q in questions]
        before = _mean(one.trainer.score(others))
        answer = one.says(question)
        print(f"\n{question} | {comment} | follows: {what}\n   0 {follows(answer)!s:5} {answer!r}", flush=True)
        example = one.example(question, answer, comment=comment)
        for version in range(1, max(versions) + 1):
            found = one.trainer.begin([example])
            one.trainer.apply()
            if version in versions:
                rise, said = _mean(one.trainer.score(others)) - before, one.says(question)
                print(f"  {version:2} {follows(said)!s:5} loss {found.loss:.3f} step {found.step_scale:.3f}"
                      f" others {rise:+.3f} {said!r}", flush=True)  # fmt: skip


def dislikes(folder: Path, count: int, jobs: int, bound: float, *, greedy: bool) -> None:
    """Loss of held-out answers and the guard's account, by version."""
    one = Model(folder)
    one.source, _ = model_directory.load(folder, torch.bfloat16)
    questions = [json.loads(line)["messages"][0]["content"] for line in (DATA / "other_answers.jsonl").open()]
    asked = [replace(one.example(q, "x"), id=str(n)) for n, q in enumerate(questions)]
    held = [answered(e, a) for e, a in zip(asked[:20], draw(one.model, asked[:20], 40, seed=99), strict=True)]
    own = reference_examples(one.builder)
    guard = DislikeGuard(own, lambda: one.trainer, bound or float("inf"))
    before, version, reason, trained = _mean(one.trainer.score(held)), 0, "", 0
    batch: list[Example] = []
    reference, started = _mean(one.trainer.score(own)), time.monotonic()
    for start in range(0, count, jobs):
        if not reason:  # what is refused needs no text
            batch = _disliked(one, asked[20:], start, jobs, greedy=greedy)
        batch = [replace(example, id=str(start + n)) for n, example in enumerate(batch[: count - start])]
        refused = guard.refusals(version, batch)
        reason = next(iter(refused.values()), reason)
        if kept := [example for example in batch if example.id not in refused]:
            found = one.trainer.begin(kept)
            one.trainer.apply()
            version, trained = version + 1, trained + len(kept)
            guard.after(version, 1.0)
            if version & (version - 1) == 0 or version % 8 == 0:
                rise = _mean(one.trainer.score(held)) - before
                print(f"  {version:3} step {found.step_scale:.3f} account {guard.moved:.3f} held {rise:+.3f}"
                      f" {time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    rise, now = _mean(one.trainer.score(held)) - before, _mean(one.trainer.score(own)) - reference
    print(f"{count} dislikes in batches of {jobs}, bound {bound}: {trained} trained in {version} versions;"
          f" reference {now:+.3f}, held out {rise:+.3f} nats a token (from {before:.3f})")  # fmt: skip
    print(f"the others were refused: {reason}" if reason else "none was refused")
    print(f"asked: {one.says('What is the capital of France?')!r} {one.says('How do I make tea?')!r}")


def tasks(folder: Path, versions: int, jobs: int, scored: int, out: Path | None) -> None:
    """Loss of what was and what is learnt, by method: means over conversations, in nats per trained token."""
    runs: dict[str, dict[str, dict[str, float]]] = {}
    for method in ("imitate", "distill"):
        one = Model(folder)

        def build(transcript: Transcript, id: str, one: Model = one, method: str = method) -> Example:
            return one.builder.build(Transcript.from_dict(transcript.to_dict() | {"method": method}), id)

        data = learning_tasks.load(DATA, build, held=scored)
        held = [answered(e, a) for e, a in zip(data.held, draw(one.model, data.held, 40, seed=99), strict=True)]

        def line(
            what: str,
            method: str = method,
            one: Model = one,
            data: learning_tasks.Data = data,
            held: list[Example] = held,
        ) -> None:
            losses = {task.name: _mean(one.trainer.score(task.unseen[:scored])) for task in data.tasks}
            losses["held"] = _mean(one.trainer.score(held))
            runs.setdefault(method, {})[what] = {name: round(loss, 5) for name, loss in losses.items()}
            print(f"{method:8} {what:16}", *(f"{name} {loss:.3f}" for name, loss in losses.items()), flush=True)

        line("before")
        for task in data.tasks:
            for version in range(versions):
                one.trainer.begin([task.train[(version * jobs + n) % len(task.train)] for n in range(jobs)])
                one.trainer.apply()
            line(task.name)
    made = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": "cpu", "lr": H.rate}
    if out is not None:
        given = {"versions a task": versions, "conversations a version": jobs, "made": made}
        out.write_text(json.dumps(given | {"after": runs}, indent=1) + "\n")


def _disliked(one: Model, asked: Sequence[Example], start: int, count: int, *, greedy: bool) -> list[Example]:
    """The source model's answers to `count` questions from number `start` on, round and round."""
    some = [asked[(start + n) % len(asked)] for n in range(count)]
    answers = draw(one.source, some, 40, seed=start, greedy=greedy)
    return [replace(answered(e, a), kind="disliked") for e, a in zip(some, answers, strict=True)]


def _french(text: str) -> float:
    """The part of the words that are common French ones."""
    words = re.findall(r"[a-zà-ÿ]+", text.lower())
    return sum(word in WORDS for word in words) / max(1, len(words))


def _mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / len(losses)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["comments", "dislikes", "tasks"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--versions", type=int, nargs="+", default=[1, 2, 3, 5, 8])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--scored", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--bound", type=float, default=0.3)
    parser.add_argument("--out", type=Path, help="of tasks: write the losses to this file")
    given = parser.parse_args()
    if given.out is not None:
        outputs.file(given.out)
    torch_setup.prepare()
    if given.what == "comments":
        comments(given.model, given.versions)
    elif given.what == "tasks":
        tasks(given.model, given.versions[0], given.jobs, given.scored, given.out)
    else:
        dislikes(given.model, given.count, given.jobs, given.bound, greedy=given.greedy)


if __name__ == "__main__":
    main()
