"""One set at any version: as it is stored, asked of the server while that version is live, or computed offline.

    model = open_model(run_dir, None, max_length)          # tokenizer and template as the server has them
    cases = read_cases(file, model.builder)
    Evaluator(cases, "facts", model, server, connection, state_dir).at(118)

Invariants: where a figure comes from is said with it; only what is of one version of one lineage is stored; no lock of
the worker is taken, and nothing of its is changed.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import redis

from producer.connection import own_words
from producer.errors import TandemError
from producer.progress import progress
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import ExampleBuilder
from worker.operations.evaluation import answers as kept_answers
from worker.operations.evaluation import offline
from worker.operations.evaluation.answers import Answer
from worker.operations.evaluation.cases import CaseSet
from worker.operations.evaluation.found import Found
from worker.operations.evaluation.live import LiveError, Server
from worker.serving.control_client import server_rendering
from worker.shared_weights.spot_check import checkpoint_dir
from worker.shared_weights.weights_client import ask
from worker.trainer.factory import make_builder
from worker.utils import torch_setup
from worker.utils.unix_socket import WireError
from worker.versions import evaluations, ledger
from worker.versions.evaluations import Evaluation, Score

CONTEXT_SPARE = 1
"""Tokens that a server's context must have beside a conversation: it generates one, whatever it is asked."""


@dataclass(frozen=True)
class Model:
    """What turns conversations into tokens. lineage: of the server that said so; None where none runs."""

    directory: Path
    tokenizer: Any
    builder: ExampleBuilder
    lineage: str | None

    def decode(self, tokens: Any) -> str:
        """Their text, without control tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


@dataclass(frozen=True)
class Result:
    """One set at one version. whole: what is stored of it; None where the version moved while it was measured: then
    each conversation has its own, in `versions`. scores: in the set's order; None where a stored evaluation has none.
    found: only what was measured now has it. remarks: what else to say, in sentences."""

    whole: Evaluation | None
    scores: list[Score] | None
    versions: list[int]
    found: list[Found] | None
    stored: bool
    remarks: list[str]


def open_model(run_dir: Path, model_dir: Path | None, max_length: int) -> Model:
    """As the server of `run_dir` has it; with model_dir, of that directory, whether a server runs or not.

    Raises `TandemError` where neither says which model.
    """
    torch_setup.prepare()
    from transformers import AutoTokenizer

    rendering: dict[str, Any] = {}
    lineage, longest = None, max_length
    try:
        info, _ = ask(run_dir, "describe")
    except WireError as error:
        if model_dir is None:
            raise TandemError(
                f"no server says which model it is ({error}): start it, name its --run-dir, or name the model's"
                " directory with --model"
            ) from None
        directory = model_dir
    else:
        directory = model_dir or checkpoint_dir(info["model"], info["revision"])
        rendering, lineage = server_rendering(run_dir), str(info["lineage"])
        longest = min(max_length, int(info["max_model_len"]) - CONTEXT_SPARE)
    if not (directory / "config.json").is_file():
        raise TandemError(f"--model {directory} is not a model directory: it has no config.json")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    builder = make_builder(tokenizer, directory, Hyperparameters(max_length=longest), **rendering)
    return Model(directory, tokenizer, builder, lineage)


class Evaluator:
    """Of the set `name`, whose cases are `cases`. server: None where none is to be asked. connection: where figures are
    stored, and looked up; None: nowhere. answers: ask for greedy answers; keep: write them to the state directory."""

    def __init__(
        self,
        cases: CaseSet,
        name: str,
        model: Model,
        server: Server | None,
        connection: redis.Redis | None,
        state_dir: Path,
        *,
        answers: bool = True,
        keep: bool = False,
    ) -> None:
        self.cases, self.name, self.model = cases, evaluations.checked_name(name), model
        self.server, self.connection, self.state_dir = server, connection, state_dir
        self.answers, self.keep = answers, keep
        self.unstored = False
        """Whether figures that were to be stored are not."""

    def live(self) -> Result:
        """At the version that is live. Raises `LiveError`."""
        assert self.server is not None
        served = self.server.at()
        if self.model.lineage not in (None, served.lineage):
            raise LiveError(
                f"the server at {self.server.url} is another than the one of the run directory: name both of one server"
                " (--url, --run-dir)"
            )
        cases, total = self.cases.cases, len(self.cases.cases)
        with progress(f"evaluating {self.name}", total, "conversations") as shown:
            found = self.server.measure(cases, answers=self.answers, tell=lambda done: shown.at(done, total))
        versions = sorted({one.at.version for one in found})
        if len(versions) > 1:
            remark = (
                f"versions {versions[0]} to {versions[-1]} were live while it was measured, so it is not stored. Pause"
                " training for the while (tandem pause, then tandem resume)"
            )
            return self._result(found, None, [remark])
        return self._result(found, self._whole(found, "live"), [])

    def at(self, version: int, *, again: bool = False) -> Result:
        """At `version`: stored, or live, or offline. again: offline whatever is stored or live."""
        remarks: list[str] = []
        if not again:
            if (result := self._stored(version, remarks)) is not None:
                return result
            if self.server is not None and self._is_live(version, remarks):
                result = self.live()
                if result.whole is not None and result.whole.version == version:
                    return replace(result, remarks=[*remarks, *result.remarks])
                remarks.append(f"version {version} was live, and another came while it was measured")
        with progress(f"evaluating version {version}", len(self.cases.cases), "conversations") as shown:
            made = offline.measure(
                version,
                self.cases.cases,
                self.state_dir,
                self.model.directory,
                self.model.tokenizer,
                self.model.decode,
                answers=self.answers,
                tell=lambda done: shown.at(done, len(self.cases.cases)),
            )
        if without := made.rebuilt.plan.without:
            remarks.append(
                f"version {version} was made again without {len(without)} transcripts that were dropped since: it is"
                " not what was live then, and its figures are not stored"
            )
        remarks += made.rebuilt.replayed.changed
        return self._result(made.found, self._whole(made.found, "offline"), remarks, store=not without)

    def _whole(self, found: list[Found], where: evaluations.Where) -> Evaluation:
        at, scores = found[0].at, [one.score for one in found]
        return evaluations.evaluation(self.name, at.version, at.lineage, self.cases.digest, scores, where)

    def _result(
        self, found: list[Found], whole: Evaluation | None, remarks: list[str], *, store: bool = True
    ) -> Result:
        scores = [one.score for one in found]
        if whole is not None and self.connection is not None and store:
            remarks = [*remarks, *self._store(self.connection, whole, scores)]
        if whole is not None and self.keep:
            path = kept_answers.keep(self.state_dir, whole, self._texts(found))
            remarks = [*remarks, f"the answers are kept in {path}"]
        return Result(whole, scores, [one.at.version for one in found], found, False, remarks)

    def _store(self, connection: redis.Redis, whole: Evaluation, scores: list[Score]) -> list[str]:
        """What to say of it: what was measured is said even where Redis went away meanwhile."""
        try:
            if not self._is_fuller(connection, whole):
                evaluations.keep(connection, whole, scores)
        except redis.RedisError as error:
            self.unstored = True
            return [f"the figures could not be stored: Redis does not take them ({own_words(error)})"]
        return []

    def _is_fuller(self, connection: redis.Redis, new: Evaluation) -> bool:
        """Whether what is stored of the same version and content has answers, which `new` was not to ask for."""
        old = evaluations.find(connection, new.name, new.version, new.lineage)
        return old is not None and old.digest == new.digest and old.asked > new.asked

    def _texts(self, found: list[Found]) -> list[Answer]:
        decode = self.model.decode
        return [
            Answer(
                case.id,
                case.line,
                case.question,
                decode(case.reference[:-1]),
                decode(one.answer or ()),
                bool(one.score.exact),
                one.score.loss,
            )
            for case, one in zip(self.cases.cases, found, strict=True)
        ]

    def _stored(self, version: int, remarks: list[str]) -> Result | None:
        """What is stored of `version`, if it is of the same content and has all that is wanted of it."""
        if self.connection is None or self.keep:
            return None
        lineage = self._lineage(version)
        found = evaluations.find(self.connection, self.name, version, lineage) if lineage else None
        if found is None:
            return None
        if found.digest != self.cases.digest:
            remarks.append(
                f"what is stored of {self.name} at version {version} is of other content (digest {found.digest}, the"
                f" file's is {self.cases.digest})"
            )
            return None
        scores = evaluations.scores(self.connection, found)
        if scores is None or (self.answers and not found.asked):
            return None
        return Result(found, scores, [version] * len(scores), None, True, [])

    def _lineage(self, version: int) -> str | None:
        """Of `version`, by its manifest; where that is gone, the live one's, as Redis or the server has it."""
        assert self.connection is not None
        by_manifest = ledger.manifest(self.connection, version).get("lineage")
        return by_manifest or ledger.state(self.connection).lineage or self.model.lineage

    def _is_live(self, version: int, remarks: list[str]) -> bool:
        assert self.server is not None
        try:
            return self.server.at().version == version
        except LiveError as error:
            remarks.append(str(error))
            return False
