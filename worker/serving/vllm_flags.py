"""vLLM's command line, its flags named as vLLM's own parser names them, and the error that refuses one.

Must not know: vLLM, torch.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from producer.errors import TandemError

SHORT = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size",
         "-q": "--quantization", "-n": "--nnodes", "-asc": "--api-server-count",
         "-sc": "--speculative-config"}  # fmt: skip
KV_FLAGS = ("--gpu-memory-utilization", "--device-memory-utilization", "--kv-cache-memory-bytes", "--kv-cache-memory")
"""Each says how much memory vLLM takes."""


class LaunchError(TandemError):
    """The server cannot be started like this."""


def parse_flags(options: Sequence[str]) -> dict[str, list[str]]:
    """Flag -> its values, as vLLM's parser would name them: --a_b=1 and --a-b 1 are alike, short forms spelt out."""
    flags: dict[str, list[str]] = {}
    current: list[str] | None = None
    for option in options:
        if option.startswith("-") and not _is_number(option):
            name, equals, value = option.partition("=")
            name = SHORT.get(name, name.replace("_", "-") if name.startswith("--") else name)
            current = flags.setdefault(name, [])
            if equals:
                current.append(value)
        elif current is not None:
            current.append(option)
    return flags


def said(given: Mapping[str, Sequence[str]], flags: Sequence[str]) -> str | None:
    """Where the user said one of `flags`: on the command line, or in the file of its --config; None where nowhere."""
    for flag in given:
        if len(flag) > 3 and any(known.startswith(flag) for known in flags):  # argparse takes beginnings
            return flag
    names = "|".join(re.escape(flag.removeprefix("--")).replace(r"\-", "[-_]") for flag in flags)
    for file in given.get("--config", ()):
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue  # vLLM reads it next, and says what is wrong with it
        if found := re.search(rf"^\s*[\"']?({names})[\"']?\s*:", text, re.MULTILINE):
            return f"{found[1]} in {file}"
    return None


def json_config(text: str) -> dict[str, object]:
    """A configuration that is written as JSON; empty where it is none, which vLLM will say better."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
