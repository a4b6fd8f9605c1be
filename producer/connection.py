"""The way to Redis: which URL, which of its options, and Redis' errors as one sentence.

Invariants: a URL that cannot work is refused before anything is sent; no text from here holds a password; replies are
bytes, whatever the URL says, since payloads are no text.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, urlencode, urlsplit

import redis

from .errors import QueueUnavailableError, RedisUrlError

DEFAULT_URL = "redis://127.0.0.1:6379/0"

MOST_CONNECTIONS = 1 << 16
"""Of one client, unless its URL says less. redis-py before 8 has no bound, later ones take 100 calls at a time."""

BLOCK_SECONDS = 5.0
"""The longest single blocking read of `wait`. A job that is cancelled or deleted announces nothing; it is seen then."""

OPTIONS = (
    *("db", "username", "password", "client_name", "max_connections", "protocol", "health_check_interval"),
    *("socket_timeout", "socket_connect_timeout", "socket_keepalive", "retry_on_timeout"),
)
"""What may stand behind the `?` of a URL, beside `ssl_...` with rediss://. redis-py 5.0 and 8.1 know all of them."""

OWN_CHOICE = ("decode_responses", "encoding", "encoding_errors", "legacy_responses")
"""How replies are read is Tandem's choice: harmless in a URL that other programs use too, and without effect here."""

_AMOUNTS = ("socket_timeout", "socket_connect_timeout")


PASSWORD_FILE = "REDIS_PASSWORD_FILE"
"""Environment: a file with the password of REDIS_URL, as Docker, systemd and Kubernetes hand secrets over."""


def resolve_url(url: str | None) -> str:
    """The URL given, else the environment's REDIS_URL, else the one of a Redis on this machine.

    The environment's gets the password in the file that `PASSWORD_FILE` names, if it has none itself; a URL that was
    given may be of another Redis, and gets none. Raises `RedisUrlError`.
    """
    if url:
        return url
    found = os.environ.get("REDIS_URL") or DEFAULT_URL
    path = os.environ.get(PASSWORD_FILE)
    return _with_password(found, path) if path else found


def _with_password(url: str, path: str) -> str:
    """`url` with the one line of the file at `path` as its password, unless it has one; ends of lines and a byte-order
    mark, which editors add, are none of it."""
    scheme, mark, rest = url.partition("://")
    end = min((rest.find(sign) for sign in "/?#" if sign in rest), default=len(rest))
    user, _, host = rest[:end].rpartition("@")
    if not mark or ":" in user:
        return url
    if "password" in dict(parse_qsl(rest[end:].partition("?")[2])):
        return url
    try:
        password = Path(path).read_text(encoding="utf-8-sig").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RedisUrlError(f"{PASSWORD_FILE}: {path} cannot be read as text ({type(error).__name__})") from None
    if not password or not password.isprintable():  # UTF-16 without a mark is full of NULs
        raise RedisUrlError(
            f"{PASSWORD_FILE}: {path} must be one line of UTF-8 without control characters, the password of REDIS_URL's"
            " user"
        )
    return f"{scheme}://{user}:{quote(password, safe='')}@{host}{rest[end:]}"


def safe_url(url: str) -> str:
    """The URL as it may be printed: no user, no password, no query (which may hold one)."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss", "unix"):
            return "the given URL"
        if parts.scheme == "unix":
            return f"unix://{parts.path}"
        host = parts.hostname or "localhost"
        return (
            f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{f':{parts.port}' if parts.port else ''}"
            f"{parts.path}"
        )
    except ValueError:
        return "the given URL"


def checked_url(url: str) -> str:
    """`url` with the options that work. Raises `RedisUrlError`; redis-py's own error may quote the password."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError
    except ValueError:
        raise _no_url(url) from None
    if "sentinel" in parts.scheme or "cluster" in parts.scheme:
        raise RedisUrlError(
            "Redis URL: Tandem talks to one Redis, not through Sentinel or to a Cluster; give the URL of the primary:"
            " redis://[user:password@]host[:port][/db]"
        )
    cut_off = parts.fragment or "@" in parts.query  # what stood before it was a password's # or ?
    if parts.scheme not in ("redis", "rediss", "unix") or cut_off or not _names_a_database(parts):
        raise _no_url(url)
    if parts.scheme == "unix" and not parts.path:
        raise _no_url(url)
    options = dict(reversed(parse_qsl(parts.query, keep_blank_values=True)))  # the first counts, as in redis-py
    for name, value in options.items():
        _check_option(name, value, tls=parts.scheme == "rediss")
    kept = {name: value for name, value in options.items() if name not in OWN_CHOICE}
    return url.partition("?")[0] + (f"?{urlencode(kept)}" if kept else "")


def _names_a_database(parts: SplitResult) -> bool:
    """redis-py takes database 0 for a name it cannot read."""
    return parts.scheme == "unix" or bool(re.fullmatch(r"/?\d*/?", parts.path))


def _no_url(url: str) -> RedisUrlError:
    return RedisUrlError(
        f"not a Redis URL: {safe_url(url)}. Give redis://[user:password@]host[:port][/db], rediss://... or"
        " unix://[user:password@]/path, with special characters of the password percent-encoded"
    )


def _check_option(name: str, value: str, *, tls: bool) -> None:
    """Raises `RedisUrlError`, which names the option and never quotes its value."""
    shown = f"Redis URL: option {name}" if re.fullmatch(r"[a-z_]{1,40}", name) else "Redis URL: an option"
    if name == "timeout":
        raise RedisUrlError(f"{shown} is for connection pools; use socket_timeout (seconds)")
    if name.startswith("ssl"):
        if not tls:
            raise RedisUrlError(f"{shown} needs TLS: begin the URL with rediss://, or remove the option")
    elif name not in OPTIONS + OWN_CHOICE:
        raise RedisUrlError(f"{shown} is not known; remove it. Known: {', '.join(OPTIONS)}, ssl_... with rediss://")
    if name in _AMOUNTS and not _is_above_zero(value):
        raise RedisUrlError(f"{shown} must be a number of seconds above 0; correct or remove it")


def _is_above_zero(value: str) -> bool:
    try:
        return 0 < float(value) <= 1e6
    except ValueError:
        return False


def connect(url: str, make: Callable[..., Any]) -> Any:
    """A client for `url`, made by `make` (a `from_url` of redis-py); nothing is sent yet. Raises `RedisUrlError`."""
    options = {"socket_timeout": 4 * BLOCK_SECONDS, "socket_connect_timeout": 5, "decode_responses": False}
    options["max_connections"] = MOST_CONNECTIONS  # the URL's, where it has one
    url = checked_url(url)
    try:
        client = make(url, **options)
    except Exception:  # redis-py's errors on a URL may quote it
        raise _no_url(url) from None
    pool = client.connection_pool
    try:
        pool.connection_class(**pool.connection_kwargs)  # a first look at the values: it sends nothing
    except Exception as error:
        raise RedisUrlError(
            f"Redis URL: redis-py {redis.__version__} refuses the URL's options ({type(error).__name__}); correct or"
            " remove what follows the ?"
        ) from None
    return client


def block_ms(left: float | None, client: Any) -> int:
    """Milliseconds one blocking read may take; shorter than the connection's own timeout, which would cut it off."""
    socket_timeout = client.connection_pool.connection_kwargs.get("socket_timeout")
    longest = BLOCK_SECONDS if socket_timeout is None else min(BLOCK_SECONDS, socket_timeout / 2)
    return max(1, int(1000 * (longest if left is None else min(longest, left))))


def own_words(error: Exception) -> str:
    """What Redis said. redis-py puts the command in front of it, whose arguments may be a transcript."""
    return str(error).rpartition(" of pipeline caused error: ")[2]


@contextmanager
def redis_errors(where: str) -> Iterator[None]:
    """redis-py's errors as one sentence for a user. where: the URL as it may be printed."""
    try:
        yield
    except redis.exceptions.RedisError as error:
        error.args = (own_words(error),)  # it stays the cause, which a traceback shows
        raise QueueUnavailableError(_sentence(where, error)) from error


def _sentence(where: str, error: redis.exceptions.RedisError) -> str:
    known = redis.exceptions
    said = str(error)
    if isinstance(error, known.AuthenticationError):
        return f"Redis at {where} refused the user or password; check REDIS_URL ({said})"
    if isinstance(error, known.NoPermissionError):
        return (
            f"Redis at {where}: {said}; give the user the rules in producer.jobs.ACL (for feedback on recorded answers,"
            " those in producer.opinions.ACL too)"
        )
    if isinstance(error, known.BusyLoadingError):
        return f"Redis at {where} is still loading its data; try again when it has ({said})"
    if "Too many connections" in said:  # of the pool; redis-py 5 has no class for it
        return f"Redis at {where}: the URL's max_connections are all in use; raise it ({said})"
    if isinstance(error, known.ConnectionError | known.TimeoutError):
        return f"cannot reach Redis at {where} ({said}); start it, or set REDIS_URL"
    if isinstance(error, known.OutOfMemoryError) or "OOM command not allowed" in said:
        return f"Redis at {where} is full and queues nothing; raise its maxmemory, or delete what may go"
    if isinstance(error, known.ReadOnlyError) or "READONLY " in said:
        return f"Redis at {where} is a read-only replica and queues nothing; give the URL of its primary"
    if _is_cluster(error):
        return (
            f"Redis at {where} is part of a Redis Cluster, on which neither RQ nor Tandem runs; give the URL of a"
            " single Redis"
        )
    if "DB index is out of range" in said:
        return (
            f"Redis at {where} has no such database; give a lower one (one with only 0 may be part of a Redis"
            " Cluster, on which neither RQ nor Tandem runs)"
        )
    if "unknown command" in said:
        return (
            f"Redis at {where} does not know a command that every Redis has: it is a Sentinel or a proxy; give the URL"
            f" of the Redis itself ({said[:80]})"
        )
    return f"Redis at {where} answered with an error: {said}"


def _is_cluster(error: redis.exceptions.RedisError) -> bool:
    """MOVED, ASK, CROSSSLOT and CLUSTERDOWN have classes; a database other than 0 is refused in plain words."""
    known = redis.exceptions
    kinds = known.ClusterError | known.AskError | known.ClusterCrossSlotError | known.ClusterDownError
    words = ("MOVED ", "CROSSSLOT", "CLUSTERDOWN", "Hash slot not served", "not allowed in cluster mode")
    return isinstance(error, kinds) or any(word in str(error) for word in words)
