"""What an assistant thought before it answered: found in the fields and the markup that clients log it in.

Fields: `reasoning`, `reasoning_content`, `thinking`, `thinking_blocks`, `reasoning_details`. Markup: a think block that
begins the content, or ends before it (a server without a reasoning parser), and Open WebUI's `<details>`. A tag that an
answer merely mentions is text.
Invariants: what was found once is not looked for again (`take` is idempotent); errors quote no text.
"""

import html
import re
from collections.abc import Callable
from typing import Any

from .errors import InvalidTranscriptError
from .plain import as_map, as_text, kind

OPEN, CLOSE = "<think>", "</think>"

FIELDS = ("reasoning", "reasoning_content", "thinking", "thinking_blocks", "reasoning_details")

_CLOSE_LINE = re.compile(r"^</think>[ \t]*$", re.MULTILINE)
_DETAILS = re.compile(r'<details\s+type="(reasoning|tool_calls|code_interpreter)"')
_DETAILS_END = "</details>"
_SUMMARY = re.compile(r"\A\s*<summary>.*?</summary>", re.DOTALL)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)

_CUT_OFF = (
    "opens reasoning and never closes it, so there is no answer to learn: leave the message out, or give it weight 0"
)
_MARKUP = {
    "reasoning": "Open WebUI's markup of reasoning in the middle of an answer: send the text before it and the text "
    "after it as messages of their own, each with its reasoning in `reasoning`",
    "tool_calls": "Open WebUI's markup of a tool call, which would be learnt as text: send the call in `tool_calls` of "
    "a message by assistant and its result as a message by tool, or give the message weight 0",
    "code_interpreter": "Open WebUI's markup of its code interpreter, which would be learnt as text: send the code "
    "alone, or give the message weight 0",
}


def take(fields: dict[str, Any], content: str, where: str) -> tuple[str, str]:
    """(reasoning, the content without it) of an assistant's message; the fields that held it are removed from `fields`.

    Raises InvalidTranscriptError.
    """
    found: dict[str, str] = {}
    for name in FIELDS:
        if name in fields:
            found[name] = _READ.get(name, as_text)(fields.pop(name), f"{where}.{name}")
    said = {name: text for name, text in found.items() if text.strip()}
    if len({text.strip() for text in said.values()}) > 1:
        first, second, *_ = said
        raise InvalidTranscriptError(f"{where}.{first}", f"differs from {second}; send the one that is right")
    if said:
        reasoning = next(iter(said.values()))
    elif "reasoning_details" in found:
        raise InvalidTranscriptError(
            f"{where}.reasoning_details",
            "holds no text of the reasoning itself (a summary, or encrypted): put the text into reasoning, or remove "
            "the field to train the answer alone",
        )
    else:
        reasoning, content = _from_content(content)
    return reasoning, content


def unfit(content: str) -> str | None:
    """Why the content of an assistant's message, after `take`, is not what a model should learn to write, if so."""
    text = content.lstrip()
    if text.rstrip() == OPEN or text.startswith(OPEN + "\n"):
        return _CUT_OFF
    details = _details(text, _DETAILS.match)
    if details is not None and details[0] == "reasoning":
        return _CUT_OFF
    left = _details(_CODE.sub("", content), _DETAILS.search)
    return f"holds {_MARKUP[left[0]]}" if left else None


def _details(text: str, find: Callable[[str], re.Match[str] | None]) -> tuple[str, int] | None:
    """(type, where it ends) of the first opening tag. Its end is looked for once: where there is none behind the first,
    there is none behind any."""
    tag = find(text)
    end = -1 if tag is None else text.find(">", tag.end())
    return None if tag is None or end < 0 else (tag[1], end + 1)


def _from_content(content: str) -> tuple[str, str]:
    """Blocks of reasoning that the content begins with, joined, and the rest."""
    parts: list[str] = []
    while True:
        split = _leading_block(content) or (None if any(parts) else _unopened_block(content))
        if split is None:
            return "\n\n".join(filter(None, parts)), content
        parts.append(split[0])
        content = split[1]


def _leading_block(content: str) -> tuple[str, str] | None:
    text = content.lstrip()
    if text.startswith(OPEN) and not text.startswith(OPEN + " "):  # "<think> and ..." speaks of the tag
        inside, closed, rest = text.removeprefix(OPEN).partition(CLOSE)
        if closed:
            return inside.strip(), rest.lstrip()
    details = _details(text, _DETAILS.match)
    if details is not None and details[0] == "reasoning":
        inside, closed, rest = text[details[1] :].partition(_DETAILS_END)
        if closed:
            return _unquoted(inside), rest.lstrip()
    return None


def _unopened_block(content: str) -> tuple[str, str] | None:
    """Where the prompt opened the block, its end stands alone on a line, in no code and after no opening tag."""
    end = _CLOSE_LINE.search(content)
    if end is None:
        return None
    before = content[: end.start()]
    if OPEN in before or before.count("```") % 2:
        return None
    return before.strip(), content[end.end() :].lstrip()


def _unquoted(inside: str) -> str:
    """The reasoning in Open WebUI's markup: a summary, then the escaped text with "> " before each line."""
    lines = html.unescape(_SUMMARY.sub("", inside)).strip().splitlines()
    return "\n".join(line.removeprefix(">").removeprefix(" ") for line in lines).strip()


def _thinking_blocks(blocks: Any, where: str) -> str:
    """The text of Anthropic's thinking blocks, as gateways pass them on; redacted ones have none."""
    return _joined(blocks, where, lambda block: block.get("thinking"), "thinking")


def _reasoning_details(details: Any, where: str) -> str:
    """The text of OpenRouter's reasoning details; summaries and encrypted ones are not the reasoning."""
    return _joined(
        details, where, lambda item: item.get("text") if item.get("type") == "reasoning.text" else None, "text"
    )


def _joined(items: Any, where: str, text_of: Callable[[dict[str, Any]], Any], name: str) -> str:
    if not isinstance(items, list):
        raise InvalidTranscriptError(where, f"must be a list, not {kind(items)}")
    texts = [text_of(as_map(item, f"{where}[{index}]")) for index, item in enumerate(items)]
    return "".join(as_text(text, f"{where}[{index}].{name}") for index, text in enumerate(texts) if text is not None)


_READ: dict[str, Callable[[Any, str], str]] = {
    "thinking_blocks": _thinking_blocks,
    "reasoning_details": _reasoning_details,
}
