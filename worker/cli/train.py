"""`tandem train`: the same examples, trainer and optimizer without a queue.

Two targets: a model directory (`--model DIR --out NEW`, which writes a new directory), or the weights of a running
server (`--attach`, the update protocol without Redis; the next `tandem worker` takes the result over).
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from producer.errors import TandemError
from producer.jsonl import read_transcripts
from producer.progress import progress
from producer.transcript import Transcript
from worker.config.hyperparameters import Hyperparameters, training_options
from worker.config.update_options import (
    MAX_TOKENS,
    Apply,
    ApplySettings,
    apply_option,
    max_tokens_option,
    memory_option,
)
from worker.data.batch_capacity import BatchCapacity
from worker.data.examples import Example, ExampleError
from worker.memory.plan import Way
from worker.utils.unix_socket import default_run_dir

if TYPE_CHECKING:
    from worker.checkpoint.batch_codec import Ready

T = TypeVar("T")


@dataclass
class History:
    """Loss by step, as trained: before the step's own update, in nats per trained token."""

    losses: list[float] = field(default_factory=list)

    def plot(self, path: Path) -> None:
        """Save the loss curve as a PNG."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(range(1, len(self.losses) + 1), self.losses)
        axes.set(xlabel="step", ylabel="loss (nats per trained token)", title="tandem train")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


def load_examples(path: str, build: Callable[[Transcript, str], T]) -> list[T]:
    """Every line of a JSONL file as `build` makes it; one error names all lines that cannot be trained."""
    examples, problems = [], []
    for line, transcript in read_transcripts(path):
        if isinstance(transcript, Exception):
            problems.append(f"line {line}: {transcript}")
            continue
        try:
            examples.append(build(transcript, transcript.id or uuid.uuid4().hex))
        except ExampleError as error:
            problems.append(f"line {line}: {error}")
    if problems:
        raise TandemError(f"{path}: nothing was trained, {len(problems)} lines are bad:\n  " + "\n  ".join(problems))
    if not examples:
        raise TandemError(f"{path} holds no transcripts")
    return examples


def epochs(examples: Sequence[T], *, count: int, batch: int, seed: int) -> Iterator[list[T]]:
    """Micro-batches of `batch` examples, each epoch in an order of its own that depends on `seed` alone."""
    order, generator = list(range(len(examples))), random.Random(seed)
    for _ in range(count):
        generator.shuffle(order)
        for start in range(0, len(order), batch):
            yield [examples[i] for i in order[start : start + batch]]


def run_steps(batches: Sequence[list[T]], step: Callable[[list[T]], float]) -> History:
    """Call `step` on each batch; its answer is the batch's loss."""
    history = History()
    with progress("training", len(batches), "steps") as shown:
        for batch in batches:
            history.losses.append(step(batch))
            shown.advance(note=f"loss {history.losses[-1]:.3f}")
    return history


def train_directory(
    file: str, model_dir: Path, out: Path, h: Hyperparameters, *, count: int, batch: int, way: Way = "burst"
) -> History:
    """Fine-tune the model in `model_dir` on `file` and write the result to the new directory `out`."""
    from worker.checkpoint import model_directory
    from worker.model import settle_attention
    from worker.trainer.factory import make_builder, make_trainer
    from worker.trainer.proof import prove_trainer

    h = h.settled()
    model_directory.check_target(model_dir, out)
    model, tokenizer = model_directory.load(model_dir)
    builder = make_builder(tokenizer, model_dir, h)
    settle_attention(model)
    trainer = make_trainer(model, model.named_parameters(), tokenizer, h, state=None, way=way)
    prove_trainer(trainer, model, tokenizer, h.max_length)

    def step(examples: list[Example]) -> float:
        gradients = trainer.begin(examples)
        if gradients.rejected:
            raise TandemError(f"the loss of {', '.join(gradients.rejected)} is not finite: lower --lr, or drop them")
        trainer.apply()
        return gradients.loss

    examples = load_examples(file, builder.build)
    history = run_steps(list(epochs(examples, count=count, batch=batch, seed=h.seed)), step)
    model_directory.save(model, model_dir, out)
    return history


def train_attached(
    file: str,
    run_dir: Path,
    h: Hyperparameters,
    *,
    count: int,
    batch: int,
    state_dir: Path | None = None,
    settings: ApplySettings = ApplySettings(),  # noqa: B008  (frozen)
    max_tokens: int = MAX_TOKENS,
) -> History:
    """Fine-tune the weights that the server of `run_dir` is serving.

    max_tokens: what a GPU's memory is planned for; a version of more is refused where it does not fit.
    """
    from worker.orchestrator.live_update import LiveUpdate
    from worker.orchestrator.session import open_session
    from worker.trainer.threads import TrainingThreads

    with open_session(
        run_dir, "tandem train", h, state_dir=state_dir, settings=settings, max_tokens=max_tokens
    ) as session:
        base, lineage = session.weights.header.version, session.weights.header.lineage
        if base and session.manager.history.latest() != (base, lineage):
            raise TandemError(
                "the state directory does not know these weights: run `tandem worker --until-empty` once to record"
                " them, or name the right directory with --state-dir"
            )
        update = LiveUpdate(session, base=base, threads=TrainingThreads())

        def step(examples: list[Ready]) -> float:
            made = update.run(examples)
            if made.rejected:
                raise TandemError(f"the loss of {', '.join(made.rejected)} is not finite: lower --lr, or drop them")
            return float(made.manifest["loss"])

        examples = load_examples(file, lambda transcript, id: update.prepare(id, transcript))
        batches = list(epochs(examples, count=count, batch=batch, seed=h.seed))
        check_batches(file, batches, session.trainer.room)
        return run_steps(batches, step)


def check_batches(file: str, batches: Sequence[list[Ready]], room: BatchCapacity) -> None:
    """The trainer takes every batch; asked before the first version is made. Raises `TandemError`."""
    refused = [found for ready in batches if not room.holds(found := [item.example for item in ready])]
    if refused:
        most = max(map(room.needs, refused))
        what = "a batch" if room.whole else "a transcript"
        fewer = "a smaller --batch, " if room.whole else ""
        raise TandemError(
            f"{file}: nothing was trained: {what} has {most} tokens, and a forward pass here takes {room.longest} at"
            f" most. Use {fewer}--max-tokens {most}, if the GPU's memory allows it, or a lower --max-length"
        )


@click.command()
@click.argument("file", metavar="FILE.jsonl")
@click.option("--model", "model_dir", type=click.Path(path_type=Path), help="Model directory to start from.")
@click.option("--out", type=click.Path(path_type=Path), help="New directory for the result (with --model).")
@click.option("--attach", is_flag=True, help="Train the weights of the running server instead.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="The server's run directory (with --attach).")
@click.option("--state-dir", type=click.Path(path_type=Path), help="The worker's journal (with --attach).")
@click.option("--epochs", "count", type=click.IntRange(1), default=1, help="Passes over the file.")
@click.option("--batch", type=click.IntRange(1), default=8, help="Transcripts a step.")
@click.option("--plot", type=click.Path(path_type=Path), help="Where the loss curve goes (default: loss.png in OUT).")
@apply_option
@max_tokens_option
@memory_option
@training_options
def command(
    file: str,
    model_dir: Path | None,
    out: Path | None,
    attach: bool,
    run_dir: Path | None,
    state_dir: Path | None,
    count: int,
    batch: int,
    plot: Path | None,
    apply: Apply,
    max_tokens: int,
    memory: float | None,
    **options: Any,
) -> None:
    """Train on FILE.jsonl (- for standard input) without a queue: a model directory, or a running server."""
    h = Hyperparameters(**options)
    if plot and not plot.absolute().parent.is_dir() and (out is None or plot.absolute().parent != out.absolute()):
        raise TandemError(f"--plot: the folder {plot.absolute().parent} does not exist: make it first")
    if attach:
        if model_dir or out:
            raise TandemError("--attach trains the running server: leave out --model and --out")
        history = train_attached(
            file,
            run_dir or default_run_dir(),
            h,
            count=count,
            batch=batch,
            state_dir=state_dir,
            settings=ApplySettings(apply, memory=memory),
            max_tokens=max_tokens,
        )
        plot = plot or Path("loss.png")
    else:
        if not (model_dir and out):
            raise TandemError("say what to train: --model DIR --out NEW, or --attach for the running server")
        if memory:
            raise TandemError("--memory works only with --attach: with --model, memory is not limited")
        way: Way = "burst" if apply == "auto" else apply
        history = train_directory(file, model_dir, out, h, count=count, batch=batch, way=way)
        plot = plot or out / "loss.png"
    history.plot(plot)
    click.echo(f"{len(history.losses)} steps, loss {history.losses[0]:.3f} -> {history.losses[-1]:.3f}; curve: {plot}")
