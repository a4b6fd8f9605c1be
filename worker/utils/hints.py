"""Commands in sentences: what we tell the user to run works only with the run directory that the user gave.

with_run_dir("no worker is running: start `tandem worker`", Path("/run/b"))
    "no worker is running: start `tandem worker --run-dir /run/b`"
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from worker.utils.unix_socket import default_run_dir

FLAG = "--run-dir"
_COMMAND = re.compile(r"`(tandem (?:serve|worker|status|doctor|rollback|forget|eval|diff|log|dashboard|train)\b[^`]*)`")
"""A command that has the flag, as our sentences quote it."""


def with_run_dir(sentence: str, run_dir: Path | None) -> str:
    """`sentence`, whose commands name `run_dir` where that is not the default; None: the user gave none."""
    if run_dir is None or run_dir.absolute() == default_run_dir().absolute():
        return sentence

    def placed(found: re.Match[str]) -> str:
        command = found[1]
        return found[0] if FLAG in command else f"`{command} {FLAG} {shlex.quote(str(run_dir))}`"

    return _COMMAND.sub(placed, sentence)


def option_of(arguments: Sequence[str], name: str) -> str | None:
    """What the option `name` says in `arguments`: the last of them; None where it is not there."""
    found, rest = None, iter(arguments)
    for argument in rest:
        if argument == name:
            found = next(rest, None)
        elif argument.startswith(f"{name}="):
            found = argument.partition("=")[2]
    return found
