"""What can be chosen about training, with the measured defaults, and the flags that choose it.

Shared by `tandem worker` and `tandem train`, so that both mean the same by the same flag. How the defaults were
measured is in DESIGN.md. Must not know: torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import click

from producer.errors import TandemError
from worker.config.optimizers import DEFAULT, OPTIMIZERS, RATES, WHAT, Optimizer, other_optimizer

Router = Literal["frozen", "trained"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Hyperparameters:
    """One field a flag; see `training_options` for what each means.

    lr, optimizer, router: None is the default; `settled` puts names and a number there, and so the journal has them. A
    journal without an optimizer was written when there was one. One without a router was written when routers were
    trained, and when a layer's experts were one tensor to the optimizer.
    """

    lr: float | None = None
    optimizer: Optimizer | None = None
    scale: str = "auto"
    warmup: int = 0
    embeddings: str = "apollo"
    router: Router | None = None
    weight_decay: float = 0.0
    rounding: str = "stochastic"
    seed: int = 0
    max_length: int = 4096
    overlong: Literal["truncate", "reject"] = "truncate"

    @property
    def rule(self) -> Optimizer:
        """The optimizer."""
        return self.optimizer or DEFAULT

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.lr if self.lr is not None else RATES[self.rule]

    def settled(self, of_server: Optimizer | None = None) -> "Hyperparameters":
        """With nothing left open. of_server: the optimizer of the server that is trained. Raises `TandemError` if
        another one was asked for, or what the optimizer does not have."""
        if of_server is not None and self.optimizer not in (None, of_server):
            raise other_optimizer(self.rule, of_server)
        found = replace(self, optimizer=self.optimizer or of_server or DEFAULT)
        if found.rule != DEFAULT and self.scale != "auto":
            raise TandemError(f"--scale is APOLLO's: leave it out with --optimizer {found.rule}")
        return replace(found, lr=found.rate, router=found.router or "frozen")

    def scale_value(self) -> float | str:
        """The optimizer's `scale`: a number, or "auto" for min(rows, cols) of each matrix."""
        return self.scale if self.scale == "auto" else float(self.scale)


class Scale(click.ParamType):
    """A positive number or the word auto."""

    name = "NUMBER|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            if value == "auto" or 0 < float(value) < float("inf"):
                return str(value)
        except ValueError:
            pass
        self.fail(f"{value!r} is neither a positive number nor auto", param, ctx)


def training_options(command: F) -> F:
    """Click decorator: adds every flag of `Hyperparameters`; the command gets them as keyword arguments."""
    defaults = Hyperparameters()
    options = [
        click.option(
            "--optimizer",
            type=click.Choice(OPTIMIZERS),
            help=f"{WHAT} A running server has one, and its trainers take it over. Default: the server's;"
            f" {DEFAULT} without a server.",
        ),
        click.option(
            "--lr",
            type=click.FloatRange(0, min_open=True),
            help="Learning rate: with both optimizers a step is about as long as AdamW's at the same rate, in each"
            " matrix. It learns more than AdamW's. Default: "
            + ", ".join(f"{rate:g} with {name}" for name, rate in RATES.items())
            + ", the best of those measured on a model of 0.1 billion parameters (1e-4 was the highest that ran for"
            ' factored). DESIGN.md, "Choosing the step", has the figures, and what to use for larger models.',
        ),
        click.option(
            "--scale",
            type=Scale(),
            default=defaults.scale,
            help="APOLLO's scale (alpha squared); auto is min(rows, cols), so that a step is about as long as AdamW's.",
        ),
        click.option("--warmup", type=click.IntRange(0), default=defaults.warmup, help="Steps of linear warm-up."),
        click.option(
            "--embeddings",
            type=click.Choice(["apollo", "frozen"]),
            default=defaults.embeddings,
            help="Whether embeddings and output head learn.",
        ),
        click.option(
            "--router",
            type=click.Choice(["frozen", "trained"]),
            default="frozen",
            help="Whether what chooses the experts of a mixture learns. No loss keeps their use even here, so a router"
            " that learns may come to leave experts out.",
        ),
        click.option("--weight-decay", type=click.FloatRange(0), default=defaults.weight_decay, help="Decoupled."),
        click.option(
            "--rounding",
            type=click.Choice(["stochastic", "nearest"]),
            default=defaults.rounding,
            help="How updates are rounded to bf16; nearest loses most of them.",
        ),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=defaults.seed, help="Random seed."),
        click.option(
            "--max-length",
            type=click.IntRange(16),
            default=defaults.max_length,
            help="Longest conversation, in tokens.",
        ),
        click.option(
            "--overlong",
            type=click.Choice(["truncate", "reject"]),
            default=defaults.overlong,
            help="For longer ones. truncate: keep the system message and the latest turns. reject: fail them.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command
