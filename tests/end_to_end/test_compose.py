"""docker-compose.yml comes up: each service by its own command, until its own health check passes, in the file's order.

No Docker: compose_parts.py makes what a container is of namespaces, an overlay and a user without rights. The server is
vLLM's CPU build on a tiny model.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import compose_parts
import pytest
from compose_parts import Composed
from patience import until

ORDER = ("redis", "vllm", "worker", "dashboard")


@pytest.fixture
def composed(tiny_model: Path, tmp_path: Path) -> Iterator[Composed]:
    if why := compose_parts.missing():
        pytest.skip(why)
    secret = tmp_path / "redis_password"
    secret.write_text("0123456789abcdef\n")
    secret.chmod(0o444)
    variables = {"MODEL": "/home/tandem/.cache/huggingface/tiny", "REDIS_PASSWORD_FILE": str(secret)}
    extra = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    running = Composed(tmp_path, variables, extra)
    shutil.copytree(tiny_model, running.volume("models") / "tiny")
    for path in [running.volume("models") / "tiny", *(running.volume("models") / "tiny").iterdir()]:
        path.chmod(0o755)
    yield running
    running.close()


def test_the_file_starts_what_others_wait_for_first() -> None:
    """Every service has a health check, and whoever is waited for is waited for until it is healthy."""
    services = compose_parts.yaml.safe_load((compose_parts.ROOT / "docker-compose.yml").read_text())["services"]
    assert tuple(services) == ORDER
    for at, name in enumerate(ORDER):
        assert services[name]["healthcheck"]["test"] and services[name]["read_only"]
        for other, how in services[name].get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"} and other in ORDER[:at]
    assert services["worker"]["pid"] == services["worker"]["ipc"] == "service:vllm"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_service_becomes_healthy_by_its_own_command(composed: Composed) -> None:
    for name in ORDER:
        assert not composed.healthy(name), f"{name} is healthy before it was started"
        composed.start(name)
        process = composed.running[name]
        until(lambda name=name, process=process: composed.healthy(name) or process.poll() is not None, name, pace=2.0)
        assert process.poll() is None, composed.said(name)
        assert composed.user(name) != 0
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert f"Uid:\t{composed.user(name)}\t" in status and "CapEff:\t0000000000000000" in status
    assert composed.stop("worker") == 0, composed.said("worker")
    assert not composed.healthy("worker")
    assert composed.healthy("vllm"), "the server goes on"
    for name in ("dashboard", "vllm", "redis"):
        composed.stop(name)
    assert "0123456789abcdef" not in "".join(composed.said(name) for name in ORDER)
