"""A transcript -> the token sequences that train it, with an exact mask.

Must not know: torch, Redis, vLLM. What a single turn is, `worker.data.chat_turns` says.

Invariants: each trained turn stands in exactly one sequence, after exactly the tokens a server would have been prompted
with. Turns share a sequence where the prompt of the next begins with the very tokens so far; templates that rewrite
history (Qwen's drop the thinking of earlier turns) get a sequence a turn. No sequence exceeds `max_tokens`; what a
conversation costs over its longest sequence (the expansion) is reported and bounded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from producer.messages import says_something
from producer.transcript import Transcript
from worker.data.chat_turns import ExampleError, Turn, TurnRenderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "ExampleBuilder", "ExampleError", "TokenSequence"]


class TooLong(ExampleError):
    """A turn with all that comes before it does not fit into `max_tokens`."""


class TooExpansive(ExampleError):
    """The sequences together are over the bound on what they may cost."""


@dataclass(frozen=True)
class TokenSequence:
    """`mask[i]`: token i is trained, that is, predicted from ids[:i]. The first token never is."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]


@dataclass(frozen=True)
class Example:
    """What one transcript trains. `report` is plain: counts, how much was dropped, the expansion."""

    id: str
    sequences: tuple[TokenSequence, ...]
    weight: float
    report: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Tokens over all sequences, contexts included."""
        return sum(len(sequence.ids) for sequence in self.sequences)

    @property
    def trained_tokens(self) -> int:
        return sum(sum(sequence.mask) for sequence in self.sequences)


class ExampleBuilder:
    """Builds examples with one tokenizer.

    `overlong="truncate"` drops the oldest messages after the system message, up to a user turn, until every sequence
    fits into `max_tokens`; "reject" makes that an error. `max_expansion` bounds tokens over all sequences divided by
    those of the longest. `template_kwargs` are the server's default chat template arguments; `end_ids` the tokens
    that end a turn according to the model's generation config.
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
        turns = _trained_turns(transcript)
        messages = transcript.messages
        head = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
        start, sequences = head, None
        try:
            sequences = self._sequences(transcript, turns, head, head)
        except TooLong as error:
            if self.overlong == "reject":
                raise
            start, sequences = self._truncated(transcript, turns, head, error)
        return self._example(transcript, id, turns, sequences, start - head, start)

    def _example(
        self,
        transcript: Transcript,
        id: str,
        turns: list[int],
        sequences: list[TokenSequence],
        dropped: int,
        start: int,
    ) -> Example:
        tokens = sum(len(sequence.ids) for sequence in sequences)
        expansion = tokens / max(len(sequence.ids) for sequence in sequences)
        self._check_expansion(expansion)
        kept = [turn for turn in turns if turn >= start]
        report = {
            "turns": len(kept),
            "sequences": len(sequences),
            "tokens": tokens,
            "trained_tokens": sum(sum(sequence.mask) for sequence in sequences),
            "dropped_messages": dropped,
            "dropped_turns": len(turns) - len(kept),
            "expansion": round(expansion, 3),
        }
        return Example(id, tuple(sequences), transcript.weight, report)

    def _truncated(
        self, transcript: Transcript, turns: list[int], head: int, error: TooLong
    ) -> tuple[int, list[TokenSequence]]:
        """The earliest user turn from which on every sequence fits, and those sequences."""
        users = [i for i in range(head + 1, turns[-1]) if transcript.messages[i]["role"] == "user"]
        # The last trained turn has nearly always the longest prompt, and a later start only shortens it.
        first = bisect_left(users, True, key=lambda start: self._last_fits(transcript, turns, head, start))
        for start in users[first:]:
            try:
                return start, self._sequences(transcript, turns, head, start)
            except TooLong as later:
                error = later
            except TooExpansive:
                raise
            except ExampleError:
                continue  # a template may refuse to start here, say at a tool's answer dressed as a user's
        raise error

    def _last_fits(self, transcript: Transcript, turns: list[int], head: int, start: int) -> bool:
        try:
            self._turn(transcript, turns[-1], head, start)
        except TooLong:
            return False
        except ExampleError:
            return True  # no more than a question of length here; building says what is wrong
        return True

    def _sequences(self, transcript: Transcript, turns: list[int], head: int, start: int) -> list[TokenSequence]:
        """The trained turns from message `start` on, seen after the first `head` messages and those from `start` on."""
        last = self._turn(transcript, turns[-1], head, start)  # first of all, since it is the likeliest to be too long
        done: list[TokenSequence] = []
        ids: list[int] = []
        mask: list[bool] = []
        tokens = 0
        for index in (turn for turn in turns if turn >= start):
            turn = last if index == turns[-1] else self._turn(transcript, index, head, start)
            if turn.context[: len(ids)] != ids:
                done.append(_sequence(ids, mask))
                tokens += len(ids)
                self._check_expansion(tokens / self.max_tokens)  # a lower bound already: stop early
                ids, mask = [], []
            mask += [False] * (len(turn.context) - len(ids)) + turn.trained
            ids = turn.context + turn.continuation
        return [*done, _sequence(ids, mask)]

    def _turn(self, transcript: Transcript, index: int, head: int, start: int) -> Turn:
        messages = transcript.messages[:head] + transcript.messages[start : index + 1]
        turn = self._renderer.turn(messages, transcript.tools, transcript.chat_template_kwargs, f"messages[{index}]")
        if len(turn) > self.max_tokens:
            raise TooLong(
                f"messages[{index}] with its context has {len(turn)} tokens, the limit is {self.max_tokens}: "
                "shorten it, or raise the limit"
            )
        return turn

    def _check_expansion(self, expansion: float) -> None:
        if expansion > self.max_expansion:
            raise TooExpansive(
                f"the chat template rewrites history, so that this conversation would cost {expansion:.1f} times its "
                f"length; the bound is {self.max_expansion:g}: train on fewer turns (train_on), or raise the bound"
            )


def _trained_turns(transcript: Transcript) -> list[int]:
    """Indices of the turns to train on. Of "all", turns that say nothing are left out."""
    if isinstance(transcript.train_on, list):
        return sorted(transcript.train_on)
    turns = [i for i, message in enumerate(transcript.messages) if message["role"] == "assistant"]
    if transcript.train_on == "last":
        return turns[-1:]
    return [i for i in turns if says_something(transcript.messages[i])]


def _sequence(ids: list[int], mask: list[bool]) -> TokenSequence:
    return TokenSequence(tuple(ids), (False, *mask[1:]))
