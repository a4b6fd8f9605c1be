"""Asks the running server, over HTTP alone: what each case costs, and what it answers greedily.

A worker may be running: nothing here takes its lock, pauses the server or touches weights. Each chunk of cases is asked
between two looks at the version, with a cache salt of its own, so that no cached prefix of older weights is read.
Must not know: torch, the trainer.
Invariants: a figure is of one version of one lineage, which is named with it; where the version moves under a chunk,
the chunk is asked again, in halves; no text of a case is in an error.
"""

import json
import math
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from typing import Any

from producer.errors import TandemError
from worker.data.examples import TokenSequence
from worker.operations.evaluation.cases import Case, same_answer, trained
from worker.operations.evaluation.found import SPARE, At, Found
from worker.serving.protocol import TORN, VERSION_HEADER, VERSION_PATH
from worker.versions.evaluations import Score

CHUNK, CHUNK_TOKENS = 16, 8192
"""Cases, and tokens to score, of one request."""
TRIES = 6
"""How often one case is asked before the version is said to move too fast."""
ROUNDS = 3
"""How often those of older versions are asked again, so that all are of one."""
ANSWER_SECONDS = 900.0

Ask = Callable[[str, dict[str, Any] | None], tuple[dict[str, Any], str]]
"""(path, body or None for a GET) -> (answer, what the header says of the version)."""


class LiveError(TandemError):
    """The server cannot be asked, or does not stay at one version for long enough; the message says what to do."""


class _MovedError(Exception):
    """The version moved while a chunk was asked."""


class Server:
    """The server at `url`. key: its --api-key. decode: tokens to text, the server's own tokenizer's."""

    def __init__(self, url: str, decode: Callable[[Sequence[int]], str], key: str | None = None) -> None:
        self.url, self.decode, self.key = url.rstrip("/"), decode, key
        self.longest = 0
        self._model = ""

    def at(self) -> At:
        """Which weights it serves now. Raises `LiveError` where it serves none."""
        said, _ = self._ask(VERSION_PATH)
        if said.get("state") == TORN:
            raise LiveError(f"the server at {self.url} refuses to serve: {said.get('reason')}")
        return At(int(said["version"]), str(said["lineage"]))

    def measure(
        self, cases: Sequence[Case], *, answers: bool = True, tell: Callable[[int], object] = lambda done: None
    ) -> list[Found]:
        """Every case, in order; at one version if it stands still for long enough, else each at its own.

        answers: ask for the greedy ones. tell: how many are found. Raises `LiveError`.
        """
        self._look()
        found: dict[int, Found] = {}
        todo = list(range(len(cases)))
        for _ in range(ROUNDS):
            for chunk in self._chunks(cases, todo):
                found |= self._chunk(cases, chunk, answers, TRIES)
                tell(len(found))
            lineages = {one.at.lineage for one in found.values()}
            if len(lineages) > 1:
                raise LiveError(f"the server at {self.url} was started again meanwhile: evaluate again")
            newest = max(one.at.version for one in found.values())
            todo = [i for i in range(len(cases)) if found[i].at.version != newest]
            if not todo:
                break
        return [found[i] for i in range(len(cases))]

    def _chunks(self, cases: Sequence[Case], numbers: Sequence[int]) -> list[list[int]]:
        """The cases `numbers`, so many at a time as one request takes."""
        chunks: list[list[int]] = []
        tokens = 0
        for number in numbers:
            size = sum(len(one.ids) for one in (*cases[number].asked, *cases[number].rejected))
            if not chunks or len(chunks[-1]) == CHUNK or tokens + size > CHUNK_TOKENS:
                chunks.append([])
                tokens = 0
            chunks[-1].append(number)
            tokens += size
        return chunks

    def _chunk(self, cases: Sequence[Case], numbers: list[int], answers: bool, tries: int) -> dict[int, Found]:
        try:
            return dict(zip(numbers, self._at_one_version([cases[i] for i in numbers], answers), strict=True))
        except _MovedError:
            if tries <= 1:
                raise LiveError(
                    "the version moved each time a conversation was asked: pause training for the while (tandem pause,"
                    " then tandem resume), or evaluate a version that has been (--at VERSION)"
                ) from None
        half = max(1, len(numbers) // 2)
        parts = [part for part in (numbers[:half], numbers[half:]) if part]
        return {number: one for part in parts for number, one in self._chunk(cases, part, answers, tries - 1).items()}

    def _at_one_version(self, cases: Sequence[Case], answers: bool) -> list[Found]:
        """Raises `_MovedError`."""
        before, salt = self.at(), uuid.uuid4().hex
        headers = []
        sequences = [one for case in cases for one in (*case.asked, *case.rejected)]
        body: dict[str, Any] = {"prompt": [list(one.ids) for one in sequences], "max_tokens": 1, "prompt_logprobs": 0}
        scored, header = self._post(body | {"cache_salt": salt})
        headers.append(header)
        nll = [_nll(sequence, choice["prompt_logprobs"]) for sequence, choice in zip(sequences, scored, strict=True)]
        said: list[tuple[int, ...] | None] = [None] * len(cases)
        ended = [False] * len(cases)
        if answers:
            for numbers, room in self._together(cases):
                body = {"prompt": [list(cases[i].context) for i in numbers], "max_tokens": room}
                body |= {"stop_token_ids": sorted({cases[i].reference[-1] for i in numbers}), "return_token_ids": True}
                made, header = self._post(body | {"cache_salt": salt})
                headers.append(header)
                for i, choice in zip(numbers, made, strict=True):
                    said[i], ended[i] = _answer(choice, cases[i].reference[-1])
        after = self.at()
        if before != after or any(header.rpartition("-")[2] != str(before.version) for header in headers):
            raise _MovedError
        rest = iter(nll)
        found = []
        for case, answer, end in zip(cases, said, ended, strict=True):
            asked = math.fsum(next(rest) for _ in case.asked)
            rejected = math.fsum(next(rest) for _ in case.rejected)
            margin = rejected / trained(case.rejected) - asked / case.tokens if case.rejected else None
            exact = None if answer is None else end and same_answer(self.decode, answer, case.reference[:-1])
            found.append(Found(before, Score(asked, case.tokens, exact, margin), answer))
        return found

    def _together(self, cases: Sequence[Case]) -> Iterator[tuple[list[int], int]]:
        """The numbers of the cases that are asked together, and how many tokens their answers may have: all that a
        reference has, and as much again. A case whose context leaves less room is asked alone: the others' answers
        would be cut."""
        wanted = max(2 * len(case.reference) + SPARE for case in cases)
        left = [self.longest - len(case.context) for case in cases]
        if roomy := [i for i, room in enumerate(left) if room >= wanted]:
            yield roomy, wanted
        for i, room in enumerate(left):
            if room < wanted:
                yield [i], room

    def _look(self) -> None:
        """Ask for the model's name and its context."""
        models, _ = self._ask("/v1/models")
        try:
            self._model, self.longest = str(models["data"][0]["id"]), int(models["data"][0]["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise LiveError(f"{self.url} does not say which model it serves: is it a server of Tandem's?") from None

    def _post(self, body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
        """The choices in the order of the prompts, and what the header says of the version."""
        answer, header = self._ask("/v1/completions", {"model": self._model, "temperature": 0, "store": False} | body)
        return sorted(answer["choices"], key=lambda choice: int(choice["index"])), header

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[dict[str, Any], str]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as reply:
                return json.load(reply), reply.headers.get(VERSION_HEADER, "")
        except urllib.error.HTTPError as error:
            raise LiveError(f"{self.url}{path} answers {error.code}: {_reason(error)}") from None
        except (OSError, ValueError, HTTPException) as error:  # refused, half an answer, a URL that is none, no JSON
            reason = getattr(error, "reason", error)
            raise LiveError(f"{self.url} cannot be asked ({reason}): name the server with --url") from None


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says, without what it was asked; it quotes no prompt of tokens."""
    try:
        return str(json.load(error)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return {401: "give its key with --api-key-file, or $VLLM_API_KEY"}.get(error.code, str(error.reason))


def _nll(sequence: TokenSequence, scored: Sequence[dict[str, Any] | None]) -> float:
    """Of the trained tokens, summed, in nats, from vLLM's `prompt_logprobs`: one map a token, None for the first."""
    pairs = zip(sequence.ids, sequence.mask, scored, strict=True)
    return math.fsum(-float(at[str(token)]["logprob"]) for token, counts, at in pairs if counts and at is not None)


def _answer(choice: dict[str, Any], end: int) -> tuple[tuple[int, ...], bool]:
    """The tokens of a generated answer, and whether it ended by itself."""
    tokens = tuple(int(token) for token in choice["token_ids"])
    ended = choice["finish_reason"] == "stop"
    return (tokens[:-1] if ended and tokens and tokens[-1] == end else tokens), ended
