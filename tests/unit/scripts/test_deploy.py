"""Units of systemd and the Kubernetes manifest of docs/deploy: well-formed, and what they promise is in them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from worker.cli.main import COMMANDS

DEPLOY = Path(__file__).parents[3] / "docs" / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    """In copies: the programs lie elsewhere here."""
    for unit in UNITS:
        text = unit.read_text().replace("/opt/tandem/bin/tandem", sys.executable)
        (tmp_path / unit.name).write_text(text.replace("/usr/bin/redis-server", sys.executable))
    verify = ["systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(verify, capture_output=True, text=True, env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:"})
    ours = [line for line in done.stderr.splitlines() if "tandem" in line]
    assert ours == [] and done.returncode == 0, done.stderr


def test_every_unit_runs_a_command_of_ours_without_rights() -> None:
    assert [unit.stem for unit in UNITS] == ["tandem-dashboard", "tandem-redis", "tandem-serve", "tandem-worker"]
    for unit in UNITS:
        text = unit.read_text()
        for command in re.findall(r"^Exec\w+=/opt/tandem/bin/tandem (\w+)", text, re.MULTILINE):
            assert command in COMMANDS
        for line in (
            "User=tandem",
            "NoNewPrivileges=yes",
            "ProtectSystem=strict",
            "CapabilityBoundingSet=",
            "UMask=0077",
        ):
            assert line in text.splitlines(), f"{unit.name}: {line}"
    worker = (DEPLOY / "systemd" / "tandem-worker.service").read_text()
    assert "TimeoutStopSec=600" in worker and "BindsTo=tandem-serve.service" in worker


def manifest() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yml").read_text()))


def test_the_manifest_fits_kubernetes_own_schema() -> None:
    """`validate` raises for whatever does not."""
    for resource in manifest():
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def test_server_and_worker_share_what_the_weights_need() -> None:
    (claim, service, pods) = manifest()
    spec = pods["spec"]["template"]["spec"]
    assert claim["kind"] == "PersistentVolumeClaim" and service["spec"]["selector"] == {"app": "tandem"}
    assert spec["shareProcessNamespace"] and spec["securityContext"]["runAsNonRoot"]
    containers = {one["name"]: one for one in spec["containers"]}
    volumes = {one["name"]: one for one in spec["volumes"]}
    for name in ("vllm", "worker"):
        mounts = {one["mountPath"]: one["name"] for one in containers[name]["volumeMounts"]}
        for place in ("/run/tandem", "/dev/shm"):
            assert volumes[mounts[place]]["emptyDir"]["medium"] == "Memory"
        env = {one["name"]: one["value"] for one in containers[name]["env"]}
        # a mounted folder is root's: Tandem makes folders of its own below
        assert env["TANDEM_RUN_DIR"].startswith("/run/tandem/") and env["TANDEM_STATE_DIR"].startswith(
            "/var/lib/tandem/"
        )
        assert env["REDIS_PASSWORD_FILE"].startswith("/run/secrets/tandem/") and "@" not in env["REDIS_URL"]
    for one in containers.values():
        assert (
            one["securityContext"]["readOnlyRootFilesystem"] and not one["securityContext"]["allowPrivilegeEscalation"]
        )
    assert "readinessProbe" in containers["worker"] and "startupProbe" in containers["vllm"]
    assert "readinessProbe" in containers["redis"]
