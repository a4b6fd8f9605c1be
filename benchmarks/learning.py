"""What a real model learns, and what it forgets meanwhile: APOLLO-Mini, its peers and its possible cures.

Every contender starts from the same weights and is given the same conversations in the same order, twenty a version, in
fp32, one optimizer step a version. At some versions it is scored, in nats per trained token, on conversations that it
never trained: the same subject in other words (learnt), facts, the source model's own answers to other questions
(held), and answers by hand to the same (written). A rise is the loss over that of the source weights, answer by answer.
KL is what the rise of held estimates, over all tokens that might come next in place of the one that was drawn.

    python benchmarks/learning.py MODEL --list
    python benchmarks/learning.py MODEL --device cuda                        # the whole grid
    python benchmarks/learning.py MODEL --setting 'mini lr=2e-05' --only 'adamw lr=*' --seeds 0 --versions 3 5 8
    python benchmarks/learning.py MODEL --seeds 0 --versions 20 --until .45  # the least that compares at one level
    python benchmarks/learning.py MODEL --in-turn --only 'adamw lr=0.0001'   # three tasks one after the other
    python benchmarks/learning.py MODEL --report                             # tables, means and plot of what is there

MODEL is a directory of an instruct model of attention layers alone, such as SmolLM2-135M-Instruct. Every finished run
is kept in learning.json and not made again, so that a grid can be stopped and continued; several processes may work at
one (--share). LoRA needs `pip install -e '.[bench]'`. Losses repeat exactly on a CPU with as many threads. TF32 is off.
"""

import argparse
import copy
import fcntl
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

import contenders
import learning_curves
import learning_report
import learning_tasks
import outputs
import own_answers
import torch
from contenders import Setting
from shared_prefix import Asked, backward

from worker.cli.train import epochs
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example
from worker.trainer.factory import make_builder
from worker.utils import torch_setup

RATES = {
    "adamw": (3e-5, 5e-5, 1e-4), "adamw-bf16": (3e-5, 5e-5, 1e-4), "lora": (3e-4, 1e-3, 2e-3),
    "sgd": (3e-3, 1e-2, 3e-2), "mini": (1e-5, 3e-5, 1e-4), "mini-plain": (3e-5,),
}  # fmt: skip
"""Three learning rates for each contender; for those that are not named, OTHERS: AdamW's own, as steps are as long."""
OTHERS = (3e-5, 5e-5, 1e-4)
SCORED = ("identity", "facts", "held", "written")
VARIANTS = (
    {"freeze": "embeddings"}, {"freeze": "attention"}, {"freeze": "mlp"}, {"warmup": 5}, {"pull": 0.02}, {"pull": 0.1},
    {"rehearse": 5}, {"rehearse": 10}, {"batch": 40}, {"batch": 80},
)  # fmt: skip
"""What is tried with Mini at 3e-5 besides."""


def grid() -> list[Setting]:
    """Every contender at every rate, seed 0."""
    names = [*contenders.LABELS]
    names.sort(key=lambda name: name not in RATES)
    plain = [Setting(name, lr) for name in names for lr in RATES.get(name, OTHERS)]
    return plain + [replace(Setting("mini", 3e-5), **variant) for variant in VARIANTS]


class Bench:
    """One model, one set of conversations, one file of results, which other processes may add to meanwhile."""

    def __init__(
        self, model: Path, data: learning_tasks.Data, device: torch.device, results: Path, answer_tokens: int
    ) -> None:
        self.folder, self.data, self.device, self.results = model, data, device, results
        self.answer_tokens, self.model = answer_tokens, contenders.load_model(model, device)
        self.sources = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        with self._mine() as report:
            if not report:
                own = own_answers.draw(self.model, data.held, answer_tokens)
                report |= {"digest": data.digest, "own": own, "runs": {}, "in_turn": {}}
            if report["digest"] != data.digest or len(report["own"]) != len(data.held):
                raise SystemExit(f"error: {results} was made with other conversations: name another folder with --out")
            self.held = [own_answers.answered(*pair) for pair in zip(data.held, report["own"], strict=True)]
            sets = self._sets()
            self.asked = {name: Asked(examples, device, self.model if name == "held" else None)
                          for name, examples in sets.items()}  # fmt: skip
            report["tokens"] = {name: [e.trained_tokens for e in examples] for name, examples in sets.items()}
            report["tokens"]["kl"] = report["tokens"]["held"]
            start = report.setdefault("start", {})
            if missing := [name for name in sets if name not in start or "kl" not in start]:
                start |= self._score(self.model, missing)

    @contextmanager
    def _mine(self) -> Iterator[dict[str, Any]]:
        """The results, as all processes have left them, to be changed: written when the block ends, whole or not."""
        with self.results.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel's: a killed process leaves none
            report = json.loads(self.results.read_text()) if self.results.exists() else {}
            yield report
            written = self.results.with_suffix(".new")
            written.write_text(json.dumps(report))
            written.replace(self.results)
            self.report = report

    def _sets(self) -> dict[str, list[Example]]:
        """All that is scored, by its name."""
        others = {"facts": self.data.facts, "held": self.held, "written": self.data.held}
        return {task.name: task.unseen for task in self.data.tasks} | others

    def check(self, settings: Sequence[Setting]) -> None:
        """Ends the script if one asks for more than there is."""
        there = len(self.data.pool)
        if over := next((one for one in settings if one.rehearse > there), None):
            raise SystemExit(f"error: {_name(over)}: only {there} other answers are not held out: see --held")

    def run(self, setting: Setting, versions: Sequence[int], until: float | None) -> None:
        """One contender up to the last of `versions`, or until its loss is no number, scored at each; kept when done.

        until: end at the first version at which identity is below this, and score that one and the one before.
        """
        started = time.perf_counter()
        model = copy.deepcopy(self.model)
        contender, rate = contenders.make(setting, model, self.sources), contenders.rate(setting)
        kept: dict[str, Any] = {"setting": asdict(setting), "versions": {}, "moved": {}}
        for version, batch in enumerate(islice(self._batches(setting, self.data.tasks[0]), versions[-1]), start=1):
            before = _trained(model) if until is not None else []
            loss = backward(model, batch, self.device)
            if not math.isfinite(loss):  # nothing after this can be scored
                kept["diverged"] = version
                break
            contender.step(rate(version))
            below = until is not None and loss < 2 * until and self._learnt(model) < until
            if version in (1, versions[-1]) or below:
                changes = contenders.changes(model, self.sources)
                kept["moved"][str(version)] = _moved(changes, self.sources, rate(version))
            if version in versions or below:
                kept["versions"][str(version)] = self._score(model, SCORED)
            if below:
                _trained(model, before)
                kept["versions"][str(version - 1)] = self._score(model, SCORED)
                break
        self._keep("runs", setting, kept, started)

    def run_in_turn(self, setting: Setting, versions: int) -> None:
        """Three tasks one after the other, `versions` versions each; scored on all three after each."""
        started = time.perf_counter()
        model = copy.deepcopy(self.model)
        contender, rate, taken = contenders.make(setting, model, self.sources), contenders.rate(setting), 0
        kept: dict[str, Any] = {"setting": asdict(setting), "versions": versions, "after": {}}
        for task in self.data.tasks:
            for batch in islice(self._batches(setting, task), versions):
                taken += 1
                backward(model, batch, self.device)
                contender.step(rate(taken))
            kept["after"][task.name] = self._score(model, list(self._sets()))
        self._keep("in_turn", setting, kept, started)

    def _batches(self, setting: Setting, task: learning_tasks.Task) -> Iterator[list[Example]]:
        """The conversations of one version after the other, as many versions as are asked for."""
        self.check([setting])
        others = epochs(self.data.pool, count=10_000, batch=setting.rehearse or 1, seed=setting.seed)
        for batch in epochs(task.train, count=10_000, batch=setting.batch, seed=setting.seed):
            yield batch + (next(others) if setting.rehearse else [])

    def _learnt(self, model: Any) -> float:
        """Identity loss, in nats per trained token."""
        return learning_curves.mean(self.asked["identity"].losses(model), self.report["tokens"]["identity"])

    def _score(self, model: Any, names: Sequence[str]) -> dict[str, list[float]]:
        """Of each set by name each answer's loss; of the source's own answers the divergence too, as "kl"."""
        scored = {name: self.asked[name].losses(model) for name in names if name != "held"}
        if "held" in names:
            scored["held"], scored["kl"] = self.asked["held"].compare(model)
        return {name: [round(value, 5) for value in values] for name, values in scored.items()}

    def _keep(self, kind: str, setting: Setting, kept: dict[str, Any], started: float) -> None:
        kept["made"] = {
            "torch": torch.__version__, "threads": torch.get_num_threads(),
            "seconds": round(time.perf_counter() - started),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "matmul": torch.get_float32_matmul_precision(),
        }  # fmt: skip
        with self._mine() as report:
            report[kind][setting.key] = kept
        print(f"{setting.key}: {kept['made']['seconds']} s", flush=True)


@torch.no_grad()
def _trained(model: Any, replaced: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
    """A copy of all that is trained; with `replaced`, such a copy is put back first."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, kept in zip(parameters, replaced, strict=bool(replaced)):
        parameter.copy_(kept)
    return [parameter.clone() for parameter in parameters]


def _moved(changes: dict[str, torch.Tensor], sources: dict[str, torch.Tensor], lr: float) -> dict[str, Any]:
    """How far the weights are from the source: |dW| / |W| of all and of some, and of each matrix RMS(dW) / lr (its
    median, ninth decile and maximum)."""
    parts = {"all": "", "embeddings": "embed_tokens", "attention": "self_attn", "mlp": ".mlp."}
    squares = {name: float(change.norm()) ** 2 for name, change in changes.items()}
    moved: dict[str, Any] = {}
    for part, text in parts.items():
        whole = sum(float(weight.norm()) ** 2 for name, weight in sources.items() if text in name)
        moved[part] = (sum(value for name, value in squares.items() if text in name) / whole) ** 0.5
    matrices = {name: change for name, change in changes.items() if change.dim() == 2}
    gains = sorted((squares[name] / change.numel()) ** 0.5 / lr for name, change in matrices.items())
    moved["gain"] = [gains[len(gains) // 2], gains[len(gains) * 9 // 10], gains[-1]]
    ranks = sorted(squares[name] / float(torch.linalg.matrix_norm(change, 2)) ** 2
                   for name, change in matrices.items() if ".layers.1" in name and "k_proj" in name)  # fmt: skip
    moved["stable_rank"] = ranks[len(ranks) // 2] if ranks else None
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("scripts/demo_data"), help="folder with the conversations")
    parser.add_argument("--only", action="append", help="settings that match (with *), as --list names them")
    parser.add_argument("--setting", action="append", default=[], help="run these, of the grid or not, instead of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--versions", type=int, nargs="+", default=[5, 10, 20], help="where to score")
    parser.add_argument("--until", type=float, help="end a run where identity falls below this; score there and before")
    parser.add_argument("--held", type=int, default=100, help="questions that are held out")
    parser.add_argument("--answer-tokens", type=int, default=16, help="the source model's, to each held-out question")
    parser.add_argument("--in-turn", action="store_true", help="three tasks one after the other, --versions[0] each")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--share", type=_share, default=(1, 1), metavar="I/N", help="every Nth run, from the Ith on")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--list", action="store_true", help="print the settings and end")
    parser.add_argument("--report", action="store_true", help="run nothing: tables, means and plot of what is there")
    parser.add_argument("--no-report", action="store_true", help="neither table nor plot after the runs")
    arguments = parser.parse_args()
    chosen = [Setting.parse(text) for text in arguments.setting]
    if arguments.only or not chosen:
        chosen += [one for one in grid() if any(fnmatch(_name(one), only) for only in arguments.only or ["*"])]
    if not chosen:
        parser.error(f"--only {' '.join(arguments.only)}: no setting is called so: see --list")
    if arguments.list:
        print(*map(_name, chosen), sep="\n")
        return
    outputs.folder(arguments.out)
    results = arguments.out / "learning.json"
    if not arguments.report:
        bench = _bench(arguments, results)
        bench.check(chosen)
        versions = sorted(arguments.versions)
        first, every = arguments.share
        for setting in [replace(one, seed=seed) for seed in arguments.seeds for one in chosen][first - 1 :: every]:
            there = bench.report["in_turn" if arguments.in_turn else "runs"].get(setting.key)
            if arguments.in_turn and there is None:
                bench.run_in_turn(setting, versions[0])
            elif not arguments.in_turn and not _done(there, versions, arguments.until):
                bench.run(setting, versions, arguments.until)
    if not results.exists():
        parser.error(f"{results} is not there: nothing has run yet")
    if not arguments.no_report:
        learning_report.write(json.loads(results.read_text()), arguments.out)


def _share(text: str) -> tuple[int, int]:
    first, _, every = text.partition("/")
    if not (first.isdecimal() and every.isdecimal() and 1 <= int(first) <= int(every)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, such as 2/4")
    return int(first), int(every)


def _name(setting: Setting) -> str:
    return " ".join(part for part in setting.key.split() if not part.startswith("seed="))


def _done(run: dict[str, Any] | None, versions: Sequence[int], until: float | None) -> bool:
    """Whether `run` holds what is asked for: the versions, or with `until` an end below it or at the last version, or
    an end because it diverged."""
    if run is None or "diverged" in run:
        return run is not None
    asked = versions[-1:] if until is not None else versions
    return set(map(str, asked)) <= set(run["versions"]) or (until is not None and len(run["versions"]) > 1)


def _bench(arguments: argparse.Namespace, results: Path) -> Bench:
    torch_setup.prepare()
    torch.set_float32_matmul_precision("highest")
    from transformers import AutoTokenizer

    builder = make_builder(AutoTokenizer.from_pretrained(arguments.model), arguments.model, Hyperparameters())
    data = learning_tasks.load(arguments.data, builder.build, held=arguments.held)
    if len(data.held) < arguments.held:
        raise SystemExit(f"error: {arguments.data} has {len(data.held)} other answers, fewer than --held")
    return Bench(arguments.model, data, arguments.device, results, arguments.answer_tokens)


if __name__ == "__main__":
    main()
