"""Packages: the versions installed, against those that Tandem needs and those that it was tested with.

Must not know: torch, vLLM, Redis. It reads their metadata.
"""

import re

from packaging.version import Version

from worker.operations.doctor.finding import Fact, Finding, fault, ok, unchecked, warning
from worker.utils.supported_versions import SUPPORTED, VersionError, check_versions, distribution

ON_A_GPU = ("fla",)
"""Not needed beside vLLM's CPU build."""


NAMES = {"redis": "redis-py"}
"""Package -> name of its check, where another check has the package's."""


def check_packages() -> list[Finding]:
    """One finding for each package of `SUPPORTED`."""
    return [_check(package) for package in SUPPORTED]


def _check(package: str) -> Finding:
    supported, check = SUPPORTED[package], NAMES.get(package, package)
    try:
        name, version = distribution(package)
    except VersionError as error:
        if package in ON_A_GPU and _is_cpu_build():
            return unchecked(check, Fact.PACKAGE_MISSING, package=package)
        return fault(check, Fact.PACKAGE_REFUSED, said=str(error))
    try:
        check_versions(package)
    except VersionError as error:
        return fault(check, Fact.PACKAGE_REFUSED, said=str(error), name=name, version=version)
    values = {"name": name, "version": version, "tested": supported.tested}
    if not _is_tested(version, supported.tested):
        return warning(check, Fact.PACKAGE_UNTESTED, **values)
    return ok(check, Fact.PACKAGE, **values)


def _is_tested(version: str, tested: str) -> bool:
    """Whether `tested`, a sentence with versions in it, names the major and minor number of `version`."""
    return Version(version).release[:2] in {Version(found).release[:2] for found in re.findall(r"\d+\.\d+", tested)}


def _is_cpu_build() -> bool:
    try:
        return any("cpu" in part for part in distribution("vllm"))
    except VersionError:
        return False
