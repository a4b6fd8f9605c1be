"""Named points at which a test can kill this process, to prove what a crash there leaves behind.

`TANDEM_FAULT=NAME` (or `NAME:K` for the K-th pass) makes `point(NAME)` a kill -9 of ourselves. Unset, as in
production, `point` is one dictionary look-up.
"""

import os
import signal

POINTS = ("backward", "paused", "applying", "applied", "resumed", "committed")
"""In the order in which an update passes them: gradients half computed; server paused, header still CLEAN; header
APPLYING, before the first write; header CLEAN with the new version, server still paused; server running, Redis not yet
told; Redis told."""

_armed: dict[str, int] = {}


def _arm() -> None:
    if setting := os.environ.get("TANDEM_FAULT"):
        name, _, count = setting.partition(":")
        if name not in POINTS:
            raise ValueError(f"TANDEM_FAULT={setting}: unknown point, choose one of {', '.join(POINTS)}")
        _armed[name] = int(count or 1)


def point(name: str) -> None:
    """Die here with SIGKILL when the environment asks for it."""
    if name in _armed:
        _armed[name] -= 1
        if _armed[name] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


_arm()
