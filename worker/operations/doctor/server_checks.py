"""The server: whether it serves, whether its weights are whole and those that Redis knows, its flags, its leftovers.

Must not know: torch, vLLM. Invariants: only looks; no value of a flag or variable is kept, since keys are among them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from producer.errors import TandemError
from worker.operations.doctor.finding import Fact, Finding, fault, ok, unchecked, warning
from worker.operations.doctor.server_view import ServerView
from worker.serving.leftovers import find_leftovers
from worker.serving.refused_options import check_options, stale_drafter
from worker.utils.supported_versions import VersionError, distribution


def check_server(server: ServerView) -> Finding:
    """Whether it answers, and serves."""
    if not server.state:
        return fault("server", Fact.SERVER_AWAY, said=server.reason)
    state = server.state["state"]
    if state == "torn":
        return warning("server", Fact.SERVER_TORN)
    if state == "paused":
        trainer = (server.state.get("trainer") or {}).get("name")
        return warning("server", Fact.SERVER_PAUSED, trainer=trainer)
    for package, running in (server.described.get("versions") or {}).items():
        if (installed := _installed(package)) != running:
            return warning("server", Fact.OTHER_PACKAGE, package=package, running=running, installed=installed)
    return ok("server", Fact.SERVER, version=server.state.get("version"))


def check_weights(server: ServerView, known: Mapping[str, Any]) -> Finding:
    """The header beside the weights. known: `status.gather`'s answer, for Redis' version, lineage and worker."""
    if not server.header:
        return unchecked("weights", Fact.NO_SERVER)
    header, state = server.header, server.state["state"]
    if state == "torn" or (header["state"] != "CLEAN" and not server.state.get("trainer")):
        return fault("weights", Fact.WEIGHTS_TORN, version=header["version"])
    if header["state"] != "CLEAN":
        return ok("weights", Fact.WEIGHTS_WRITTEN, version=header["version"])
    moving = known.get("worker", {}).get("state") == "busy" or state == "paused"
    if "version" in known and not moving:
        if known["lineage"] not in (None, header["lineage"]):
            return fault("weights", Fact.OTHER_LINEAGE, version=header["version"], redis=known["version"])
        if known["version"] != header["version"]:
            return fault("weights", Fact.OTHER_VERSION, version=header["version"], redis=known["version"])
    return ok("weights", Fact.WEIGHTS, version=header["version"])


def check_flags(server: ServerView, flags: Sequence[str], environment: Mapping[str, str]) -> Finding:
    """vLLM's flags: those given to doctor, else those of the running server, each with its environment."""
    if not flags and not server.state:
        return unchecked("flags", Fact.NO_SERVER)
    given, variables = (flags, environment) if flags else (server.flags, server.environment)
    try:
        check_options(given, variables)
    except TandemError as error:
        return fault("flags", Fact.FLAG_REFUSED, said=str(error))
    if method := stale_drafter(given):
        return warning("flags", Fact.DRAFTER_STALE, method=method)
    return ok("flags", Fact.FLAGS, count=sum(option.startswith("-") for option in given), running=not flags)


def check_leftovers(run_dir: Path) -> Finding:
    """Processes of a server that was killed: they hold the device's memory, and sockets."""
    if found := find_leftovers(run_dir):
        return fault("leftovers", Fact.LEFTOVERS, pids=found, run_dir=str(run_dir))
    return ok("leftovers", Fact.NO_LEFTOVERS)


def _installed(package: str) -> str | None:
    try:
        return distribution(package)[1]
    except VersionError:
        return None
