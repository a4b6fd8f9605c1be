"""What feedback over HTTP does to a real model: completion, key, feedback, version, by the defaults of `tandem serve
--record --feedback` and `tandem worker`.

    python benchmarks/feedback_http.py MODEL [--only dislike] [--versions 3] --out results

dislike: the same user dislikes one greedy answer again and again. correct: an answer is corrected, with the same words
each time. comment: something is said of an answer. After every version: the summed log-probability of the answer in
nats, the mean loss a token of ten answers to other questions, and what is answered to the same question. The server
does the scoring. Each story begins with the model as it came (`tandem rollback 0`).
"""

import argparse
import difflib
import json
import sys
import tempfile
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import outputs
from demo_parts import losses
from demo_parts.identity_story import DATA
from demo_parts.stack import SERVED_NAME, DemoStack
from record import Part, Record
from transformers import AutoTokenizer

from producer.transcript import Transcript
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import TokenSequence
from worker.trainer.factory import make_builder
from worker.utils import torch_setup

OTHERS = 10
STORIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dislike": ("Tell me about the sea.", {"rating": -1}),
    "correct": ("Which animal says meow?", {"correction": "The cat says meow, and the kitten says it too."}),
    "short": ("Tell me about the sea.", {"comment": "Answer in one short sentence."}),
    "french": ("What is the capital of France?", {"comment": "Answer in French."}),
    "name": ("Who are you?", {"comment": "Your name is Nova. Say so."}),
}
"""Name -> question, and what is said of its answer."""


class Teller:
    """An application: it asks, and says something of what it got."""

    def __init__(self, stack: DemoStack, model: Path) -> None:
        torch_setup.prepare()
        self.stack = stack
        self.builder = make_builder(AutoTokenizer.from_pretrained(model), model, Hyperparameters())
        asked = losses.read(DATA / "other_answers.jsonl")
        self.others = losses.prepare(asked[:: len(asked) // OTHERS][:OTHERS], self.builder)

    def ask(self, question: str) -> tuple[str, str]:
        """(the greedy answer, the key of its record)."""
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 64, "temperature": 0}
        answer, headers = self._post("/v1/chat/completions", body | {"model": SERVED_NAME})
        return answer["choices"][0]["message"]["content"], headers["X-Tandem-Completion"]

    def tell(self, key: str, said: dict[str, Any], user: str) -> int:
        """Say it, and wait for the version that it is in."""
        sent, _ = self._post("/v1/feedback", {"id": key, "user": user} | said)
        while sent["state"] != "finished":
            if sent["state"] == "failed":
                raise RuntimeError(f"feedback was refused: {sent}")
            time.sleep(0.5)
            sent = self._get(f"/v1/feedback/{sent['id']}")
        return int(sent["version"])

    def sequence(self, question: str, answer: str) -> TokenSequence:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self.builder.build(Transcript.from_dict({"id": "s", "messages": turns}), "s").sequences[0]

    def score(self, sequences: list[TokenSequence]) -> list[list[float]]:
        """Each sequence's negative log-likelihoods by the served weights, by trained token."""
        body = {"prompt": [list(one.ids) for one in sequences], "max_tokens": 1, "prompt_logprobs": 0}
        answer, _ = self.stack.post("/v1/completions", body)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        scored = zip(sequences, choices, strict=True)
        return [losses.answer_nll(sequence, choice["prompt_logprobs"]) for sequence, choice in scored]

    def _post(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        with urllib.request.urlopen(self._request(path, json.dumps(body).encode()), timeout=600) as reply:
            return json.load(reply), reply.headers

    def _get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self._request(path, None), timeout=600) as reply:
            found: dict[str, Any] = json.load(reply)
            return found

    def _request(self, path: str, content: bytes | None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.stack.feedback_key}"}
        return urllib.request.Request(self.stack.server.url + path, content, headers)


def story(teller: Teller, name: str, versions: int, part: Part) -> None:
    """One kind of feedback, said once a version."""
    question, said = STORIES[name]
    answer, key = teller.ask(question)
    judged = [teller.sequence(question, text) for text in (answer, said.get("correction", answer))]
    part["question"], part["answer"], part["said"] = question, answer, said
    before = None
    for number in range(versions + 1):
        version = teller.tell(key, said, "u1") if number else 0
        own, chosen, *others = teller.score([*judged, *teller.others])
        means = [sum(one) / len(one) for one in others]
        before = before or (sum(own), sum(chosen), means)
        now = teller.ask(question)[0]
        rises = [mean - was for mean, was in zip(means, before[2], strict=True)]
        part[f"after {number}"] = {
            "version": version,
            "answer's log p falls by": sum(own) - before[0],
            "chosen answer's log p rises by": before[1] - sum(chosen),
            "others rise by": sum(rises) / len(rises),
            "others move by, at most": max(map(abs, rises)),
            "answers": now,
            "words": len(now.split()),
            "like the chosen": difflib.SequenceMatcher(None, now, said.get("correction", "")).ratio(),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of an instruct model")
    parser.add_argument("--only", nargs="+", choices=list(STORIES), default=list(STORIES))
    parser.add_argument("--versions", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    outputs.folder(chosen.out)
    record = Record(chosen.out / "feedback_http.json")
    options = ["--max-model-len", "2048", "--max-num-seqs", "32"]
    with (
        tempfile.TemporaryDirectory(prefix="tandem-") as folder,
        DemoStack(Path(folder), chosen.model, options, "starting Redis and vLLM") as stack,
    ):
        teller = Teller(stack, chosen.model)
        for number, name in enumerate(chosen.only):
            if number:
                stack.said_by("rollback", "0")
            with stack.child("worker"):
                record.part(name, partial(story, teller, name, chosen.versions))
    return 0 if all(part["ok"] for part in record.parts.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
