"""One assistant turn: the token ids a server is prompted with, and those it would then have had to generate.

Knows chat templates and tokenizers; Must not know: torch, vLLM, Redis.
Invariants: the context is the rendering of everything before the turn with the generation prompt, tokenized as a server
tokenizes it (control tokens are parsed wherever they stand, also in a user's text). The continuation is what the
rendering of the turn itself adds to exactly that text, tokenized by itself, up to and with the end-of-turn token. Where
that cannot be had, ExampleError says which message and why: nothing is ever masked by searching for text in a whole.

Control tokens that an assistant's own words spell out (say, "<|im_end|>" in an answer about chat templates) are
tokenized as the plain text a model would have had to write; only the template's own are control tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from producer.errors import TandemError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Message = Mapping[str, Any]
    Tools = Sequence[Mapping[str, Any]]

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")  # transformers' own notion of a template that has them
_PROBE = "Tandemprobe"


class ExampleError(TandemError):
    """A transcript cannot be made into an example with this tokenizer, template or limit. It quotes no transcript."""


@dataclass(frozen=True)
class Turn:
    """`context` is given, `continuation` is what follows; `trained[k]` says whether continuation[k] is trained."""

    context: list[int]
    continuation: list[int]
    trained: list[bool]

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)


class TurnRenderer:
    """Renders and tokenizes turns with one tokenizer and chat template.

    `template_kwargs` are the server's defaults (vLLM's --default-chat-template-kwargs); a transcript's own win.
    `end_ids` are tokens known to end a turn besides the tokenizer's eos, as generation_config.json names them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        end_ids: Collection[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.template_kwargs = dict(template_kwargs or {})
        added = tokenizer.added_tokens_decoder
        ends = {*end_ids, tokenizer.eos_token_id} & added.keys()
        self._controls = {t.content: id for id, t in added.items() if t.special or id in ends}
        self._control_ids = frozenset(self._controls.values())
        longest_first = sorted(self._controls, key=len, reverse=True)
        self._control_text = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._given_end_ids = ends

    def turn(self, messages: Sequence[Message], tools: Tools | None, kwargs: Mapping[str, Any], where: str) -> Turn:
        """The turn that is the last of `messages`, an assistant's. Raises ExampleError, which calls it `where`."""
        *before, message = messages
        if not before:
            raise ExampleError(
                f"{where} is an assistant turn with nothing before it: there is no prompt to answer; leave it out of "
                "train_on"
            )
        kwargs = self.template_kwargs | {"enable_thinking": has_reasoning(message)} | dict(kwargs)
        tools = None if tools is None else server_tools(tools)
        messages = [*map(_as_sent, before), message]
        context = self._render(messages[:-1], tools, kwargs, where, prompt=True)
        whole = self._render(messages, tools, kwargs, where, prompt=False)
        if not whole.startswith(context):
            raise ExampleError(f"{where} {self._why_no_continuation(message, kwargs)}")
        ids, offsets = self._continuation(whole[len(context) :], message, where)
        trained = [True] * len(ids)
        if _GENERATION_TAG.search(self._template(tools)):
            spans = self._generation_spans(messages, tools, kwargs, whole, where)
            trained = self._tagged(offsets, len(context), spans, where)
        return Turn(self._encode(context)[0], ids, trained)

    # Rendering

    def _template(self, tools: Any) -> str:
        return self.tokenizer.get_chat_template(self.chat_template, tools)

    def _render(self, messages: Any, tools: Any, kwargs: Mapping[str, Any], where: str, *, prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=prompt,
                **kwargs,
            )
        except Exception as error:  # a template is a program over the transcript: it may raise anything
            raise ExampleError(
                f"{where}: the chat template refuses the conversation up to here: {_reason(error)}"
            ) from None

    def _generation_spans(
        self, messages: Any, tools: Any, kwargs: Mapping[str, Any], whole: str, where: str
    ) -> list[tuple[int, int]]:
        """The character ranges of `whole` that the template's author put between generation tags."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self._template(tools),
            return_assistant_tokens_mask=True,
            **(self.tokenizer.special_tokens_map | dict(kwargs)),
        )
        if rendered[0] != whole:
            raise ExampleError(f"{where}: the chat template renders differently when its generation tags are read")
        return spans[0]

    @staticmethod
    def _tagged(offsets: list[tuple[int, int]], start: int, spans: list[tuple[int, int]], where: str) -> list[bool]:
        """Trained: what stands between generation tags and comes after the server's prompt, and the end of the turn.

        Tags that open before the prompt ends (around a think block the prompt already holds) or close before the
        end-of-turn token are thereby reconciled; tags that leave nothing out of the turn are an error.
        """
        trained = [any(start + a < end and begin < start + b for begin, end in spans) for a, b in offsets[:-1]]
        if not any(trained):
            raise ExampleError(f"{where} has nothing between the chat template's generation tags: nothing to train on")
        return [*trained, True]

    @staticmethod
    def _why_no_continuation(message: Message, kwargs: Mapping[str, Any]) -> str:
        if has_reasoning(message) and kwargs.get("enable_thinking") is False:
            return "has reasoning while chat_template_kwargs.enable_thinking is false: remove one of the two"
        return (
            "is not rendered as a continuation of the server's prompt for it (the rendering before the turn, with the "
            "generation prompt, is no prefix of the rendering with it): this chat template cannot be trained on"
        )

    # Tokenizing

    def _encode(self, text: str, *, plain: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and the character range of each; `plain` takes control tokens in `text` for ordinary text."""
        if not self.tokenizer.is_fast:
            raise ExampleError(
                "the tokenizer is not a fast one (tokenizer.json): its tokens cannot be located in the text"
            )
        out = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=plain, return_offsets_mapping=True, verbose=False
        )
        return out["input_ids"], out["offset_mapping"]

    def _continuation(self, text: str, message: Message, where: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character ranges of what the server had to generate: `text` up to and with the end of the turn."""
        own = Counter(hit for part in strings(message) for hit in self._control_text.findall(part))
        if own:
            return self._continuation_spelling_controls(text, own, where)
        ids, offsets = self._encode(text)
        end = self._end_of_turn(ids, where)
        return ids[: end + 1], offsets[: end + 1]

    def _end_of_turn(self, ids: list[int], where: str) -> int:
        """Position of the token that ends the turn, among the control tokens and white space that `ids` close with."""
        tail = len(ids)
        while tail and (ids[tail - 1] in self._control_ids or self.tokenizer.decode([ids[tail - 1]]).isspace()):
            tail -= 1
        controls = [at for at in range(tail, len(ids)) if ids[at] in self._control_ids]
        if not controls:
            raise ExampleError(
                f"{where}: the chat template puts no end-of-turn token after it, so that a server would not stop there"
            )
        return next((at for at in controls if ids[at] in self._end_ids), controls[-1])

    def _continuation_spelling_controls(
        self, text: str, own: Counter[str], where: str
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The same where the message itself spells out control tokens, `own` times each: the last one is the end."""
        ends = [hit for hit in self._control_text.finditer(text) if self._controls[hit.group()] in self._end_ids]
        body = text[: ends[-1].start()] if ends else ""
        ids, offsets = self._encode(body, plain=True)
        if Counter(self._control_text.findall(body)) != own or not self._control_ids.isdisjoint(ids):
            raise ExampleError(
                f"{where} spells out control tokens ({', '.join(sorted(own))}), and they cannot be told from the chat "
                "template's own: remove them from the message"
            )
        return [*ids, self._controls[ends[-1].group()]], [*offsets, ends[-1].span()]

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        """Tokens that end a turn: the first control token after a plain answer, the tokenizer's eos, those given."""
        probe = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        try:
            rest = self._render(probe, None, self.template_kwargs, "messages[1]", prompt=False).rpartition(_PROBE)[2]
        except ExampleError:  # a template that cannot render even this; each transcript will say so itself
            rest = ""
        hit = self._control_text.match(rest.lstrip())
        return frozenset(self._given_end_ids | ({self._controls[hit.group()]} if hit else set()))


def has_reasoning(message: Message) -> bool:
    """Whether a normalised assistant's message holds reasoning."""
    return bool(message.get("reasoning_content", "").strip())


def _as_sent(message: Message) -> Message:
    """An earlier message as a client sends it to the server, which is never told that there was no reasoning."""
    if message.get("reasoning_content") == "":
        return {name: value for name, value in message.items() if name != "reasoning_content"}
    return message


def server_tools(tools: Tools) -> list[dict[str, Any]]:
    """`tools` as vLLM's server hands them to the template: known fields, in its order, null where absent.

    Source: ChatCompletionToolsParam and FunctionDefinition of vLLM 0.32. (0.26 also passes unknown fields on.)
    """
    result = []
    for tool in tools:
        function = tool["function"]
        plain = {name: function.get(name) for name in ("name", "description", "parameters")}
        plain |= {name: function[name] for name in ("strict", "defer_loading") if function.get(name) is not None}
        result.append({"type": "function", "function": plain})
    return result


def strings(value: Any) -> Iterator[str]:
    """Every string in a plain value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings(item)


def _reason(error: Exception) -> str:
    """What a template says in raise_exception is for users; other errors may quote the transcript: their type alone."""
    from jinja2 import TemplateError, UndefinedError

    plain = isinstance(error, TemplateError) and not isinstance(error, UndefinedError)
    return str(error)[:200] if plain else type(error).__name__
