"""What has to be so before torch computes, or its companions are imported: the size of oneDNN's cache, and torchvision
beside a CPU torch.

`prepare()` runs in every process of the server (through vLLM's platform plugins, before anything of vLLM's imports
torchvision) and first thing in the trainer.
Invariants: idempotent; imports nothing heavier than torch; touches nothing when torchvision fits torch.
"""

import importlib.util
import os
from pathlib import Path

_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
ONEDNN_CACHE = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
"""Products of matrices that oneDNN remembers by their sizes; a thousand by default, up to a megabyte each. The sizes of
an update and of its rows are fewer; how many tokens are trained differs each time and would fill the cache for good."""
_declared: list[object] = []
"""The torch.library.Library that holds the declarations: they vanish with it."""


def prepare() -> None:
    """Declare the operators a CUDA build of torchvision lacks beside a CPU torch, so that importing it works.

    torchvision's Python half registers fake kernels for torchvision::nms and ::qnms, which its C++ half declares; the
    C++ half of a CUDA build cannot load without CUDA. Nobody calls these operators here. A build that fits declares
    them itself, and a second declaration would be an error: so the C++ half is loaded first, as torchvision would.

    oneDNN reads its environment with the first product: what somebody has set stays.
    """
    os.environ.setdefault(*ONEDNN_CACHE)
    if _declared or importlib.util.find_spec("torchvision") is None:
        return
    import torch

    if torch.version.cuda is not None or _load_torchvision_operators():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _TORCHVISION_SCHEMAS:
        library.define(schema)
    _declared.append(library)


def _load_torchvision_operators() -> bool:
    """Load torchvision's C++ half without its Python half; whether torchvision::nms is declared then."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec is not None else None
    for extension in sorted(path for folder in folders or () for path in Path(folder).glob("_C*.so")):
        try:
            torch.ops.load_library(str(extension))
        except (ImportError, OSError):  # as torchvision/extension.py: a build for another torch
            continue
    return hasattr(torch.ops.torchvision, "nms")
