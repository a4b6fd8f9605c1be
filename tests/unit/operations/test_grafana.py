"""The dashboard: as its script makes it, known to Grafana field by field, and every query of it parses."""

import importlib
import json
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import grafana_dashboard
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from metrics_parts import PROMTOOL, ROOT, dashboard_queries, unknown_metrics
from pydantic import ConfigDict, TypeAdapter

PAGE = ROOT / "docs" / "grafana" / "tandem.json"


def test_the_file_is_what_the_script_writes(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "grafana_dashboard.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "made.json")], check=True)
    assert (tmp_path / "made.json").read_text() == PAGE.read_text(), (
        "python scripts/grafana_dashboard.py docs/grafana/tandem.json"
    )


def checked(found: Any) -> None:
    """Every field of `found`, a model of Grafana's, has a value of the type that Grafana's schema names for it."""
    kind = type(found)
    if not kind.__module__.startswith("grafana_foundation_sdk.models") or not hasattr(found, "__dict__"):
        return
    module = sys.modules[kind.__module__]
    for name, hint in typing.get_type_hints(kind, vars(module)).items():
        value = getattr(found, name)
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=False)
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            checked(inner)


def as_grafana_reads_it(page: dict[str, Any]) -> Any:
    """`page` through the models that Grafana Labs generate from Grafana's schema. ImportError for a panel that it does
    not know; ValueError and the like for a field of a wrong type."""
    register_default_plugins()
    for panel in page["panels"]:
        if panel["type"] != "row":
            importlib.import_module(f"grafana_foundation_sdk.models.{panel['type']}")
    read = Dashboard.from_json(page)
    checked(read)
    return read


def lost(page: Any, read: Any, at: str = "") -> list[str]:
    """Fields of `page` that are not in `read` as they are."""
    if isinstance(page, dict):
        return [
            one
            for name in page
            for one in (lost(page[name], read[name], f"{at}/{name}") if name in read else [f"{at}/{name}"])
        ]
    if isinstance(page, list):
        return [one for index, (a, b) in enumerate(zip(page, read, strict=True)) for one in lost(a, b, f"{at}/{index}")]
    return [] if page == read else [at]


def test_grafanas_schema_knows_every_field_and_its_type() -> None:
    page = json.loads(PAGE.read_text())
    read = as_grafana_reads_it(page)
    assert not lost(page, json.loads(json.dumps(read, cls=JSONEncoder)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("grafPos", {}), ("title", 7), ("datasource", "x"), ("type", "timeserie"), ("targets", [{"expression": "1"}])],
)
def test_the_check_finds_what_grafana_does_not_know(field: str, value: Any) -> None:
    page = json.loads(PAGE.read_text())
    page["panels"][8][field] = value
    try:
        read = as_grafana_reads_it(page)
    except (ImportError, ValueError, TypeError, AttributeError):
        return
    assert lost(page, json.loads(json.dumps(read, cls=JSONEncoder)))


def test_panels_have_places_names_and_words_of_their_own() -> None:
    page = json.loads(PAGE.read_text())
    panels = [panel for panel in page["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in page["panels"]}) == len(page["panels"])
    assert len({panel["title"] for panel in panels}) == len(panels) and all(panel["description"] for panel in panels)
    taken: set[tuple[int, int]] = set()
    for panel in page["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= grafana_dashboard.WIDTH, panel["title"]
        taken |= cells


def test_queries_name_only_metrics_that_exist() -> None:
    queries = dashboard_queries()
    assert len(queries) > 40 and not [query for query in queries if unknown_metrics(query)]
    assert all(
        "deployment=~" in query for query in json.dumps(json.loads(PAGE.read_text())["panels"]).split('"expr": ')[1:]
    )


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool here")
def test_every_query_parses(tmp_path: Path) -> None:
    rules = [{"record": f"tandem:query_{number}", "expr": query} for number, query in enumerate(dashboard_queries())]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run(
        [str(PROMTOOL), "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
