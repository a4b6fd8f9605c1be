"""Tables, plot and means of learning.json: how much was learnt, how much was forgotten, and both at one level; and
what is kept of the first of three tasks in turn, also by distillation (tasks_distilled.json, of feedback.py).

Must not know: models, how a run is made. What is compared, and its intervals: learning_curves.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contenders import LABELS, RULES, Setting
from learning_curves import BAND, LEVEL, REFERENCE, Curve, curves, difference, interval, mean, without_seed
from matplotlib.figure import Figure

ALLOWED = 0.006
"""By how much more than the reference's held-out loss a contender's may have risen at LEVEL, in nats."""
LEVELS = (0.78, 0.6, 0.35)
"""Other levels; at .78 AdamW at 1e-4 is after five versions."""
PEERS = ("adamw", "adamw-bf16", "lora", "sgd", "mini")
IN_TURN, DISTILLED = "learning_in_turn.json", "tasks_distilled.json"
TOP = 1.1
"""Where the plot ends, in nats: what rises further is useless, and would hide the rest."""


def write(report: dict[str, Any], folder: Path) -> None:
    """learning.md, learning_means.json, learning_in_turn.json and learning.png in `folder`."""
    found = curves(report)
    text = "\n\n".join(part for part in (levels(found), table(report, found), in_turn(report)) if part)
    (folder / "learning.md").write_text(f"# Learnt and forgotten, every setting\n\n{text}\n")
    (folder / "learning_means.json").write_text(means(report, found))
    if report["in_turn"]:
        (folder / IN_TURN).write_text(json.dumps(turns(report), indent=1) + "\n")
    print(text)
    if found:
        plot(found, folder)


def levels(found: Sequence[Curve]) -> str:
    """Every setting that gets to LEVEL, the least rise first: its rise, and by how much it is over the reference's."""
    there = [(mean(_middle(level[1]), curve.tokens["held"]), curve, level) for curve in found
             if (level := curve.at_level()) is not None]  # fmt: skip
    if not there:
        return ""
    others = " | ".join(f"KL at {level}" for level in LEVELS)
    lines = [f"Over {REFERENCE}, where identity is {LEVEL} (nats a token, ± 95 % over answers and seeds):\n",
             f"| contender | seeds | version | rise | rise over it | of each seed | within +{ALLOWED} | KL over it |"
             f" KL, mean of {BAND[0]} to {BAND[-1]} | {others} |", "|" + " --- |" * (9 + len(LEVELS))]  # fmt: skip
    reference = next((curve for curve in found if curve.name == REFERENCE), None)
    for _, curve, (version, rows) in sorted(there, key=lambda one: one[0]):
        cells = [_over(curve, reference, "kl", some) for some in ((LEVEL,), BAND, *((level,) for level in LEVELS))]
        rise = interval(rows, curve.tokens["held"])
        lines.append(f"| {curve.setting.label} | {curve.seeds} | {version:.1f} | {rise} |"
                     f" {' | '.join(_held(curve, reference))} | {' | '.join(cells)} |")  # fmt: skip
    missing = [curve.setting.label for curve in found if curve.at_level() is None]
    return "\n".join(lines) + (f"\n\nNot there with every seed: {'; '.join(missing)}." if missing else "")


def _held(curve: Curve, reference: Curve | None) -> tuple[str, str, str]:
    """At LEVEL: the rise over the reference's, the same of each seed, and whether it is surely no more than ALLOWED."""
    mine, other = curve.at_level(), reference and reference.at_level()
    if mine is None or not other or not (over := difference(mine[1], other[1])) or curve is reference:
        return "-", "-", "-"
    tokens = curve.tokens["held"]
    found = interval(over, tokens)
    sure = "yes" if found.mean + found.half <= ALLOWED else "no" if found.mean - found.half > ALLOWED else "unsure"
    each = " ".join(f"{mean(row, tokens):+.3f}" for row in over.values())
    return str(found), each, sure if len(over) > 1 else "one seed"


def _over(curve: Curve, reference: Curve | None, what: str, some: Sequence[float]) -> str:
    mine, other = curve.at_level(what, some), reference and reference.at_level(what, some)
    if mine is None or not other or not (over := difference(mine[1], other[1])) or curve is reference:
        return "-"
    return str(interval(over, curve.tokens["held"]))


def _middle(rows: dict[int, list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows.values(), strict=True)]


def table(report: dict[str, Any], found: Sequence[Curve]) -> str:
    """Every setting: scores after 5, 10 and 20 versions (all, if none of these was scored), and how far it moved."""
    if not found:
        return ""
    lines = ["| contender | seeds | version: identity / facts / rise | dW/W at 1, last | RMS(dW)/lr at 1: median, 9th"
             " decile, most |", "|" + " --- |" * 5]  # fmt: skip
    tokens = report["tokens"]
    for curve in found:
        shown = [version for version in curve.versions if version in (5, 10, 20)] or curve.versions
        scores = [f"{v}: {i:.3f} / {f:.3f} / {r}" for v in shown for i, f, r in [curve.at(v)]]
        first, last = curve.moved["1"], curve.moved[max(curve.moved, key=int)]
        gains = " ".join(f"{gain:.2f}" for gain in first["gain"])
        lines.append(f"| {curve.setting.label} | {curve.seeds} | {'; '.join(scores)} |"
                     f" {first['all']:.1e}, {last['all']:.1e} | {gains} |")  # fmt: skip
    start = [f"{name} {mean(values, tokens[name]):.3f}" for name, values in report["start"].items() if name != "kl"]
    lines.append(f"\nSource weights: {', '.join(start)}; {len(tokens['held'])} held-out questions.")
    return "\n".join(lines)


def in_turn(report: dict[str, Any]) -> str:
    """Three tasks one after the other: loss of each after each."""
    if not report["in_turn"]:
        return ""
    tokens = report["tokens"]
    names = ("identity", "places", "manner", "facts", "held")
    lines = ["| contender | after | " + " | ".join(names) + " |", "|" + " --- |" * 7]
    for key, run in report["in_turn"].items():
        for task, scored in run["after"].items():
            losses = " | ".join(f"{mean(scored[name], tokens[name]):.3f}" for name in names)
            lines.append(f"| {key} | {task} | {losses} |")
    return "\n".join(lines)


def turns(report: dict[str, Any]) -> dict[str, Any]:
    """learning_in_turn.json: of each run of three tasks the mean losses after each, in nats per trained token."""
    tokens = report["tokens"]

    def of(scored: dict[str, list[float]]) -> dict[str, float]:
        return {name: round(mean(losses, tokens[name]), 4) for name, losses in scored.items()}

    runs = report["in_turn"].items()
    made = sorted({(run["made"]["device"], run["made"]["torch"]) for _, run in runs})
    versions = sorted({run.get("versions", 10) for _, run in runs})  # older runs do not say: ten, as gpu_learning asks
    after = {key: {task: of(scored) for task, scored in run["after"].items()} for key, run in runs}
    return {"digest": report["digest"], "made": made, "versions a task": versions, "before": of(report["start"]),
            "after": after}  # fmt: skip


def means(report: dict[str, Any], found: Sequence[Curve]) -> str:
    """learning_means.json: of each run the means by version, without the answers, a line a run."""
    tokens = report["tokens"]
    made = sorted({(run["made"]["device"], run["made"]["torch"]) for run in report["runs"].values()})
    lines = [f'"digest": {json.dumps(report["digest"])}', f'"made": {json.dumps(made)}',
             '"columns": ["version", "identity", "facts", "rise of held", "KL"]']  # fmt: skip
    for curve in found:
        for seed, points in curve.by_seed.items():
            rows = [[p.version, p.identity, p.facts, mean(p.rise, tokens["held"])]
                    + ([] if p.kl is None else [mean(p.kl, tokens["held"])]) for p in points]  # fmt: skip
            short = [[round(value, 4) for value in row] for row in rows]
            lines.append(f"{json.dumps(f'{curve.name} seed={seed}')}: {json.dumps(short, separators=(',', ':'))}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def state_numbers(setting: Setting, shapes: Sequence[tuple[int, ...]]) -> int | None:
    """Numbers of optimizer state over matrices of these shapes; None where no rule says it."""
    name = "mini-plain" if setting.method == "mini" else setting.method
    if name not in RULES:
        return None
    return sum(RULES[name][1].numbers(*shape) for shape in shapes if len(shape) == 2)


def plot(found: Sequence[Curve], folder: Path) -> None:
    """learning.png. Above, left: the peers at every rate; right: each optimizer at its best, with AdamW and Mini. Below
    what `folder` has of three tasks in turn: left by optimizer, right imitated and distilled."""
    in_turn, distilled = folder / IN_TURN, folder / DISTILLED
    below = [(draw, path) for draw, path in ((_in_turn, in_turn), (_distilled, distilled)) if path.exists()]
    figure = Figure(figsize=(13, 10.5 if below else 5.5), layout="constrained")
    rows = figure.subplots(2 if below else 1, 2, squeeze=False)
    rows[0][1].sharey(rows[0][0])
    plain = [curve for curve in found if len(curve.name.split()) == 2]
    peers = [curve for curve in plain if curve.setting.method in PEERS]
    rates = sorted({curve.setting.lr for curve in peers + _best(plain)})
    lines = {lr: (":", "--", "-", "-.")[i % 4] for i, lr in enumerate(rates)}
    for axes, some, title in zip(rows[0], (peers, _best(plain)), ("peers", "each at its best rate"), strict=True):
        _learnt_and_forgotten(axes, some, lines)
        axes.set_title(f"{title} (mean over seeds)")
    rows[0][0].set_ylabel("rise of held-out loss (nats per token)")
    for axes, (draw, path) in zip(rows[-1], below, strict=False):
        draw(axes, json.loads(path.read_text()))
    for axes in rows[-1][len(below) :] if below else ():
        axes.set_axis_off()
    figure.suptitle("Above: learnt (to the right) against forgotten (up); numbers are versions")
    figure.savefig(folder / "learning.png", dpi=80)


def _learnt_and_forgotten(axes: Any, some: Sequence[Curve], lines: dict[float, str]) -> None:
    order = list(LABELS)
    for curve in sorted(some, key=lambda curve: (order.index(curve.setting.method), curve.setting.lr)):
        at = [(version, curve.at(version)) for version in curve.versions]
        points = [(version, scored[0], scored[2].mean) for version, scored in at if scored[2] is not None]
        if min(y for _, _, y in points) > TOP:
            continue
        seeds = "" if curve.seeds > 1 else " (1 seed)"
        axes.plot(
            [x for _, x, _ in points],
            [y for _, _, y in points],
            color=_colour(curve.setting.method),
            marker="o",
            markersize=3,
            linewidth=1.2,
            linestyle=lines[curve.setting.lr],
            label=curve.setting.label + seeds,
        )
        for version, x, y in points:
            if version in (5, 10, 20) and y < TOP:
                axes.annotate(str(version), (x, y), fontsize=6, xytext=(2, 3), textcoords="offset points")
    axes.axvline(LEVEL, color="grey", linewidth=0.7, linestyle=":")
    axes.set(xscale="log", xlim=(5, 0.14), ylim=(0, TOP), xlabel="identity, never trained (nats per token)")
    axes.set_xticks((4, 2, 1, 0.6, LEVEL, 0.3, 0.2), ("4", "2", "1", ".6", f"{LEVEL:g}"[1:], ".3", ".2"))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left")


def _colour(method: str) -> str:
    return {"adamw": "k", "mini": "C3"}.get(method, f"C{list(LABELS).index(method) % 10}")


def _in_turn(axes: Any, given: dict[str, Any]) -> None:
    """What is left of the first task after each of three; means over seeds, and their spread."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for key, after in given["after"].items():
        runs.setdefault(without_seed(key), []).append(after)
    tasks = list(next(iter(given["after"].values())))
    for i, (name, some) in enumerate(runs.items()):
        setting = Setting.parse(name)
        losses = [[after[task][tasks[0]] for after in some] for task in tasks]
        middle = [sum(each) / len(each) for each in losses]
        down = [m - min(each) for m, each in zip(middle, losses, strict=True)]
        up = [max(each) - m for m, each in zip(middle, losses, strict=True)]
        axes.errorbar(
            [x + 0.03 * i for x in range(len(tasks))],
            middle,
            [down, up],
            color=_colour(setting.method),
            linestyle="--" if setting.lr == 5e-5 else "-",
            marker="o",
            markersize=4,
            capsize=2,
            label=setting.label,
        )
    versions = " or ".join(map(str, given["versions a task"]))
    axes.set(ylim=(0, None), ylabel=f"{tasks[0]}, never trained (nats per token)")
    title = f"what is left of the first of three tasks, {versions} versions each"
    axes.set_title(f"{title}\n(fp32; mean, least and most of 3 seeds)")
    _after(axes, tasks)


def _distilled(axes: Any, given: dict[str, Any]) -> None:
    """All three tasks, imitated and distilled."""
    tasks = [name for name in next(iter(given["after"].values())) if name != "before"]
    steps = ["before", *tasks]
    for method, colour, name in (("imitate", "C0", "imitated"), ("distill", "C1", "distilled")):
        for task, line in zip(tasks, ("-", "--", ":"), strict=True):
            losses = [given["after"][method][step][task] for step in steps]
            axes.plot(losses, color=colour, linestyle=line, marker="o", markersize=4, label=f"{task}, {name}")
    axes.set(ylim=(0, None), ylabel="never trained (nats per token)")
    title = f"demonstrations imitated and distilled, {given['versions a task']} versions a task"
    axes.set_title(f"{title}\n(the worker's trainer, bf16, Mini's default rate, one run)")
    _after(axes, steps)


def _after(axes: Any, steps: Sequence[str]) -> None:
    axes.set_xticks(range(len(steps)), [step if step == "before" else f"after {step}" for step in steps])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _best(found: Sequence[Curve]) -> list[Curve]:
    """Of each optimizer the curve with the least rise at LEVEL; those that do not get there are left out."""
    best: dict[str, tuple[float, Curve]] = {}
    for curve in found:
        level = curve.at_level()
        if level is None:
            continue
        rise = mean(_middle(level[1]), curve.tokens["held"])
        if curve.setting.method not in best or rise < best[curve.setting.method][0]:
            best[curve.setting.method] = (rise, curve)
    return [curve for _, curve in best.values()]
