"""Kept answers: on disk, for nobody else, whole or absent."""

import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.operations.evaluation import answers
from worker.operations.evaluation.answers import Answer, AnswersError
from worker.versions.evaluations import Evaluation, Score, evaluation

TEXTS = [Answer("c-1", 1, "Wann? \u2028", "Um sechs.", "Um\nzehn \ud800", False, 0.5)]


def at(version: int, lineage: str = "a" * 32, name: str = "facts") -> Evaluation:
    return evaluation(name, version, lineage, "d" * 16, [Score(1.0, 2)], "live")


def test_files_are_private_and_come_back_as_they_were(tmp_path: Path) -> None:
    state = tmp_path / "not" / "there" / "yet"
    path = answers.keep(state, at(3), TEXTS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (path.parent, path.parents[1], state):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    found = answers.find(state, "facts", 3)
    assert found is not None and found.answers == TEXTS
    assert (found.name, found.version, found.lineage, found.digest) == ("facts", 3, "a" * 32, "d" * 16)
    assert answers.find(state, "facts", 4) is None and answers.find(state, "other", 3) is None
    assert answers.names(state) == ["facts"] and answers.names(tmp_path) == []


def test_they_are_bounded(tmp_path: Path) -> None:
    for version in range(answers.KEPT + 2):
        answers.keep(tmp_path, at(version), TEXTS)
    kept = [version for version in range(answers.KEPT + 2) if answers.find(tmp_path, "facts", version)]
    assert len(kept) == answers.KEPT and answers.KEPT + 1 in kept


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}\n', '{"format": 1}\n', "\u00ff"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = answers.keep(tmp_path, at(3), TEXTS)
    path.write_text(text)
    with pytest.raises(AnswersError, match=str(path)):
        answers.find(tmp_path, "facts", 3)


def test_where_nothing_can_be_written_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluations").write_text("in the way")
    with pytest.raises(AnswersError, match="could not be kept in"):
        answers.keep(tmp_path, at(3), TEXTS)


@settings(max_examples=25)
@given(st.lists(st.builds(Answer, *[st.text()] * 1, st.integers(), *[st.text()] * 3, st.booleans(), st.floats(0, 9))))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[Answer]) -> None:
    state = tmp_path_factory.mktemp("state")
    answers.keep(state, at(1), texts)
    found = answers.find(state, "facts", 1)
    assert found is not None and found.answers == texts
