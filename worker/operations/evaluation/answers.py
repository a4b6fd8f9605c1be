"""Kept answers: what a version said to a set's questions, in files of the state directory, never in Redis.

    STATE/evaluations/NAME/VERSION-LINEAGE.jsonl     first what it is of, then one line a conversation

Must not know: torch.
Invariants: folders are 0700 and files 0600; a file is whole or absent; `KEPT` files of a set stay, the latest.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from producer.errors import TandemError
from worker.checkpoint import state_dir
from worker.versions.evaluations import Evaluation, checked_name

FOLDER = "evaluations"
KEPT = 20


class AnswersError(TandemError):
    """A file of kept answers cannot be read or written; the message names it."""


@dataclass(frozen=True)
class Answer:
    """One conversation's. exact: whether `answer` is `reference`."""

    id: str
    line: int
    question: str
    reference: str
    answer: str
    exact: bool
    loss: float


@dataclass(frozen=True)
class Kept:
    """The answers of the set `name` at `version` of `lineage`; digest: of the set."""

    name: str
    version: int
    lineage: str
    digest: str
    answers: list[Answer]


def keep(state: Path, found: Evaluation, answers: Sequence[Answer]) -> Path:
    """Write them; the file. Raises `AnswersError`."""
    folder = state / FOLDER / checked_name(found.name)
    path = folder / f"{found.version}-{found.lineage}.jsonl"
    head = {"format": 1, "name": found.name, "version": found.version, "lineage": found.lineage, "digest": found.digest}
    lines = [head, *map(asdict, answers)]
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        for one in (state / FOLDER, folder):
            one.mkdir(mode=0o700, exist_ok=True)
            one.chmod(0o700)
        state_dir.replace(path, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        others = sorted((one for one in folder.glob("*.jsonl") if one != path), key=lambda one: one.stat().st_mtime)
        for one in others[: max(0, len(others) + 1 - KEPT)]:
            one.unlink()
    except OSError as error:
        raise AnswersError(f"the answers could not be kept in {path} ({error})") from None
    return path


def names(state: Path) -> list[str]:
    """Sets of which answers are kept."""
    return sorted(path.name for path in (state / FOLDER).glob("*") if path.is_dir() and any(path.glob("*.jsonl")))


def find(state: Path, name: str, version: int) -> Kept | None:
    """The answers of the set `name` at `version`, of the lineage that was evaluated last. Raises `AnswersError`."""
    files = (state / FOLDER / checked_name(name)).glob(f"{version}-*.jsonl")
    path = max(files, key=lambda one: one.stat().st_mtime, default=None)
    if path is None:
        return None
    try:
        head, *rest = (json.loads(line) for line in path.read_text().splitlines() if line)
        if head["format"] != 1:
            raise ValueError("a later format")
        answers = [Answer(**one) for one in rest]
        return Kept(head["name"], int(head["version"]), head["lineage"], head["digest"], answers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AnswersError(f"{path} cannot be read ({error}): evaluate with --keep-answers again") from None
