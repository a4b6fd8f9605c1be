"""Runs the services of docker-compose.yml, and of files put over it, by hand where no Docker runs: each in what makes a
container, from one root.

A service gets: the machine's own root as its image, below an overlay that is thrown away; its volumes, secrets and
tmpfs where the file says; a read-only root, a user and no capabilities where it says; its own environment and no other;
one network for all of them, of its own, with nothing but a loopback. What differs from Docker: the image's content, and
that all services share one pid namespace and one loopback (`redis` is a name of it).

Linux, as root, with bash, unshare, nsenter, setpriv and ip.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from worker.testing.redis_server import OLDEST, major
from worker.utils.child_process import die_with_parent

ROOT = Path(__file__).parents[2]
PROGRAMS = ("bash", "unshare", "nsenter", "setpriv", "ip", "curl", "redis-server", "redis-cli")
FILES = ("docker-compose.yml",)
TRIED = """mount -t tmpfs tmpfs /mnt && cd /mnt && mkdir upper work root &&
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work root"""
INSIDE = r"""
set -e
mount --make-rprivate /
mount -t tmpfs -o size=64m tmpfs "$BASE"  # an overlay's upper layer cannot lie on an overlay
mkdir -p "$BASE/upper" "$BASE/work" "$BASE/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$BASE/upper,workdir=$BASE/work" "$BASE/root"
R="$BASE/root"
chmod o+x "$R/root"
echo "tandem:x:10001:10001::/home/tandem:/bin/sh" >> "$R/etc/passwd"
echo "127.0.0.1 localhost redis" > "$R/etc/hosts"
for place in /proc /dev /sys; do mount --rbind "$place" "$R$place"; done
for place in /tmp /run /home; do mount -t tmpfs -o mode=1777,exec tmpfs "$R$place"; done
mount -o remount,mode=755 "$R/run"; mount -o remount,mode=755 "$R/home"
mkdir -p "$R/home/tandem"
while read -r source target how; do
  [ -n "$target" ] || continue
  if [ -d "$source" ]; then mkdir -p "$R$target"; else mkdir -p "$(dirname "$R$target")"; touch "$R$target"; fi
  mount --bind "$source" "$R$target"
  [ "$how" != ro ] || mount -o remount,bind,ro "$R$target"
done <<< "$MOUNTS"
[ -z "$READ_ONLY" ] || mount -o remount,bind,ro "$R"
exec chroot "$R" setpriv $PRIVILEGES -- "$@"
"""


def missing() -> str | None:
    """Why no service can be run here; None where it can."""
    if os.getuid() != 0:
        return "only root can make namespaces and mounts"
    if lacking := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(lacking)}"
    if (major(str(shutil.which("redis-server"))) or 0) < OLDEST:
        return f"redis-server is older than {OLDEST}"
    made = subprocess.run(["unshare", "--mount", "--net", "--ipc", "sh", "-c", TRIED], capture_output=True, text=True)
    return made.stderr.strip() or None


def filled(value: Any, variables: dict[str, str]) -> Any:
    """`value` with ${NAME}, ${NAME:-default} and ${NAME:?why} as docker compose fills them in."""
    if isinstance(value, dict):
        return {key: filled(one, variables) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, variables) for one in value]
    if not isinstance(value, str):
        return value

    def one(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name, sign, rest = match[1], match[2], match[3]
        if name not in variables and sign == ":?":
            raise KeyError(f"{name}: {rest}")
        return variables.get(name) or (rest if sign == ":-" else "")

    return re.sub(r"\$\$|\$\{(\w+)(?:(:[-?])([^}]*))?\}", one, value)


@dataclass(frozen=True)
class _Instead:
    """What `!override` marks."""

    value: Any


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!override", lambda loader, node: _Instead(loader.construct_mapping(node, deep=True)))
REPLACED = ("command", "entrypoint", "test")
"""Lists that are not appended to."""


def plan(*files: str) -> dict[str, Any]:
    """What docker compose makes of `files`, each put over those before it."""
    found: Any = {}
    for file in files:
        found = _over(found, yaml.load((ROOT / file).read_text(), _Loader))
    return found  # type: ignore[no-any-return]


def _over(below: Any, above: Any, name: str = "") -> Any:
    if isinstance(above, _Instead):
        return above.value
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: _over(below.get(key), value, key) for key, value in above.items()}
    if isinstance(below, list) and isinstance(above, list) and name not in REPLACED:
        return [*below, *above]
    return above


class Composed:
    """The services of `files`; volumes and logs in `folder`. variables: for their ${...}. extra: environment that the
    machine needs beside the service's own."""

    def __init__(
        self, folder: Path, variables: dict[str, str], extra: dict[str, str], files: Sequence[str] = FILES
    ) -> None:
        self.folder, self.extra = folder, extra
        self.plan = filled(plan(*files), variables)
        self.services: dict[str, dict[str, Any]] = self.plan["services"]
        self.image = _image()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.holder = self._hold()

    def volume(self, name: str) -> Path:
        """A named volume, with the owner that the image's folder has."""
        path = self.folder / "volumes" / name
        if not path.exists():
            path.mkdir(parents=True)
            owner = 999 if name == "redis" else self.image["uid"]
            os.chown(path, owner, owner)
            path.chmod(0o700)
        return path

    def start(self, name: str) -> None:
        """A service by its own command."""
        service = self.services[name]
        command = service.get("command", [])
        words = shlex.split(command) if isinstance(command, str) else list(command)
        entry = service.get("entrypoint", self.image["entrypoint"] if "build" in service else [])
        self.running[name] = self._run(name, [*entry, *words], self.folder / f"{name}.log")

    def healthy(self, name: str) -> bool:
        """Whether the service's own health check passes now, run beside it as Docker does."""
        kind, *words = self.services[name]["healthcheck"]["test"]
        command = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        return self._run(name, command, self.folder / f"{name}.health.log").wait() == 0

    def said(self, name: str) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-6000:]}"
            for path in sorted(self.folder.glob(f"{name}*.log"))
        )

    def stop(self, name: str) -> int:
        """SIGTERM, as `docker compose stop`; its exit code."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        grace = self.services[name].get("stop_grace_period", "1m")
        return process.wait(60 * int(str(grace).removesuffix("m")))

    def close(self) -> None:
        for process in [*self.running.values(), self.holder]:
            if process.poll() is None:
                process.kill()
            process.wait()

    def user(self, name: str) -> int:
        """Under which uid the service runs."""
        return int(str(self.services[name].get("user", self.image["uid"])).partition(":")[0])

    def _hold(self) -> "subprocess.Popen[bytes]":
        """The network and the IPC that all share, until this process ends."""
        script = "ip link set lo up && echo up && exec sleep infinity"
        holder = subprocess.Popen(
            ["unshare", "--net", "--ipc", "sh", "-c", script], stdout=subprocess.PIPE, preexec_fn=die_with_parent
        )
        assert holder.stdout is not None and holder.stdout.readline() == b"up\n"
        return holder

    def _run(self, name: str, command: list[str], log: Path) -> "subprocess.Popen[bytes]":
        service = self.services[name]
        base = self.folder / "roots" / f"{log.stem}"
        base.mkdir(parents=True, exist_ok=True)
        uid = self.user(name)
        privileges = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
        if "ALL" in service.get("cap_drop", []):
            privileges += ["--bounding-set", "-all", "--inh-caps", "-all"]
        if "no-new-privileges:true" in service.get("security_opt", []):
            privileges.append("--no-new-privs")
        own = {
            "BASE": str(base),
            "MOUNTS": "\n".join(self._mounts(service)),
            "READ_ONLY": "1" if service.get("read_only") else "",
            "PRIVILEGES": shlex.join(privileges),
            "PATH": os.environ["PATH"],
        }
        inner = {"PATH": os.environ["PATH"]} | (self.image["environment"] if "build" in service else {})
        inner |= service.get("environment", {}) | self.extra
        enter = ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", f"--ipc=/proc/{self.holder.pid}/ns/ipc"]
        words = [*enter, "unshare", "--mount", "bash", "-c", INSIDE, "bash", "env", "-i"]
        words += [*(f"{key}={value}" for key, value in inner.items()), *command]
        with log.open("ab") as file:
            return subprocess.Popen(
                words, env=own, cwd="/", stdout=file, stderr=file, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent
            )

    def _mounts(self, service: dict[str, Any]) -> list[str]:
        """ "source target ro|rw", parents before what lies in them."""
        found = []
        for entry in service.get("volumes", []):
            source, target, *how = entry.split(":")
            path = Path(source) if "/" in source else self.volume(source)
            found.append((target, f"{path} {target} {how[0] if how else 'rw'}"))
        for name in service.get("secrets", []):
            target = f"/run/secrets/{name}"
            found.append((target, f"{Path(self.plan['secrets'][name]['file']).absolute()} {target} ro"))
        return [line for _, line in sorted(found)]


def _image() -> dict[str, Any]:
    """What scripts/Dockerfile says of its user, environment and entry point."""
    text = (ROOT / "scripts" / "Dockerfile").read_text().replace("\\\n", " ")
    uid = int(re.search(r"useradd --uid (\d+)", text)[1])  # type: ignore[index]
    assert re.search(r"^USER tandem$", text, re.MULTILINE)
    pairs = [pair.partition("=") for line in re.findall(r"^ENV (.*)$", text, re.MULTILINE) for pair in line.split()]
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1])  # type: ignore[index]
    return {"uid": uid, "environment": {name: value for name, _, value in pairs}, "entrypoint": entry}
