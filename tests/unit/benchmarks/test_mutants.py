"""benchmarks/mutants.py: the lists fit the code, and the tool tells a mutant that dies from one that survives."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import mutants

LISTS = sorted((mutants.ROOT / "tests" / "mutants").glob("*.toml"))

CODE = "def double(x):\n    return 2 * x\n\ndef unused(x):\n    return x\n"
TESTS = "from code_under_test import double\n\ndef test_double():\n    assert double(3) == 6\n"
LIST = """
[[mutant]]
name = "seen"
file = "code_under_test.py"
old = "return 2 * x"
new = "return 3 * x"
tests = ["test_it.py"]
[[mutant]]
name = "hangs"
file = "code_under_test.py"
old = "return 2 * x"
new = "while True: pass"
tests = ["test_it.py"]
"""
UNSEEN = """
[[mutant]]
name = "unseen"
file = "code_under_test.py"
old = "    return x"
new = "    return 5"
tests = ["test_it.py"]
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of one file and its test, in the place of ours."""
    (tmp_path / "code_under_test.py").write_text(CODE)
    (tmp_path / "test_it.py").write_text(TESTS)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "COPIED", ("code_under_test.py", "test_it.py"))
    return tmp_path


def run(tree: Path, text: str, *options: str) -> int:
    (tree / "list.toml").write_text(text)
    return mutants.main([str(tree / "list.toml"), "--timeout", "20", *options])


def test_every_mutant_fits_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever changes a line that a mutant breaks has to move the mutant along."""
    assert LISTS
    code = mutants.main(["--check", *map(str, LISTS)])
    assert code == 0, capsys.readouterr().err
    named = {test.partition("::")[0] for path in LISTS for mutant in mutants.read_list(path) for test in mutant.tests}
    assert all((mutants.ROOT / test).exists() for test in named), named


@pytest.mark.slow
def test_mutants_that_tests_see_are_killed(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tree, LIST) == 0
    said = capsys.readouterr().out
    assert "killed " in said and "killed (did not end)" in said and "2 mutants, 0 survived" in said
    assert (tree / "code_under_test.py").read_text() == CODE, "the tree itself is never changed"


def test_a_mutant_that_no_test_sees_survives(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tree, UNSEEN, "--out", str(tree / "new" / "report.json")) == 1
    assert "SURVIVED" in capsys.readouterr().out and '"SURVIVED"' in (tree / "new" / "report.json").read_text()
    assert run(tree, UNSEEN + 'equivalent = "nobody calls it"\n') == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LIST.replace("2 * x", "x ** 2"), "0 times"),
        (LIST.replace("code_under_test.py", "gone.py"), "there is no file gone.py"),
        (LIST.replace("test_it.py", "test_other.py"), "without any mutant"),
        (LIST.replace("tests =", "test ="), "mutant 1 (seen)"),
        ("x = 1", "not a list of mutants"),
    ],
)
def test_a_list_that_does_not_fit_is_an_error(
    tree: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    assert run(tree, text) == 2
    assert said in capsys.readouterr().err


def test_tests_that_fail_by_themselves_prove_nothing(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "test_it.py").write_text(TESTS.replace("6", "7"))
    assert run(tree, LIST) == 2
    assert "fail without any mutant" in capsys.readouterr().err
