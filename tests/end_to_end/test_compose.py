"""docker-compose.yml comes up: each service by its own command, until its own health check passes, in the file's order.

No Docker: compose_parts.py makes what a container is of namespaces, an overlay and a user without rights. The server is
vLLM's CPU build on a tiny model.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import compose_parts
import pytest
from compose_parts import Composed
from patience import until

ORDER = ("redis", "vllm", "worker", "dashboard")


REPLICAS = ("docker-compose.yml", "docs/deploy/compose.replicas.yml")


@contextmanager
def composed(tiny_model: Path, tmp_path: Path, files: Sequence[str] = compose_parts.FILES) -> Iterator[Composed]:
    if why := compose_parts.missing():
        pytest.skip(why)
    secret = tmp_path / "redis_password"
    secret.write_text("0123456789abcdef\n")
    secret.chmod(0o444)
    variables = {"MODEL": "/home/tandem/.cache/huggingface/tiny", "REDIS_PASSWORD_FILE": str(secret)}
    extra = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    running = Composed(tmp_path, variables, extra, files)
    shutil.copytree(tiny_model, running.volume("models") / "tiny")
    for path in [running.volume("models") / "tiny", *(running.volume("models") / "tiny").iterdir()]:
        path.chmod(0o755)
    try:
        yield running
    finally:
        running.close()


def test_the_file_starts_what_others_wait_for_first() -> None:
    """Every service has a health check, and whoever is waited for is waited for until it is healthy."""
    services = compose_parts.plan(*compose_parts.FILES)["services"]
    assert tuple(services) == ORDER
    for at, name in enumerate(ORDER):
        assert services[name]["healthcheck"]["test"] and services[name]["read_only"]
        for other, how in services[name].get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"} and other in ORDER[:at]
    assert services["worker"]["pid"] == services["worker"]["ipc"] == "service:vllm"


def gpus(service: dict[str, Any]) -> list[str]:
    """By number; `count` means the first ones."""
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    return device.get("device_ids") or [str(n) for n in range(device["count"])]


def test_two_servers_have_a_gpu_each_and_their_workers_both() -> None:
    plan = compose_parts.plan(*REPLICAS)
    services = plan["services"]
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert ("healthcheck" in service) == (name != "spaces")
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy" if other != "spaces" else "service_started"}
    assert [gpus(services[name]) for name in ("vllm", "vllm-1", "worker")] == [["0"], ["1"], ["0", "1"]]
    for name in ("vllm", "vllm-1", "worker"):
        assert services[name]["pid"] == services[name]["ipc"] == "service:spaces"
    assert services["worker"]["depends_on"].keys() == {"redis", "vllm", "vllm-1"}
    folders = [services[name]["environment"]["TANDEM_RUN_DIR"] for name in ("vllm", "vllm-1")]
    command = services["worker"]["command"]
    place = command[command.index("--run-dir") + 1]
    assert folders == [place.replace("{replica}", str(number)) for number in (0, 1)]
    made = re.search(r"mkdir -p (.*) &&", (compose_parts.ROOT / "scripts" / "Dockerfile").read_text())
    assert made is not None
    for entry in services["worker"]["volumes"]:
        volume, target = entry.split(":")[:2]
        assert volume not in plan["volumes"] or target in [*made[1].split(), "/home/tandem/.cache"], "its owner is ours"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_service_becomes_healthy_by_its_own_command(tiny_model: Path, tmp_path: Path) -> None:
    with composed(tiny_model, tmp_path) as running:
        come_up(running, ORDER)
        assert running.stop("worker") == 0, running.said("worker")
        assert not running.healthy("worker")
        assert running.healthy("vllm"), "the server goes on"
        for name in ("dashboard", "vllm", "redis"):
            running.stop(name)
        assert "0123456789abcdef" not in "".join(running.said(name) for name in ORDER)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_replicas_come_up_by_their_own_commands_and_meet(tiny_model: Path, tmp_path: Path) -> None:
    with composed(tiny_model, tmp_path, REPLICAS) as running:
        running.start("spaces")
        come_up(running, ("redis", "vllm", "vllm-1", "worker"))
        until(lambda: "replicas 0, 1 of 2 train together" in running.said("worker"), "they meet")
        assert running.stop("worker") == 0, running.said("worker")
        for name in ("vllm-1", "vllm", "spaces", "redis"):
            running.stop(name)


def come_up(composed: Composed, names: Sequence[str]) -> None:
    """Each is started, and waited for, in this order."""
    for name in names:
        assert not composed.healthy(name), f"{name} is healthy before it was started"
        composed.start(name)
        process = composed.running[name]
        until(lambda name=name, process=process: composed.healthy(name) or process.poll() is not None, name, pace=2.0)
        assert process.poll() is None, composed.said(name)
        assert composed.user(name) != 0
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert f"Uid:\t{composed.user(name)}\t" in status and "CapEff:\t0000000000000000" in status
