"""The page in a real Chromium: every view and action, light, dark and narrow; no fault, no other host, no barrier."""

import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import axe_core_python
import browser
import pytest
import redis
from browser import Page
from drain_parts import Weights, start
from flask import Flask
from page_parts import LINEAGE, plant, plant_hostile
from patience import until
from werkzeug.serving import make_server

from producer import Producer
from worker.testing.redis_server import RedisServer
from worker.versions import pause_switch
from worker.versions.evaluations import Score, evaluation, keep
from worker.web.app import make_app

pytestmark = pytest.mark.skipif(browser.BINARY is None, reason="no Chromium here")
AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
VIEWS = ["/learning/?x=time&n=30", "/learning/versions", "/learning/versions/44", "/learning/versions/20"]
VIEWS += [
    "/learning/evaluations",
    "/learning/jobs",
    "/learning/jobs/good",
    "/learning/jobs/unpreparable",
    "/learning/nothing",
]
VIEWS += [f"/learning/actions/{what}" for what in ("pause", "resume", "rollback/3", "rollback/progress")]
ENTER, TAB = ("Enter", 13, "\r"), ("Tab", 9)


@pytest.fixture
def connection(redis_url: str, tmp_path: Path) -> redis.Redis:
    """45 versions, one of them a rollback, three evaluated; a job that was trained, one that failed, one that waits."""
    connection = redis.Redis.from_url(redis_url)
    with Producer(redis_url) as producer:
        for text in ("good", "unpreparable"):
            producer.enqueue([{"role": "user", "content": "?"}, {"role": "assistant", "content": text}], id=text)
        start(connection, Weights(tmp_path), hooks=[], linger=0).work(burst=True)
        producer.enqueue([{"role": "user", "content": "?"}, {"role": "assistant", "content": "good"}], id="next")
    plant(connection, 45, rollback=20)
    for version in (20, 30, 45):
        scores = [Score(90.0 - version, 30, exact=version > 20, margin=version - 30.0)]
        keep(connection, evaluation("manners", version, LINEAGE, "digest", scores, "live"))
    return connection


@pytest.fixture(scope="module")
def site(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    app = make_app(redis_server.url, run_dir=tmp_path_factory.mktemp("none"), allow_actions=True)
    with serving(app) as address:
        yield address


@pytest.fixture(scope="module")
def tab(site: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for all tests: to start one takes longer than a test."""
    with browser.page(f"{site}/learning/", tmp_path_factory.mktemp("browser")) as tab:
        tab.watch()
        yield tab


class serving:
    """An application on a free port of this machine, until the end of the block."""

    def __init__(self, app: Flask) -> None:
        self._server = make_server("127.0.0.1", 0, app, threaded=True)
        self._server.daemon_threads = False  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def page(tab: Page, site: str, connection: redis.Redis) -> Iterator[Page]:
    """The overview. At the end: nothing went wrong in it, and no other host was asked."""
    tab.events.clear()
    tab.look()
    tab.go(f"{site}/learning/")
    yield tab
    expected = [f"{site}/learning/nothing"]
    assert not [fault for fault in tab.faults if not any(fault.endswith(address) for address in expected)]
    assert {urlsplit(address).netloc for address in tab.requested} == {urlsplit(site).netloc}


def barriers(page: Page) -> list[str]:
    """What axe-core finds serious or critical. It is injected: the policy lets no page load it."""
    if not page.run("typeof axe === 'object'"):
        page.run(AXE + "; true")
    found = page.run("axe.run().then((found) => found.violations)")
    return [
        f"{one['id']} ({one['impact']}): {[node['html'][:200] for node in one['nodes'][:3]]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def test_every_view_is_without_barriers_light_and_dark_and_fits_a_phone(page: Page, site: str) -> None:
    for view in VIEWS:
        page.go(site + view)
        page.run("document.querySelector('details')?.setAttribute('open', '')")  # all are alike
        for dark in (False, True):
            page.look(dark=dark)
            assert barriers(page) == [], f"{view}, {'dark' if dark else 'light'}"
        page.look(width=390, height=844)
        assert page.run("document.documentElement.scrollWidth") <= 390, view
        assert page.run("document.querySelectorAll('h1').length") == 1 and page.run("!!document.title")


def test_a_barrier_would_be_found(page: Page) -> None:
    page.run("document.querySelector('main').append(document.createElement('img'))")
    assert [found.split()[0] for found in barriers(page)] == ["image-alt"]


def test_a_person_clicks_through_views_and_back_from_rq_dashboard(page: Page, site: str) -> None:
    def follow(selector: str, leads_to: str) -> None:
        page.run("window.left = true")
        page.click(selector)
        page.loaded()
        assert page.run("location.pathname") == leads_to

    follow('.choice a[href*="x=time"]', "/learning/")
    assert page.run("document.querySelectorAll('svg.chart').length") == 6
    follow('.top nav a[href="/learning/versions"]', "/learning/versions")
    follow('a[href="/learning/versions/44"]', "/learning/versions/44")
    follow('a[rel="prev"]', "/learning/versions/43")
    follow('a[href="/learning/jobs/chat-43-0"]', "/learning/jobs/chat-43-0")
    follow('.top nav a[href="/learning/jobs"]', "/learning/jobs")
    page.write("#id", "good")
    follow("form button", "/learning/jobs/good")
    follow('a[href="/0/view/job/good"]', "/0/view/job/good")
    until(lambda: "transcript good" in page.text("#job-data"), "rq-dashboard shows the job", pace=0.1)
    follow('.tandem-back a[href="/learning/jobs/good"]', "/learning/jobs/good")
    follow(".other", "/")
    follow('.tandem-back a[href="/learning/"]', "/learning/")


def test_by_keyboard_alone_the_content_is_one_key_away_and_focus_is_seen(page: Page) -> None:
    page.key(*TAB)
    assert page.run("document.activeElement.className") == "skip"
    assert page.run("document.activeElement.getBoundingClientRect().left >= 0")
    page.key(*ENTER)
    until(lambda: page.run("document.activeElement.id") == "main", "the skip link leads to the content", pace=0.05)
    seen = []
    for _ in range(60):
        page.key(*TAB)
        focused = "document.activeElement"
        if page.run(f"{focused} === document.body"):
            break
        seen.append(page.run(f"{focused}.tagName"))
        assert page.run(f"getComputedStyle({focused}).outlineStyle") != "none", "focus is visible"
    assert "SUMMARY" in seen and seen.count("A") > 5


def test_it_refreshes_in_place_and_leaves_alone_what_is_in_use(page: Page, connection: redis.Redis) -> None:
    page.run("window.stays = true; document.querySelector('#table-loss').open = true")
    page.run("document.querySelector('#table-pause summary').focus()")
    before = page.text("#table-pause tbody th")
    plant(connection, 46)
    until(lambda: page.text(".head .big") == "46", "the new version is shown", pace=0.2)
    until(lambda: page.run("document.querySelector('#table-loss tbody th').textContent") == "46", "in tables", pace=0.2)
    assert page.run("window.stays") is True, "it was not loaded anew"
    assert page.run("document.querySelector('#table-loss').open") is True
    assert page.run("document.activeElement.closest('details').id") == "table-pause"
    assert page.text("#table-pause tbody th") == before


def test_the_nearest_value_is_told_at_the_pointer(page: Page) -> None:
    page.run("document.querySelector('#chart-speed').scrollIntoView()")
    place = page.run("(({x, y}) => ({x, y}))(document.querySelector('#chart-speed .point').getBoundingClientRect())")
    page.ask("Input.dispatchMouseEvent", type="mouseMoved", x=place["x"] + 3, y=place["y"] + 3)
    until(lambda: page.text("#readout").startswith("version "), "the value is shown", pace=0.05)
    page.ask("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    until(lambda: page.run("document.getElementById('readout') === null"), "and goes away", pace=0.05)


def test_actions_ask_act_and_tell(page: Page, site: str, connection: redis.Redis) -> None:
    def press(selector: str) -> None:
        page.run("window.left = true")
        page.click(selector)
        page.loaded()

    press('a[href="/learning/actions/pause"]')
    page.write("#reason", "a look at <b>it</b>")
    press("form.confirm button")
    assert pause_switch.pause_reason(connection) == "a look at <b>it</b>"
    assert "Training is paused." in page.text(".note") and "a look at <b>it</b>" in page.text("#wrong")
    press('a[href="/learning/actions/resume"]')
    press("form.confirm button")
    assert pause_switch.pause_reason(connection) is None and page.text(".note") == "Training goes on."
    page.go(f"{site}/learning/jobs/unpreparable")
    press('a[href="/learning/actions/requeue/unpreparable"]')
    press("form.confirm button")
    assert connection.lrange("rq:queue:feedback", 0, -1) == [b"next", b"unpreparable"]
    page.go(f"{site}/learning/versions")
    page.write("#version", "3")
    press("form.line button")
    assert "cannot be done from this page now" in page.text("main") and "tandem rollback 3" in page.text("pre.command")


def test_hostile_values_run_nothing(page: Page, site: str, connection: redis.Redis) -> None:
    connection.flushdb()
    last = plant_hostile(connection)
    numbers = [f"/learning/versions/{number}" for number in range(1, last - 2)]
    for view in ["/learning/", "/learning/?x=time", "/learning/versions", *numbers]:
        page.go(site + view)
        assert page.run("document.querySelectorAll('main h1').length") == 1, f"{view} is no view"
        assert page.run("document.querySelectorAll('main script, main img, main [style]').length") == 0
        assert page.run("document.documentElement.scrollWidth") <= 1280, view
