"""transformers' model as training on a GPU needs it: fused kernels, packed inputs, and the loss of the output head.

In: a transformers model and a batch. Out: the model with its kernels exchanged, its inputs, its loss.
It knows no optimizer and no server; on a CPU transformers' own code runs as it is.
"""

from worker.model.attention_choice import settle_attention
from worker.model.model_error import ModelError
from worker.model.patch import fuse
from worker.model.routers import freeze_routers

__all__ = ["ModelError", "freeze_routers", "fuse", "settle_attention"]
