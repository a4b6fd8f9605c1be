"""A transcript -> the token sequences that train it, with an exact mask.

Must not know: torch, Redis, vLLM. What a single turn is, `worker.data.chat_turns` says.

Invariants: each trained turn stands in exactly one sequence, after exactly the tokens a server would have been prompted
with. Turns share a sequence where the prompt of the next begins with the very tokens so far; templates that rewrite
history (Qwen's drop the thinking of earlier turns) get a sequence a turn. No sequence exceeds `max_tokens`. What a
conversation costs over its longest sequence (the expansion) is bounded, and so is the rendering that is done for it:
within those bounds the latest turns are trained, and the report says how many.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING, Any, Literal

from producer.feedback import Kind
from producer.transcript import Transcript, trained_turns
from worker.data.chat_turns import ExampleError, Turn, TurnRenderer, strings
from worker.data.teacher import needs_teacher, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "ExampleBuilder", "ExampleError", "TokenSequence"]


class TooLongError(ExampleError):
    """A turn with all that comes before it does not fit into `max_tokens`."""


RENDERED = 12 * 1024 * 1024
"""Characters that are rendered and tokenized for one transcript at most, beyond its last turn: half a minute's work."""
MESSAGE = 150
"""Characters that a message counts besides its own: what a template's loop costs, in the same time."""


@dataclass(frozen=True)
class TokenSequence:
    """`mask[i]`: token i is trained, that is, predicted from ids[:i]. The first token never is.

    rejected: it holds the answer that another is to be preferred to.
    """

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    rejected: bool = False


@dataclass(frozen=True)
class Example:
    """What one transcript trains. `report` is plain: counts, how much was dropped, the expansion. Its `turns` are
    trained; `dropped_turns` were asked for too, but lie before what `max_tokens` or the bounds allow. `kind` says by
    which loss (`worker.trainer.losses`).

    teachers: where that compares with a teacher (`worker.data.teacher`), what the teacher reads: the same trained
    tokens in the same order, after other contexts.
    """

    id: str
    sequences: tuple[TokenSequence, ...]
    weight: float
    report: dict[str, Any]
    kind: Kind = "demonstration"
    teachers: tuple[TokenSequence, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens over all sequences, contexts included."""
        return sum(len(sequence.ids) for sequence in self.sequences)

    @property
    def teacher_tokens(self) -> int:
        """Tokens over all that the teacher reads."""
        return sum(len(sequence.ids) for sequence in self.teachers)

    @property
    def trained_tokens(self) -> int:
        return sum(self.sides)

    @property
    def sides(self) -> tuple[int, int]:
        """Trained tokens of what is asked for or rated, and of the rejected answer of a correction."""
        counts = [0, 0]
        for sequence in self.sequences:
            counts[sequence.rejected] += sum(sequence.mask)
        return counts[0], counts[1]


class ExampleBuilder:
    """Builds examples with one tokenizer.

    `overlong="truncate"` drops the oldest messages after the system message, up to a user turn, until every sequence
    fits into `max_tokens`; "reject" makes that an error. `max_expansion` bounds tokens over all sequences divided by
    those of the longest: the latest turns within it are trained. `template_kwargs` are the server's default chat
    template arguments; `end_ids` the tokens that end a turn according to the model's generation config.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        overlong: Literal["truncate", "reject"] = "truncate",
        max_expansion: float = 16.0,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        end_ids: Collection[int] = (),
    ) -> None:
        if overlong not in ("truncate", "reject"):
            raise ExampleError(f'overlong must be "truncate" or "reject", not {overlong!r}')
        if max_expansion < 1:
            raise ExampleError(f"max_expansion must be at least 1, not {max_expansion:g}")
        if chat_template is None and not tokenizer.chat_template:
            raise ExampleError("the tokenizer has no chat template: name one")
        self.max_tokens = max_tokens
        self.overlong = overlong
        self.max_expansion = max_expansion
        self._renderer = TurnRenderer(
            tokenizer, chat_template=chat_template, template_kwargs=template_kwargs, end_ids=end_ids
        )

    def build(self, transcript: Transcript, id: str) -> Example:
        """The example of `transcript`. Raises ExampleError, which names the message and what to do."""
        asked = trained_turns(transcript.messages, transcript.train_on)
        work = _Work(self, transcript.messages, transcript)
        start, turns = work.found(asked, work.head)
        sequences = _joined(turns)
        if transcript.rejected is not None:
            # Both answers are seen after the same messages, so that nothing but the answer tells them apart.
            other = _Work(self, [*transcript.messages[:-1], transcript.rejected], transcript, last="rejected")
            later, rejected = other.found(asked, start)
            if later > start:
                start, turns = later, work.latest(asked, later)
            sequences = [*_joined(turns), *(replace(one, rejected=True) for one in _joined(rejected))]
        teachers: tuple[TokenSequence, ...] = ()
        if needs_teacher(transcript):
            start, turns, taught = work.beside_teacher(asked, start, turns)
            sequences = _joined(turns)
            teachers = tuple(sequence for turn in taught for sequence in _joined([turn]))
        tokens = sum(len(sequence.ids) for sequence in sequences)
        report: dict[str, Any] = {
            "turns": len(turns),
            "sequences": len(sequences),
            "tokens": tokens,
            "trained_tokens": sum(sum(sequence.mask) for sequence in sequences),
            "dropped_messages": start - work.head,
            "dropped_turns": len(asked) - len(turns),
            "expansion": round(tokens / max(len(sequence.ids) for sequence in sequences), 3),
        }
        if transcript.kind != "demonstration":
            report["kind"] = transcript.kind
        if teachers:
            report["teacher_tokens"] = sum(len(sequence.ids) for sequence in teachers)
        weight = transcript.weight * abs(transcript.rating or 1.0) or sys.float_info.min
        return Example(id, tuple(sequences), weight, report, transcript.kind, teachers)

    def turn(self, transcript: Transcript, messages: list[dict[str, Any]], where: str) -> Turn:
        """The turn that is the last of `messages`; `where`: its name in errors. Raises TooLongError."""
        turn = self._renderer.turn(messages, transcript.tools, transcript.chat_template_kwargs, where)
        if len(turn) > self.max_tokens:
            raise TooLongError(
                f"{where} with its context has {len(turn)} tokens, the limit is {self.max_tokens}: "
                "shorten it, or raise the limit"
            )
        return turn


class _Work:
    """One conversation of a transcript while its example is built: what may still be rendered for it, and what was
    found.

    `last`: what errors call its last turn. `shown`: as a teacher is shown it. `head`: how many system messages it opens
    with; they stay when older messages are dropped.
    """

    def __init__(
        self,
        builder: ExampleBuilder,
        messages: list[dict[str, Any]],
        transcript: Transcript,
        last: str | None = None,
        *,
        shown: bool = False,
    ) -> None:
        self.builder, self.messages, self.transcript, self.shown = builder, messages, transcript, shown
        self.last = last or f"messages[{len(messages) - 1}]"
        self.head = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
        self.left = RENDERED
        sizes = (MESSAGE + sum(map(len, strings(message))) for message in messages)
        self._before = list(accumulate(sizes, initial=0))  # characters of the messages before each
        self._tools = sum(map(len, strings(transcript.tools or [])))

    def found(self, asked: list[int], start: int) -> tuple[int, list[Turn]]:
        """Where the conversation begins, at `start` or later, so that it fits; and what is trained of it from there."""
        try:
            return start, self.latest(asked, start)
        except TooLongError as error:
            if self.builder.overlong == "reject":
                raise
            return self.truncated(asked, error, start)

    def beside_teacher(self, asked: list[int], start: int, turns: list[Turn]) -> tuple[int, list[Turn], list[Turn]]:
        """Where the conversation begins, what is trained of it, and the same turns as the teacher reads them: so many
        that both fit. The answers have the student's tokens, whatever the template makes of them in another context."""
        work = _Work(self.builder, self.messages, self.transcript, self.last, shown=True)
        later, taught = work.found(asked, start)
        if later > start:
            start, turns = later, self.latest(asked, later)
        count = min(len(turns), len(taught))
        turns, taught = turns[-count:], taught[-count:]
        taught = [replace(other, continuation=own.continuation, trained=own.trained)
                  for own, other in zip(turns, taught, strict=True)]  # fmt: skip
        if any(len(turn) > self.builder.max_tokens for turn in taught):
            raise TooLongError(f"{self.last} does not fit beside what its teacher is shown: shorten it")
        return start, turns, taught

    def latest(self, asked: list[int], start: int) -> list[Turn]:
        """The latest of the turns `asked` for that the bounds allow, in order, seen after the first `head` messages
        and those from `start` on. Raises TooLongError."""
        turns: list[Turn] = []  # the last one first
        tokens = longest = 0
        for index in reversed([turn for turn in asked if turn >= start]):
            if turns and self.left <= 0:
                break
            turn = self.turn(index, start)
            if not (turns and _continues(turns[-1], turn)):  # it ends a sequence
                tokens, longest = tokens + len(turn), max(longest, len(turn))
                if tokens > self.builder.max_expansion * longest:
                    break
            turns.append(turn)
        return turns[::-1]

    def truncated(self, asked: list[int], error: TooLongError, start: int) -> tuple[int, list[Turn]]:
        """The earliest user turn after `start` from which on every sequence fits, and what is trained from there."""
        users = [i for i in range(start + 1, asked[-1]) if self.messages[i]["role"] == "user"]
        # The last trained turn has nearly always the longest prompt, and a later start only shortens it.
        first = bisect_left(users, True, key=lambda start: self._fits(asked[-1], start))
        for start in users[first:]:
            try:
                return start, self.latest(asked, start)
            except TooLongError as later:
                error = later
            except ExampleError:
                pass  # a template may refuse to start here, say at a tool's answer dressed as a user's
            if self.left <= 0:
                raise ExampleError(
                    f"{error}; looking for a later start took too long: shorten the conversation, or train on its last "
                    'turn (train_on: "last")'
                )
        raise error

    def _fits(self, index: int, start: int) -> bool:
        try:
            self.turn(index, start)
        except TooLongError:
            return False
        except ExampleError:
            return True  # no more than a question of length here; building says what is wrong
        return True

    def turn(self, index: int, start: int) -> Turn:
        """The turn `index`, seen from `start` on. Raises TooLongError."""
        self.left -= self._before[self.head] + self._before[index + 1] - self._before[start] + self._tools
        messages = self.messages[: self.head] + self.messages[start : index + 1]
        where = self.last if index == len(self.messages) - 1 else f"messages[{index}]"
        if self.shown:
            messages = shown(self.transcript, messages)
            where += f", with its {'comment' if self.transcript.comment else 'demonstration'},"
        return self.builder.turn(self.transcript, messages, where)


def _continues(later: Turn, earlier: Turn) -> bool:
    """Whether the prompt of `later` begins with the very tokens of `earlier`, so that both fit into one sequence."""
    end = len(earlier.context)
    return (
        later.context[:end] == earlier.context
        and later.context[end : end + len(earlier.continuation)] == earlier.continuation
    )


def _joined(turns: list[Turn]) -> list[TokenSequence]:
    """The sequences of turns in order."""
    sequences: list[TokenSequence] = []
    mask: list[bool] = []
    for turn, later in zip_longest(turns, turns[1:]):
        mask += [False] * (len(turn.context) - len(mask)) + turn.trained
        if later is None or not _continues(later, turn):
            sequences.append(_sequence(turn.context + turn.continuation, mask))
            mask = []
    return sequences


def _sequence(ids: list[int], mask: list[bool]) -> TokenSequence:
    return TokenSequence(tuple(ids), (False, *mask[1:]))
