"""Breaks the code on purpose, one line at a time, and asks the tests whether they notice.

    python benchmarks/mutants.py tests/mutants/*.toml [--only TEXT] [--out report.json]

A list file names mutants:

    [[mutant]]
    name = "lease: never expires"                 # what breaks, in a few words
    file = "worker/serving/vllm/lease.py"
    old = "if now < self.expires:"                # must occur exactly once in the file
    new = "if True:"
    tests = ["tests/unit/serving/test_lease.py"]  # what must fail: files, or pytest's node ids
    equivalent = "..."                            # optional: why no test can see this one; it is not run

Each mutant is made in a copy of the tree, so that the tree itself never changes. A mutant is killed when a test fails
or does not end in time. Before any mutant counts, its tests must pass on the unbroken copy. The exit code is 1 when one
survives, and 2 when a list does not fit the code any more.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import outputs

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("producer", "worker", "tests", "benchmarks", "scripts", "docs", "pyproject.toml", "README.md")
TIMEOUT = 300.0
"""Seconds for the tests of one mutant: one that hangs is as dead as one that fails."""
FAILED, NO_TESTS = 1, 5
"""pytest's exit codes. 2 is an error while the tests were collected, which a mutant may cause."""


class MutantError(Exception):
    """A list is not one, or does not fit the code."""


@dataclass(frozen=True)
class Mutant:
    """One change: in `file`, `old` becomes `new`; `tests` should fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def apply(self, root: Path) -> str:
        """Write the change into `root`; the text that was there. MutantError unless `old` occurs exactly once."""
        path = root / self.file
        if not path.is_file():
            raise MutantError(f"{self.name}: there is no file {self.file}")
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise MutantError(f"{self.name}: {self.file} has {self.old!r} {count} times, not once")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return text


@dataclass(frozen=True)
class Outcome:
    """What the tests said of one mutant: killed, survived, or equivalent (not run)."""

    name: str
    file: str
    result: str
    seconds: float


def read_list(path: Path) -> list[Mutant]:
    """The mutants in a list file; MutantError naming the entry that is not one."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise MutantError(f"{path}: not a list of mutants ({error!r})") from None
    found = []
    for number, entry in enumerate(entries, start=1):
        try:
            found.append(Mutant(**{**entry, "tests": tuple(entry["tests"])}))
        except (TypeError, KeyError) as error:
            raise MutantError(f"{path}: mutant {number} ({entry.get('name', 'no name')}): {error}") from None
    return found


def copy_tree(root: Path, target: Path) -> None:
    """The parts of `root` that the tests need, as files of their own."""
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        elif source.exists():
            shutil.copy2(source, target / name)


def run_tests(root: Path, tests: Sequence[str], timeout: float) -> int | None:
    """pytest's exit code for `tests` of the tree in `root`; None when they did not end in time."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "-m", "", *tests]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        try:
            os.killpg(process.pid, 9)  # also what the tests started and did not end
        except ProcessLookupError:
            pass
        process.wait()


def judge(mutant: Mutant, root: Path, timeout: float) -> Outcome:
    """Break the copy in `root`, run the mutant's tests, put the copy right again."""
    started = time.monotonic()
    before = mutant.apply(root)
    if mutant.equivalent:
        code: int | None = -1
    else:
        code = run_tests(root, mutant.tests, timeout)
    (root / mutant.file).write_text(before, encoding="utf-8")
    results = {-1: "equivalent", None: "killed (did not end)", 0: "SURVIVED", FAILED: "killed"}
    return Outcome(mutant.name, mutant.file, results.get(code, "killed (error)"), time.monotonic() - started)


def check_unbroken(mutants: Sequence[Mutant], root: Path, timeout: float) -> None:
    """MutantError unless the tests pass where nothing is broken: else nothing that fails would mean anything."""
    tests = list(dict.fromkeys(test for mutant in mutants if not mutant.equivalent for test in mutant.tests))
    if tests and (code := run_tests(root, tests, timeout * len(tests))) != 0:
        what = {None: "do not end", NO_TESTS: "do not exist"}.get(code, "fail")
        raise MutantError(f"the tests {what} without any mutant: {' '.join(tests)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the lists; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="+", type=Path, help="list files (TOML)")
    parser.add_argument("--only", default="", help="only mutants whose name or file contains this text")
    parser.add_argument("--check", action="store_true", help="only check that every mutant fits the code; no tests run")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds a mutant; default: %(default)g")
    parser.add_argument("--out", type=Path, help="write the outcomes to this file, as JSON")
    options = parser.parse_args(arguments)
    if options.out is not None:
        outputs.file(options.out)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder)
        copy_tree(ROOT, root)
        try:
            mutants = [mutant for path in options.lists for mutant in read_list(path)]
            mutants = [m for m in mutants if options.only in m.name or options.only in m.file]
            for mutant in mutants:
                (root / mutant.file).write_text(mutant.apply(root), encoding="utf-8")
            if options.check:
                print(f"{len(mutants)} mutants fit the code")
                return 0
            check_unbroken(mutants, root, options.timeout)
        except MutantError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        outcomes = []
        for mutant in mutants:
            outcomes.append(judge(mutant, root, options.timeout))
            print(f"{outcomes[-1].result:>20}  {outcomes[-1].seconds:5.1f} s  {mutant.name}", flush=True)
    survivors = [outcome for outcome in outcomes if outcome.result == "SURVIVED"]
    print(f"{len(outcomes)} mutants, {len(survivors)} survived")
    if options.out is not None:
        options.out.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
