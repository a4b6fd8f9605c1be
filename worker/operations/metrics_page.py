"""The table of docs/metrics.md, from the definitions.

    python -m worker.operations.metrics_page                     prints it
    python -m worker.operations.metrics_page docs/metrics.md     writes it into the page, between its two marks

Must not know: torch, vLLM, Redis.
"""

import sys
from pathlib import Path

from worker.utils.metrics import GROUPS, Metric

BEGIN, END = (
    "<!-- The table: python -m worker.operations.metrics_page docs/metrics.md -->\n",
    "<!-- end of the table -->\n",
)


def table() -> str:
    """Markdown: a heading and a table for each group."""
    parts = []
    for title, group in GROUPS.items():
        rows = "".join(_row(metric) for metric in group)
        parts.append(
            f"## {title}\n\n| metric | type | unit | port | what it says |\n| --- | --- | --- | --- | --- |\n{rows}"
        )
    return "\n".join(parts)


def _row(metric: Metric) -> str:
    labels = ", ".join(
        f"`{label}`: {', '.join(values)}" if values else f"`{label}`" for label, values in metric.labels.items()
    )
    said = metric.help + (f" Label {labels}." if labels else "")
    return f"| `{metric.name}` | {metric.kind} | {metric.unit or '-'} | {', '.join(metric.ports)} | {said} |\n"


def with_table(page: str) -> str:
    """`page` with the table between its marks. ValueError where it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no place for the table: put {BEGIN!r} and {END!r} into it")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(table(), end="")
    for name in sys.argv[1:]:
        Path(name).write_text(with_table(Path(name).read_text()))
