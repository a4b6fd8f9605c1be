"""The conversations of a set, as the tokens that are scored.

A case is one conversation: the answers to give (of a preference pair the chosen one, and beside it the rejected one),
and the prompt of its last answer, which is asked for greedily. Must not know: torch, Redis.
Invariants: what is scored is what training would count, after exactly the tokens that a server would be prompted with;
the digest is of these tokens, so that equal digests are equal questions; an error names file and line, and no text.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BufferedReader
from typing import Any

import msgpack

from producer.errors import TandemError
from producer.imports import AUTO, Import
from producer.transcript import Transcript
from worker.data.examples import ExampleBuilder, ExampleError, TokenSequence

SHOWN_PROBLEMS = 20
NO_ANSWER = ("disliked", "comment")
"""Kinds that hold no answer to give."""


class CasesError(TandemError):
    """The file cannot be evaluated; the message names it, and the lines."""


@dataclass(frozen=True)
class Case:
    """One conversation. line: where it begins in the file, from 1. asked, rejected: sequences with the trained tokens
    marked. context: the tokens before its last answer; reference: that answer's, with the token that ends the turn.
    question: the last words of the user, for kept answers alone."""

    line: int
    id: str
    asked: tuple[TokenSequence, ...]
    rejected: tuple[TokenSequence, ...]
    context: tuple[int, ...]
    reference: tuple[int, ...]
    question: str = ""

    @property
    def tokens(self) -> int:
        """Trained tokens of the answers to give."""
        return trained(self.asked)


@dataclass(frozen=True)
class CaseSet:
    """A file's cases, in its order. left_out: how many of each kind hold no answer to give."""

    file: str
    cases: tuple[Case, ...]
    digest: str
    left_out: dict[str, int]


def trained(sequences: Sequence[TokenSequence]) -> int:
    """How many tokens of them are trained."""
    return sum(sum(one.mask) for one in sequences)


def read_cases(file: BufferedReader, builder: ExampleBuilder, format_name: str = AUTO) -> CaseSet:
    """The cases of `file`, which may be of any format that `tandem enqueue` reads. Raises `CasesError` for lines that
    cannot be scored, all of them named, and `NotTranscriptsError` for a file that is of no known format."""
    source = Import(file, file.name, format_name)
    cases, problems, left_out = list[Case](), list[str](), Counter[str]()
    for items, _size in source.blocks():
        for line, found in items:
            try:
                if not isinstance(found, Transcript):
                    raise found
                if found.kind in NO_ANSWER:
                    left_out[found.kind] += 1
                else:
                    cases.append(_case(line, found, builder))
            except (ExampleError, ValueError) as error:  # InvalidTranscript is a ValueError
                problems.append(f"{source.name}:{line}: {error}")
    for reason, count in source.left_out.items():
        left_out[reason.name.lower()] += count
    problems += [f"{source.name}: {count:,} more lines are {name}" for name, count in source.strays.items()]
    if problems:
        more = [f"... and {len(problems) - SHOWN_PROBLEMS:,} more"] if len(problems) > SHOWN_PROBLEMS else []
        shown = "\n  ".join([*problems[:SHOWN_PROBLEMS], *more])
        raise CasesError(f"nothing was evaluated, {len(problems):,} lines cannot be scored:\n  {shown}")
    if not cases:
        raise CasesError(f"{source.name} holds no answer to give: there is nothing to evaluate")
    return CaseSet(source.name, tuple(cases), digest_of(cases), dict(left_out))


def digest_of(cases: Sequence[Case]) -> str:
    """Sixteen hex digits of what is scored, in order: tokens, and which of them count."""
    sides = [side for case in cases for side in (case.asked, case.rejected)]
    plain = [[[list(one.ids), list(one.mask)] for one in side] for side in sides]
    return hashlib.sha256(msgpack.packb(plain)).hexdigest()[:16]


def same_answer(decode: Callable[[Sequence[int]], str], answer: Sequence[int], reference: Sequence[int]) -> bool:
    """Whether two answers are the same text, but for the space around it."""
    return tuple(answer) == tuple(reference) or decode(list(answer)).strip() == decode(list(reference)).strip()


def _case(line: int, transcript: Transcript, builder: ExampleBuilder) -> Case:
    example = builder.build(transcript, transcript.id or f"line-{line}")
    asked = tuple(one for one in example.sequences if not one.rejected)
    rejected = tuple(replace(one, rejected=False) for one in example.sequences if one.rejected)
    context, reference = _last_answer(asked[-1])
    return Case(line, example.id, asked, rejected, context, reference, _question(transcript.messages))


def _last_answer(sequence: TokenSequence) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The last run of trained tokens, and what stands before it."""
    end = len(sequence.mask) - sequence.mask[::-1].index(True)
    begin = next((i + 1 for i in range(end - 1, -1, -1) if not sequence.mask[i]), 0)
    return sequence.ids[:begin], sequence.ids[begin:end]


def _question(messages: Sequence[dict[str, Any]]) -> str:
    content = next((one.get("content") for one in reversed(messages) if one["role"] == "user"), "")
    return content if isinstance(content, str) else ""
