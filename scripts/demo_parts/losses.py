"""What the served model knows, asked of the server over HTTP: mean loss a token of conversations nobody queues.

Invariant: a figure is of one version of the weights, the one that the response's header names.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from producer.errors import TandemError
from producer.jsonl import read_transcripts
from producer.transcript import Transcript
from worker.data.examples import ExampleBuilder, TokenSequence

PROMPTS = 20
"""Conversations in one request."""

Post = Callable[[str, dict[str, Any]], tuple[dict[str, Any], str]]
"""(path, body) -> (answer, version)."""


def read(path: Path) -> list[Transcript]:
    """The transcripts of a JSONL file. Raises TandemError, which names file and line, if one is not sound."""
    found = []
    for line, transcript in read_transcripts(str(path)):
        if isinstance(transcript, ValueError):
            raise TandemError(f"{path}, line {line}: {transcript}")
        found.append(transcript)
    return found


def prepare(transcripts: Sequence[Transcript], builder: ExampleBuilder) -> list[TokenSequence]:
    """Their tokens, and which of them are the answers': exactly those that training would count."""
    return [sequence for one in transcripts for sequence in builder.build(one, one.id or "?").sequences]


class Exam:
    """Asks for the loss of named sets of conversations; `post` speaks to the server."""

    def __init__(self, post: Post, sets: Mapping[str, Sequence[TokenSequence]]) -> None:
        self._post, self._sets = post, sets

    def take(self, version: int) -> dict[str, float]:
        """For each set, the mean negative log-likelihood of an answer's token, in nats, at `version`. Raises
        TandemError if another version answers."""
        return {name: self._mean(sequences, version) for name, sequences in self._sets.items()}

    def _mean(self, sequences: Sequence[TokenSequence], version: int) -> float:
        total, count = 0.0, 0
        for start in range(0, len(sequences), PROMPTS):
            some = sequences[start : start + PROMPTS]
            body = {"prompt": [list(one.ids) for one in some], "max_tokens": 1, "prompt_logprobs": 0}
            answer, seen = self._post("/v1/completions", body)
            if seen != str(version):
                raise TandemError(f"version {seen} answered while version {version} was measured")
            for sequence, choice in zip(some, sorted(answer["choices"], key=lambda c: c["index"]), strict=True):
                nll = answer_nll(sequence, choice["prompt_logprobs"])
                total, count = total + sum(nll), count + len(nll)
        return total / count


def answer_nll(sequence: TokenSequence, scored: Sequence[Mapping[str, Any] | None]) -> list[float]:
    """The negative log-likelihood of each trained token, in nats, from vLLM's `prompt_logprobs`: one map a token."""
    found = []
    for token, trained, entry in zip(sequence.ids, sequence.mask, scored, strict=True):
        if trained:
            assert entry is not None, "only the first token has no probability, and it is never trained"
            found.append(-float(entry[str(token)]["logprob"]))
    return found
