"""The optimizer that a checkpoint goes on with, as the header of its state says.

Must not know: Redis, the server. Only the header is read, not the state.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from worker.apollo import state_layout

STATE = "state"
"""The state's name in the file."""


@dataclass(frozen=True)
class StoredOptimizer:
    """file: a checkpoint's state.safetensors; None: of version 0, with which no optimizer has run.

    tensors, below: text name -> tensor, sorted.
    """

    file: Path | None

    def steps_taken(self) -> int:
        """Steps that it had taken."""
        return 0 if self.file is None else state_layout.steps_taken(_header(self.file))

    def matrices(self, tensors: dict[str, torch.Tensor]) -> str | None:
        """What matrices took in it: a name of worker.apollo's, or None where none has run."""
        if self.file is None:
            return None
        return state_layout.matrices_of(_header(self.file), [tensor.shape for tensor in tensors.values()])

    def is_unstacked(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether its state is of an older Tandem, to which a layer's experts were one tensor."""
        return self.file is not None and state_layout.is_unstacked(
            _header(self.file), [tensor.shape for tensor in tensors.values()]
        )


def _header(file: Path) -> torch.Tensor:
    with safe_open(file, framework="pt") as extra:
        header: torch.Tensor = extra.get_slice(STATE)[: state_layout.HEADER_BYTES]
    return header
