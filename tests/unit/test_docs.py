"""The pages of docs/: they build without a warning, name every command, flag and key, and need no other host."""

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
