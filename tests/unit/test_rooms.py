"""The rooms hold: contracts fail on a planted violation, and what a docstring says a module must not know, it cannot
reach.

`lint-imports` itself runs in scripts/test.
"""

import ast
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
MEANS = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "vLLM": ("vllm",),
    "Redis": ("redis",),
    "RQ": ("rq",),
    "the optimizer": ("worker.apollo",),
    "the model": ("worker.model",),
    "examples": ("worker.data",),
    "the trainer": ("worker.trainer",),
    "the server": ("worker.serving",),
    "the header": ("worker.shared_weights.header",),
    "shared weights": ("worker.shared_weights",),
    "checkpoints": ("worker.checkpoint",),
    "versions": ("worker.versions",),
    "the consumer": ("worker.consumer",),
    "the worker": ("worker",),
    "sockets": ("worker.utils.unix_socket",),
}
"""What a word after "Must not know:" stands for: modules that no chain of imports may lead to."""


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("producer", "worker", include_external_packages=True, cache_dir=None)


def claims() -> list[tuple[str, str]]:
    """(module, word) for each word after "Must not know:" in a module's docstring."""
    found = []
    for path in sorted([*ROOT.glob("producer/**/*.py"), *ROOT.glob("worker/**/*.py")]):
        text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for sentence in re.findall(r"[Mm]ust not (?:know|import)\b:? ([^.]*)\.", text):
            found += [(module, word) for word in re.split(r", (?:or |and )?| or | and ", sentence)]
    return found


@pytest.mark.parametrize(("module", "word"), claims())
def test_what_a_docstring_says_a_module_must_not_know_it_cannot_reach(module: str, word: str) -> None:
    assert word in MEANS, f"{module}: {word!r} is nothing that can be checked; say it otherwise, or add it to MEANS"
    for target in MEANS[word]:
        if target in graph().modules:
            assert not graph().chain_exists(importer=module, imported=target, as_packages=True), (
                graph().find_shortest_chain(importer=module, imported=target, as_packages=True)
            )


def test_a_climbing_import_breaks_the_contracts(tmp_path: Path) -> None:
    for name in ("producer", "worker"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    signals = tmp_path / "worker" / "utils" / "signals.py"
    signals.write_text(signals.read_text() + "\n\nfrom worker.checkpoint import journal  # noqa\n")
    lint = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-cache",
    ]
    result = subprocess.run(lint, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1, result.stdout + result.stderr
    assert "worker.utils is not allowed to import worker.checkpoint" in result.stdout
