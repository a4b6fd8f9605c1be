"""A headless Chromium, driven over its own protocol: a page is opened, and scripts run in it."""

import base64
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

from worker.utils.child_process import die_with_parent

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._last = 0
        self.events: list[dict[str, Any]] = []
        """What the browser told of itself, if `watch` asked for it."""

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command of the protocol; events that come before it are kept."""
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": params}))
        while (said := json.loads(self._socket.recv())).get("id") != self._last:
            self.events.append(said)
        assert "error" not in said, (method, said)
        found: dict[str, Any] = said["result"]
        return found

    def run(self, script: str) -> Any:
        """The value of a script; an error with what the page said if it throws."""
        said = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def watch(self) -> None:
        """From now on what goes wrong, and which addresses are asked for, is told: `faults`, `requested`."""
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")

    @property
    def faults(self) -> list[str]:
        """Errors of scripts, of the console, and of loading, as the browser tells them."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(str(params["args"]))
            if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(f"{params['entry']['text']} {params['entry'].get('url')}")
        return found

    @property
    def requested(self) -> set[str]:
        """Every address that was asked for; pictures that are in their own address are not."""
        told = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return {address for address in told if not address.startswith("data:")}

    def go(self, address: str) -> None:
        """Open `address`, and wait for it. A page that is left says so by a mark of its own."""
        self.run("window.left = true")
        self.ask("Page.navigate", url=address)
        self.loaded()

    def loaded(self) -> None:
        """Once another document than the one that `window.left` marks is complete."""

        def there() -> bool:
            try:
                return bool(self.run("window.left !== true && document.readyState === 'complete'"))
            except AssertionError:  # between two documents
                return False

        until(there, "the page did not load", pace=0.05)

    def look(self, *, dark: bool = False, width: int = 1280, height: int = 800) -> None:
        """As a screen of that width would show it, to a reader who likes it dark or light."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.ask("Emulation.setDeviceMetricsOverride", **phone)

    def picture(self, *, whole: bool = True) -> bytes:
        """A PNG of the whole page, or of what a screen shows of it."""
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def key(self, name: str, code: int, text: str = "") -> None:
        """Press a key, as a person would: Tab is 9, Enter is 13 and writes a carriage return."""
        more = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        self.ask("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **more)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **more)

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
