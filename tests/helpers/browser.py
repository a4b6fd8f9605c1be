"""A headless Chromium, driven over its own protocol: a page is opened, and scripts run in it."""

import contextlib
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patience import until
from websockets.sync.client import ClientConnection, connect

from worker.testing.child_process import die_with_parent

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._last = 0

    def run(self, script: str) -> Any:
        """The value of a script; an error with what the page said if it throws."""
        self._last += 1
        asked = {"expression": script, "awaitPromise": True, "returnByValue": True}
        self._socket.send(json.dumps({"id": self._last, "method": "Runtime.evaluate", "params": asked}))
        while (said := json.loads(self._socket.recv())).get("id") != self._last:
            pass
        assert "exceptionDetails" not in said["result"], said["result"]
        return said["result"]["result"].get("value")

    def text(self, selector: str) -> str:
        """Of the last element that fits; "" where there is none."""
        return str(self.run(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)?.textContent ?? ''"))

    def click(self, selector: str) -> None:
        """On the last element that fits, once there is one."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)"
        until(lambda: self.run(f"{found} !== undefined"), f"the page shows no {selector}", pace=0.1)
        self.run(f"{found}.click()")

    def write(self, selector: str, text: str) -> None:
        self.run(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1).value = {json.dumps(text)}")


@contextlib.contextmanager
def page(address: str, folder: Path) -> Iterator[Page]:
    """A new browser that shows `address`. folder: for its profile."""
    assert BINARY is not None
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [BINARY, *QUIET, f"--user-data-dir={folder}", "--remote-debugging-port=0", address],
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,
        )
    try:
        port = folder / "DevToolsActivePort"
        until(lambda: port.exists() and port.read_text().count("\n"), "Chromium opened no port", pace=0.1)
        host = f"http://127.0.0.1:{port.read_text().splitlines()[0]}"

        def tabs() -> list[Any]:
            with urllib.request.urlopen(host + "/json/list") as reply:
                return [tab for tab in json.load(reply) if tab["type"] == "page" and tab["url"].startswith("http")]

        until(tabs, "Chromium shows no page", pace=0.1)
        with connect(tabs()[0]["webSocketDebuggerUrl"], max_size=None) as socket:
            tab = Page(socket)
            loaded = "location.href.startsWith('http') && document.readyState === 'complete'"
            until(lambda: tab.run(loaded), "the page did not load", pace=0.1)
            yield tab
    finally:
        process.terminate()
        process.wait()
