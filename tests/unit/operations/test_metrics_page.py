"""docs/metrics.md has every metric, as it is defined."""

import subprocess
import sys
from pathlib import Path

import pytest

from worker.operations.metrics_page import table, with_table
from worker.utils.metrics import METRICS

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_the_page_has_the_table_as_it_is_defined() -> None:
    command = "python -m worker.operations.metrics_page docs/metrics.md"
    assert with_table(PAGE.read_text()) == PAGE.read_text(), f"the page is old: {command}"
    assert all(f"| `{name}` |" in PAGE.read_text() for name in METRICS)


def test_the_command_prints_it_and_writes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "worker.operations.metrics_page"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == table()
    (tmp_path / "page.md").write_text(PAGE.read_text().replace("`tandem_versions_total`", "`tandem_old_total`"))
    subprocess.run([*command, str(tmp_path / "page.md")], check=True)
    assert (tmp_path / "page.md").read_text() == PAGE.read_text()


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for the table"):
        with_table("# Metrics\n")
