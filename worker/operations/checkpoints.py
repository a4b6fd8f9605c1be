"""Which versions have a checkpoint in a state directory, and how a person marked them.

Must not know: torch, vLLM, Redis. Reads only, and takes no lock, so that it works beside a worker.
"""

import os
from pathlib import Path

from producer.errors import TandemError
from worker.checkpoint.state_dir import default_state_dir
from worker.shared_weights.weights_client import ask

MAX_MARK = 80
"""Characters of a mark that are told."""


def state_dir(given: Path | None, run_dir: Path, timeout: float = 10.0) -> Path:
    """`given`, else $TANDEM_STATE_DIR, else that of the model which the server of `run_dir` serves.

    timeout: seconds that the server may take. Raises `TandemError`, which names --state-dir."""
    if given or os.environ.get("TANDEM_STATE_DIR"):
        return given or Path(os.environ["TANDEM_STATE_DIR"])
    try:
        return default_state_dir(Path(ask(run_dir, "describe", timeout)[0]["model"]))
    except TandemError as error:
        raise TandemError(
            f"no server says which model's state directory to look at ({error}): name it with --state-dir"
        ) from None


def checkpoints(folder: Path) -> dict[int, str]:
    """Version -> what it is marked as, or the empty string; of the folder of checkpoints."""
    found = {}
    for path in folder.glob("[0-9]*"):
        if path.name.isdecimal():
            mark = path / "tandem" / "mark"
            found[int(path.name)] = mark.read_text(errors="replace").strip()[:MAX_MARK] if mark.exists() else ""
    return found
