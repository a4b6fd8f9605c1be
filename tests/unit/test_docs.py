"""The pages: they build without a warning, name every command, flag and key, and nothing that is not there, and need no
other host."""

import ast
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest

from producer import keys
from worker.cli.main import COMMANDS, tandem

ROOT = Path(__file__).parents[2]
ASSETS = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", ".", str(folder / "html")]
    done = subprocess.run([*command, "-d", str(folder / "trees")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]  # a link that leads nowhere, a page that is in no list
    return folder / "html"


class Assets(HTMLParser):
    """What a page loads by itself."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name == ASSETS.get(tag) and value]


def test_the_site_loads_nothing_from_another_host(site: Path) -> None:
    found = [asset for page in site.rglob("*.html") for asset in Assets(page).found]
    assert found and not [asset for asset in found if re.match(r"(https?:)?//", asset)]


def test_every_command_and_flag_is_on_the_site(site: Path) -> None:
    page = (site / "docs" / "commands.html").read_text()
    context = click.Context(tandem)
    missing = []
    for name in COMMANDS:
        command = tandem.get_command(context, name)
        assert command is not None
        flags = [
            flag for one in command.params if isinstance(one, click.Option) and not one.hidden for flag in one.opts
        ]
        anchors = [f'id="tandem-{name}"', *(f'id="cmdoption-tandem-{name}-{flag.lstrip("-")}"' for flag in flags)]
        missing += [anchor for anchor in anchors if anchor not in page]
    assert not missing


def test_every_key_of_redis_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "redis.md").read_text()
    patterns = re.findall(r"`([a-z:*-]+)(?:<[a-z]+>)?`", page)
    found = {name: value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str)}
    names = [value for value in found.values() if ":" in value]
    assert "weights:ledger" in names
    assert not [one for one in names if not any(re.fullmatch(p.replace("*", ".*"), one) for p in patterns)]


def members(classes: dict[str, ast.ClassDef], name: str) -> set[str]:
    """Methods and attributes of a class and of those it is made of."""
    one = classes.get(name)
    if one is None:
        return set()
    own = {node.name for node in ast.walk(one) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    own |= {node.attr for node in ast.walk(one) if isinstance(node, ast.Attribute)}
    own |= {
        node.target.id for node in one.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return own.union(*(members(classes, base.id) for base in one.bases if isinstance(base, ast.Name)))


def test_what_the_pages_name_is_there() -> None:
    """Paths, files, and methods of our classes; a module may be named by its room and without its ending."""
    places = [path for path in ROOT.iterdir() if not path.name.startswith(".") and path.name != "build"]
    files = [path for place in places for path in (place, *place.rglob("*"))]
    ours = [path for room in ("worker", "producer") for path in (ROOT / room).rglob("*.py")]
    nodes = [node for path in ours for node in ast.parse(path.read_text()).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    names = [f"/{path.relative_to(ROOT)}" for path in files]
    wrong = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        paths = re.findall(r"(?<![\w/.-])((?:worker|producer|tests|benchmarks|scripts|docs)/[\w./-]*\w)", text)
        paths += re.findall(r"`([\w/-]+\.(?:py|toml|md|html|yml))`", text)
        rooms = "|".join(path.name for path in (ROOT / "worker").iterdir() if path.is_dir())
        paths += re.findall(rf"`((?:{rooms})/[a-z_/]+)", text)
        wrong += [path for path in paths if not any(name.endswith((f"/{path}", f"/{path}.py")) for name in names)]
        wrong += [
            f"{name}.{member}"
            for name, member in re.findall(r"`([A-Z]\w+)\.([a-z_]\w*)", text)
            if name in classes and member not in members(classes, name)
        ]
    assert not wrong
