"""What a real model learns, and what it forgets meanwhile: APOLLO-Mini, its peers and its possible cures.

Every contender starts from the same weights and is given the same conversations in the same order, twenty a version, in
fp32, one optimizer step a version. At some versions it is scored, in nats per trained token, on conversations that it
never trained: the same subject in other words (learnt), facts, the source model's own answers to other questions
(held), and answers by hand to the same (written). A rise is the loss over that of the source weights, answer by answer.

    python benchmarks/learning.py MODEL --list
    python benchmarks/learning.py MODEL --device cuda                        # the whole grid
    python benchmarks/learning.py MODEL --setting 'mini lr=2e-05' --only 'adamw lr=*' --seeds 0 --versions 3 5 8
    python benchmarks/learning.py MODEL --seeds 0 --versions 20 --until .45  # the least that compares at one level
    python benchmarks/learning.py MODEL --in-turn --only 'adamw lr=0.0001'   # three tasks one after the other
    python benchmarks/learning.py MODEL --report                             # table and plot of what is there

MODEL is a directory of an instruct model of attention layers alone, such as SmolLM2-135M-Instruct. Every finished run
is kept in learning.json and not made again, so that a grid can be stopped and continued. LoRA needs `pip install -e
'.[bench]'`. Losses repeat exactly on a CPU with the same number of threads.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

import contenders
import learning_report
import learning_tasks
import outputs
import own_answers
import torch
from contenders import Setting
from shared_prefix import backward, score

from worker.cli.train import epochs
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example
from worker.trainer.factory import make_builder
from worker.utils import torch_setup

RATES = {
    "adamw": (3e-5, 1e-4, 2e-4), "adamw-bf16": (3e-5, 1e-4, 2e-4), "lora": (3e-4, 1e-3, 2e-3),
    "sgd": (3e-3, 1e-2, 3e-2), "mini": (3e-6, 1e-5, 3e-5), "mini-plain": (1e-5,),
}  # fmt: skip
"""Three learning rates for each contender; for those that are not named, OTHERS."""
OTHERS = (1e-5, 3e-5, 1e-4)
SCORED = ("identity", "facts", "held", "written")
VARIANTS = (
    {"freeze": "embeddings"}, {"freeze": "attention"}, {"freeze": "mlp"}, {"warmup": 5}, {"pull": 0.02}, {"pull": 0.1},
    {"rehearse": 5}, {"rehearse": 20}, {"batch": 40}, {"batch": 80},
)  # fmt: skip
"""What is tried with Mini at 1e-5 besides."""


def grid() -> list[Setting]:
    """Every contender at every rate, seed 0."""
    names = [*contenders.LABELS]
    names.sort(key=lambda name: name not in RATES)
    plain = [Setting(name, lr) for name in names for lr in RATES.get(name, OTHERS)]
    return plain + [replace(Setting("mini", 1e-5), **variant) for variant in VARIANTS]


class Bench:
    """One model, one set of conversations, one file of results."""

    def __init__(
        self, model: Path, data: learning_tasks.Data, device: torch.device, results: Path, answer_tokens: int
    ) -> None:
        self.folder, self.data, self.device, self.results = model, data, device, results
        self.answer_tokens = answer_tokens
        self.report = json.loads(results.read_text()) if results.exists() else self._first()
        if self.report["digest"] != data.digest or len(self.report["own"]) != len(data.held):
            raise SystemExit(f"error: {results} was made with other conversations: name another folder with --out")
        self.held = [own_answers.answered(*pair) for pair in zip(data.held, self.report["own"], strict=True)]
        self.report["tokens"] = {name: [e.trained_tokens for e in examples] for name, examples in self._sets().items()}
        start = self.report.setdefault("start", {})
        if missing := [name for name in self._sets() if name not in start]:
            start |= self._score(contenders.load_model(model, device), missing)

    def _first(self) -> dict[str, Any]:
        """What a file of results begins with."""
        model = contenders.load_model(self.folder, self.device)
        own = own_answers.draw(model, self.data.held, self.answer_tokens)
        return {"digest": self.data.digest, "own": own, "runs": {}, "in_turn": {}}

    def _sets(self) -> dict[str, list[Example]]:
        """All that is scored, by its name."""
        others = {"facts": self.data.facts, "held": self.held, "written": self.data.held}
        return {task.name: task.unseen for task in self.data.tasks} | others

    def run(self, setting: Setting, versions: Sequence[int], until: float | None) -> None:
        """One contender up to the last of `versions`, scored at each; kept as soon as it is done.

        until: end at the first version at which identity is below this, and score that one and the one before.
        """
        started = time.perf_counter()
        model = contenders.load_model(self.folder, self.device)
        sources = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        contender, rate = contenders.make(setting, model, sources), contenders.rate(setting)
        kept: dict[str, Any] = {"setting": asdict(setting), "versions": {}, "moved": {}}
        for version, batch in enumerate(islice(self._batches(setting, self.data.tasks[0]), versions[-1]), start=1):
            before = _trained(model) if until is not None else []
            loss = backward(model, batch, self.device)
            contender.step(rate(version))
            below = until is not None and loss < 2 * until and self._learnt(model) < until
            if version == 1 or version in versions or below:
                kept["moved"][str(version)] = _moved(contenders.changes(model, sources), sources, rate(version))
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
        model = contenders.load_model(self.folder, self.device)
        sources = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        contender, rate, taken = contenders.make(setting, model, sources), contenders.rate(setting), 0
        kept: dict[str, Any] = {"setting": asdict(setting), "after": {}}
        for task in self.data.tasks:
            for batch in islice(self._batches(setting, task), versions):
                taken += 1
                backward(model, batch, self.device)
                contender.step(rate(taken))
            kept["after"][task.name] = self._score(model, list(self._sets()))
        self._keep("in_turn", setting, kept, started)

    def _batches(self, setting: Setting, task: learning_tasks.Task) -> Iterator[list[Example]]:
        """The conversations of one version after the other, as many versions as are asked for."""
        pool = self.data.pool
        if setting.rehearse > len(pool):
            raise SystemExit(f"error: rehearse={setting.rehearse}: only {len(pool)} other answers are not held out")
        others = epochs(pool, count=10_000, batch=setting.rehearse or 1, seed=setting.seed) if pool else iter([])
        for batch in epochs(task.train, count=10_000, batch=setting.batch, seed=setting.seed):
            yield batch + (next(others) if setting.rehearse else [])

    def _learnt(self, model: Any) -> float:
        """Identity loss, in nats per trained token."""
        unseen = self.data.tasks[0].unseen
        return learning_report.mean(score(model, unseen, self.device), [example.trained_tokens for example in unseen])

    def _score(self, model: Any, names: Sequence[str]) -> dict[str, list[float]]:
        sets = self._sets()
        return {name: [round(nll, 6) for nll in score(model, sets[name], self.device)] for name in names}

    def _keep(self, kind: str, setting: Setting, kept: dict[str, Any], started: float) -> None:
        kept["made"] = {
            "torch": torch.__version__, "threads": torch.get_num_threads(),
            "seconds": round(time.perf_counter() - started),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
        }  # fmt: skip
        self.report[kind][setting.key] = kept
        written = self.results.with_suffix(".new")
        written.write_text(json.dumps(self.report))
        written.replace(self.results)
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
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--list", action="store_true", help="print the settings and end")
    parser.add_argument("--report", action="store_true", help="run nothing: table and plot of what is there")
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
        versions = sorted(arguments.versions)
        for setting in [replace(one, seed=seed) for seed in arguments.seeds for one in chosen]:
            there = bench.report["in_turn" if arguments.in_turn else "runs"].get(setting.key)
            if arguments.in_turn and there is None:
                bench.run_in_turn(setting, versions[0])
            elif not arguments.in_turn and not _done(there, versions, arguments.until):
                bench.run(setting, versions, arguments.until)
    if not results.exists():
        parser.error(f"{results} is not there: nothing has run yet")
    learning_report.write(json.loads(results.read_text()), arguments.out)


def _name(setting: Setting) -> str:
    return " ".join(part for part in setting.key.split() if not part.startswith("seed="))


def _done(run: dict[str, Any] | None, versions: Sequence[int], until: float | None) -> bool:
    """Whether `run` holds what is asked for: the versions, or with `until` an end below it or at the last version."""
    if run is None:
        return False
    asked = versions[-1:] if until is not None else versions
    return set(map(str, asked)) <= set(run["versions"]) or (until is not None and len(run["versions"]) > 1)


def _bench(arguments: argparse.Namespace, results: Path) -> Bench:
    torch_setup.prepare()
    from transformers import AutoTokenizer

    builder = make_builder(AutoTokenizer.from_pretrained(arguments.model), arguments.model, Hyperparameters())
    data = learning_tasks.load(arguments.data, builder.build, held=arguments.held)
    if len(data.held) < arguments.held:
        raise SystemExit(f"error: {arguments.data} has {len(data.held)} other answers, fewer than --held")
    return Bench(arguments.model, data, arguments.device, results, arguments.answer_tokens)


if __name__ == "__main__":
    main()
