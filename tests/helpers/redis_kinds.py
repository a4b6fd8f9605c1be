"""Real Redis servers of the kinds that people point a URL at: IPv6, TLS, a replica, a Cluster's node, a Sentinel."""

import asyncio
import contextlib
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from socket import AF_INET6, socket

import redis

from worker.testing.redis_server import find_binary
from worker.utils.child_process import die_with_parent


@dataclass(frozen=True)
class Kinds:
    """Ports on 127.0.0.1; `primary` also answers on ::1, and is what `replica` follows."""

    primary: int
    replica: int
    cluster: int
    sentinel: int


@contextmanager
def redis_kinds(folder: Path) -> Iterator[Kinds]:
    """All four, running. Each keeps its files in a folder of its own below `folder`."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *options: str) -> int:
        home = folder / name
        home.mkdir()
        for _ in range(5):  # somebody else may take a free port first
            port = _free_port()
            (home / "redis.conf").write_text("\n".join([f"port {port}", *options]) + "\n")
            mode = ["--sentinel"] if name == "sentinel" else []
            with (home / "redis.log").open("wb") as log:
                process = subprocess.Popen(
                    [find_binary(), "redis.conf", *mode],
                    cwd=home,
                    stdout=log,
                    stderr=log,
                    preexec_fn=die_with_parent,
                )
            started.append(process)
            if _answers(port, process):
                return port
        raise RuntimeError((home / "redis.log").read_text()[-1000:])

    try:
        primary = start("primary", "bind 127.0.0.1 ::1", 'save ""')
        replica = start("replica", "bind 127.0.0.1", 'save ""', f"replicaof 127.0.0.1 {primary}")
        cluster = start("cluster", "bind 127.0.0.1", 'save ""', "cluster-enabled yes")
        with redis.Redis(port=cluster) as node:  # every slot is its own: a Cluster of one
            node.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
            while node.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                time.sleep(0.05)
        sentinel = start("sentinel", "bind 127.0.0.1", f"sentinel monitor main 127.0.0.1 {primary} 1")
        yield Kinds(primary, replica, cluster, sentinel)
    finally:
        for process in started:
            process.kill()
            process.wait()


def has_ipv6() -> bool:
    """Whether this machine has the loopback address ::1."""
    try:
        with socket(AF_INET6) as tried:
            tried.bind(("::1", 0))
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def _answers(port: int, process: "subprocess.Popen[bytes]") -> bool:
    with redis.Redis(port=port) as client:
        while process.poll() is None:
            try:
                client.ping()
                return True
            except redis.RedisError:
                time.sleep(0.02)
    return False


@contextmanager
def tls_front(port: int, folder: Path) -> Iterator[tuple[int, Path]]:
    """A port on which the Redis of `port` speaks TLS, as behind stunnel, and the certificate that it shows."""
    certificate = _certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, folder / "key.pem")

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(forward(reader, inside[1]), forward(inside[0], writer))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(accept, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1], certificate
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        server.close()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def _certificate(folder: Path) -> Path:
    """A self-signed one for `localhost`, as `cert.pem` beside `key.pem`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(x509.OID_COMMON_NAME, "localhost")]),
    )
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization
    (folder / "key.pem").write_bytes(
        key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(form.Encoding.PEM))
    return folder / "cert.pem"
