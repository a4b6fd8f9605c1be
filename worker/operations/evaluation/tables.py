"""Evaluations and comparisons as text for people and as plain data for programs.

Must not know: torch.
Invariants: no text of a conversation is in either: conversations are named by line and id.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from worker.operations.evaluation.cases import Case
from worker.operations.evaluation.comparison import Comparison, Difference
from worker.versions.evaluations import Evaluation, Score

SHOWN = 40
"""Conversations that are listed; of larger sets, those with the highest loss, or that changed most."""
PAIRS = "pairs whose chosen answer is likelier than the rejected one, by log-probability a token"


def evaluation_lines(found: Evaluation, source: str = "") -> Iterator[str]:
    """What was found at one version. source: where it comes from, if it was not measured now."""
    yield f"{found.name} at version {found.version} ({source or found.where}, lineage {found.lineage[:8]}):"
    yield f"  {found.conversations:,} conversations, {found.tokens:,} trained tokens, digest {found.digest}"
    yield f"  loss         {found.loss:.4f} nats a token"
    if found.exact_match is not None:
        yield f"  exact match  {_percent(found.exact_match)} ({found.exact:,} of {found.asked:,} greedy answers)"
    if found.win_rate is not None:
        yield f"  win rate     {_percent(found.win_rate)} ({found.won:,} of {found.pairs:,} {PAIRS})"


def score_lines(cases: Sequence[Case], scores: Sequence[Score], versions: Sequence[int]) -> Iterator[str]:
    """One line a conversation. versions: of each, shown where they are not all the same."""
    several = len(set(versions)) > 1
    order = sorted(range(len(cases)), key=lambda i: -scores[i].loss)[:SHOWN]
    if len(cases) > SHOWN:
        yield f"  of these the {SHOWN} with the highest loss:"
    for i in sorted(order):
        case, score = cases[i], scores[i]
        parts = [f"  line {case.line:<5} {case.id[:40]:<24} loss {score.loss:.4f}"]
        if score.exact is not None:
            parts.append("exact" if score.exact else "other answer")
        if score.margin is not None:
            parts.append(f"chosen {'wins' if score.won else 'loses'} by {abs(score.margin):.3f}")
        if several:
            parts.append(f"at version {versions[i]}")
        yield "  ".join(parts)


def score_plain(case: Case, score: Score, version: int) -> dict[str, Any]:
    """One conversation, for JSON."""
    plain = {"line": case.line, "id": case.id, "version": version, "tokens": score.tokens, "loss": score.loss}
    return plain | {"exact": score.exact, "margin": score.margin, "won": score.won}


def comparison_lines(a: Evaluation, b: Evaluation, found: Comparison) -> Iterator[str]:
    """Before and after, as a table."""
    yield f"{a.name}: {a.conversations:,} conversations, digest {a.digest}"
    first, second = f"version {a.version} ({a.where})", f"version {b.version} ({b.where})"
    yield f"  {'':12} {first:>20} {second:>20} {'change':>10}   95 % interval"
    rows = [("loss", found.loss, False), ("exact match", found.exact, True), ("win rate", found.won, True)]
    for name, difference, is_rate in rows:
        if difference is not None:
            yield f"  {name:12} {_row(difference, is_rate)}"
    same = a.conversations - found.better - found.worse
    yield f"  the loss fell in {found.better:,} conversations, rose in {found.worse:,}, and stayed in {same:,}"
    if a.where != b.where:
        yield "  one was computed on a CPU, the other is the server's: that alone makes a few thousandths of difference"


def comparison_plain(a: Evaluation, b: Evaluation, found: Comparison) -> dict[str, Any]:
    """The same for JSON."""
    rows = {"loss": found.loss, "exact_match": found.exact, "win_rate": found.won}
    return {
        "set": a.name,
        "digest": a.digest,
        "before": a.plain(),
        "after": b.plain(),
        "difference": {name: _plain(one) for name, one in rows.items()},
        "better": found.better,
        "worse": found.worse,
    }


def history_lines(found: Sequence[Evaluation], digest: str) -> Iterator[str]:
    """All stored evaluations of a set, the earliest version first; digest: of the file as it is."""
    for one in found:
        parts = [f"  version {one.version:<6} {one.at[:19]}  {one.where:<8} loss {one.loss:.4f}"]
        if one.exact_match is not None:
            parts.append(f"exact {_percent(one.exact_match)}")
        if one.win_rate is not None:
            parts.append(f"wins {_percent(one.win_rate)}")
        if one.digest != digest:
            parts.append(f"of other content (digest {one.digest})")
        yield "  ".join(parts)


def _row(one: Difference, is_rate: bool) -> str:
    if is_rate:
        span = "" if one.low is None or one.high is None else f"{100 * one.low:+.1f} to {100 * one.high:+.1f}"
        return f"{_percent(one.before):>20} {_percent(one.after):>20} {100 * one.change:>+10.1f}   {span or '-'}"
    span = "" if one.low is None or one.high is None else f"{one.low:+.4f} to {one.high:+.4f}"
    return f"{one.before:>20.4f} {one.after:>20.4f} {one.change:>+10.4f}   {span or '-'}"


def _plain(one: Difference | None) -> dict[str, Any] | None:
    if one is None:
        return None
    interval = None if one.low is None else [one.low, one.high]
    return {"before": one.before, "after": one.after, "change": one.change, "interval": interval, "count": one.count}


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"
