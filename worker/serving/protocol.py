"""What both sides of a server's sockets agree on: names, limits and the lease's length.

The trainer's client, `tandem serve` and the code inside vLLM's processes import it, so that none of them loads another.
Must not know: vLLM, torch.
"""

from producer.errors import TandemError

SOCKET = "control.sock"
"""The API process's socket in the run directory."""
SERVE_ENV = "TANDEM_SERVE"
"""Set to 1 by `tandem serve`, for vLLM's processes; the run directory travels in TANDEM_RUN_DIR."""
LINEAGE_ENV = "TANDEM_LINEAGE"
"""The weights' lineage where several ranks of tensor parallelism must have the same: drawn by `tandem serve`."""
WEIGHT_ENGINE = "tandem"
"""Our name among vLLM's weight transfer backends."""
PLUGIN = "tandem"
"""The name of our entry points in vLLM's plugin groups."""
VERSION_PATH = "/weights/version"
VERSION_HEADER = "x-weight-version"
FEEDBACK_PATH = "/v1/feedback"
COMPLETION_HEADER = "x-tandem-completion"
"""The key of a completion that is kept, in its answer's headers."""

SERVING, PAUSED, TORN = "serving", "paused", "torn"
"""The server's conditions, as `state` names them."""

CONNECT_SECONDS = 10.0
ENGINE_SECONDS = 120.0
"""For one call into the engine. A pause waits for the step that is running."""
HELD_BACK_SECONDS = 100.0
"""Most that a pause waits for the requests that the last version threw back (`--running recompute`)."""
ANSWER_SECONDS = HELD_BACK_SECONDS + 4 * ENGINE_SECONDS + CONNECT_SECONDS
"""What a trainer waits for an answer: the server, which bounds each of its calls into the engine, answers before."""
MAX_ROW = 2048
"""Tokens of a row that the server scores."""
MAX_REQUEST = 16_384
"""Bytes of one request. The longest real one, such a row, has under 11,000."""
SCORE_SECONDS = 300.0
"""Most that a row waits to be scored: behind the requests that a busy server holds."""

PLANNED_SECONDS = 5.0
"""How long a write takes, for a trainer that has not measured one yet."""
LEASE_FACTOR = 10.0
LEAST_LEASE, LONGEST_LEASE = 20.0, 24 * 3600.0
"""Seconds. A short write on a busy machine may well take ten times as long as planned."""


LEAVING_SECONDS = 5.0
"""How long a trainer that comes next waits for one that is going away: until the server has noticed. The server's first
answer may come late: when it is done with what the other one asked for."""


class ControlError(TandemError):
    """A request of the trainer that the server refuses."""


class TakenError(ControlError):
    """Another trainer is connected; it may be going away. The answer says so: "taken"."""


def lease_seconds(planned: float) -> float:
    """How long the server waits for a trainer that means to be done in `planned` seconds."""
    return min(max(LEAST_LEASE, LEASE_FACTOR * planned), LONGEST_LEASE)
