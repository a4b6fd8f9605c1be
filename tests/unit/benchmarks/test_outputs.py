"""Where benchmarks write: looked at before anything is measured; and that benchmarks can be run from their folder."""

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import outputs

FOLDER = Path(outputs.__file__).parent


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """A path that no file or folder can be made at, by nobody."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "below"


def test_folders_are_made_and_left_empty(tmp_path: Path) -> None:
    assert outputs.folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    kept = outputs.file(tmp_path / "c" / "d.json")
    assert kept.parent.is_dir() and not kept.exists()
    kept.write_text("earlier")
    assert outputs.file(kept).read_text() == "earlier"


def test_what_cannot_be_written_is_said_in_one_sentence(tmp_path: Path, blocked: Path) -> None:
    for check, path in ((outputs.folder, blocked), (outputs.file, blocked), (outputs.folder, blocked.parent)):
        with pytest.raises(SystemExit, match=f"error: results cannot be written to {path}"):
            check(path)
    with pytest.raises(SystemExit, match="it is a folder: name a file"):
        outputs.file(tmp_path)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("queue_speed", ["--out"]),
        ("fuzz", ["--report"]),
        ("chaos", ["--folder"]),
        ("training", ["--sizes", "tiny", "--out"]),
        ("finetune", ["FILE", "--out"]),
        ("optimizer", ["--json"]),
        ("optimizer", ["--plot"]),
        ("mutants", ["LIST", "--out"]),
        ("kept_caches", ["FILE", "--out"]),
        ("serving", ["--out"]),
        ("stack_27b", ["--size", "tiny", "--out"]),
    ],
)
def test_a_run_is_not_begun_whose_results_have_nowhere_to_go(
    script: str, arguments: list[str], blocked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments, str(blocked)])
    before = list(sys.path)
    try:
        main = importlib.import_module(script).main
        with pytest.raises(SystemExit, match=f"results cannot be written to {blocked}"):
            main()
    finally:
        sys.path[:] = before


def sources() -> dict[str, ast.Module]:
    return {path.stem: ast.parse(path.read_text()) for path in FOLDER.glob("*.py")}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def test_no_file_hides_a_module_of_the_standard_library() -> None:
    assert sources().keys() & sys.stdlib_module_names == set()


def test_benchmarks_import_in_one_direction() -> None:
    found = sources()
    wanted: dict[str, set[str]] = {name: {*imported(tree)} & found.keys() for name, tree in found.items()}
    while leaves := [name for name, others in wanted.items() if not others & wanted.keys()]:
        for name in leaves:
            del wanted[name]
    assert wanted == {}, "these import each other in a circle"


def test_there_is_something_to_look_at() -> None:
    found: dict[str, Any] = sources()
    assert len(found) > 15 and "rig" in set(imported(found["serving"]))
