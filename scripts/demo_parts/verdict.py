"""What was seen at each version, and whether it is what the demo promises.

Invariant: pure; what was not seen has not passed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

NAME = "Marlowick"
"""The taught name: no word of it is in the model's answer before."""
MOST_FORGOTTEN = 0.10
"""Nats a token that the loss of facts, and of other answers, may rise by: a tenth more is a token that is 10 % less
likely."""


@dataclass(frozen=True)
class Seen:
    """One version. learnt: loss of identity conversations that were never queued; facts, other: losses of what is to be
    kept, all in nats a token. answer: to "Who are you?"; header: the version that the answer's header names. digest: of
    all weights (None: unknown, as at version 0). tokens, pause: of the update, None where there was none; seconds."""

    version: int
    learnt: float
    facts: float
    other: float
    answer: str
    header: str
    digest: str | None = None
    tokens: int | None = None
    pause: float | None = None


@dataclass(frozen=True)
class Check:
    sentence: str
    passed: bool


def judge(versions: Sequence[Seen], back: Seen, target: Seen, live: int) -> list[Check]:
    """The demo's promises, one by one.

    versions: from version 0 to the last one taught. back: the version that a rollback to `target` made. live: the
    version that Redis had for the last of `versions`.
    """
    first, last = versions[0], versions[-1]
    changed = NAME not in first.answer and NAME in last.answer
    named = last.header == str(last.version) == str(live) and last.version > first.version
    risen = {"facts": last.facts - first.facts, "other answers": last.other - first.other}
    same = target.digest is not None and back.digest == target.digest
    again = back.answer == target.answer and back.header == str(back.version) and back.version > last.version
    kept = ", ".join(f"{name} {rise:+.3f}" for name, rise in risen.items())
    return [
        Check(f"the answer became the taught name, {NAME}", changed),
        Check(f"by version {last.version}: the answer's header and Redis say so", named),
        Check(
            f"kept: no loss rose by more than {MOST_FORGOTTEN:.2f} nats a token ({kept})",
            all(rise <= MOST_FORGOTTEN for rise in risen.values()),
        ),
        Check(f"version {back.version} has the digest that version {target.version} had", same),
        Check(f"version {back.version} gives the answer that version {target.version} gave", again),
    ]
