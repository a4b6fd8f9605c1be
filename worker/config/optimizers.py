"""Which optimizers there are: what `--optimizer` may say, on `tandem serve` and on whoever trains.

The state lies in the server's memory and is sized at its start, so the server is told which, and its trainers take it
over. Must not know: torch.
"""

from collections.abc import Mapping
from typing import Literal

from producer.errors import TandemError

Optimizer = Literal["apollo-mini", "factored"]
OPTIMIZERS: tuple[Optimizer, ...] = ("apollo-mini", "factored")
DEFAULT: Optimizer = "apollo-mini"
MATRICES = {"apollo-mini": "apollo", "factored": "factored"}
"""-> what worker.apollo calls the algorithm that matrices take."""
RATES = {"apollo-mini": 3e-5, "factored": 1e-4}
"""-> the learning rate where none is said: the best of those measured (DESIGN.md, "Choosing the step")."""
OPTIMIZER_ENV = "TANDEM_OPTIMIZER"
"""How `tandem serve` tells vLLM's processes."""
WHAT = (
    "apollo-mini: the gradient of each matrix, scaled by APOLLO-Mini. factored: each element of the gradient divided by"
    " the root mean square of its row and of its column (Adafactor's second moment, without momentum)."
)


def optimizer_of(environment: Mapping[str, str]) -> Optimizer:
    """What this server was started for. Raises `TandemError` for a name that is none."""
    found = environment.get(OPTIMIZER_ENV) or DEFAULT
    for known in OPTIMIZERS:
        if found == known:
            return known
    raise TandemError(f"{OPTIMIZER_ENV} is {found!r}, and optimizers are {', '.join(OPTIMIZERS)}")


def other_optimizer(asked: str, of_server: str) -> TandemError:
    """The error of a trainer that asks for another one than the server's."""
    return TandemError(
        f"--optimizer {asked}: the server was started for {of_server}, whose state it has room for. Leave --optimizer"
        f" out, or start the server again with `tandem serve --optimizer {asked}`"
    )
