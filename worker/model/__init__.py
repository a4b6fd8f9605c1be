"""transformers' Qwen3.5 with the kernels that training on a GPU needs; on a CPU transformers' own code runs as it is.

Must not know: examples, optimizers, the server, how weights are shared.
"""

from worker.model.patch import ModelError, fuse

__all__ = ["ModelError", "fuse"]
