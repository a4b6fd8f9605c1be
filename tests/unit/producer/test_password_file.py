"""The password of Redis from a file: only into a URL of the environment that has none."""

from pathlib import Path
from urllib.parse import unquote

import pytest
from redis.connection import parse_url

from producer import Producer
from producer.connection import checked_url, resolve_url
from producer.errors import RedisUrlError

PASSWORD = "p:/@?# w\u00e4%41"


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "secret"
    path.write_text(PASSWORD + "\n", encoding="utf-8")
    monkeypatch.setenv("REDIS_PASSWORD_FILE", str(path))
    return path


@pytest.mark.parametrize(
    ("url", "user"),
    [
        ("redis://h:6379/0", None),
        ("redis://h", None),
        ("redis://h?protocol=3", None),
        ("redis://worker@h:6379/0", "worker"),
        ("rediss://worker@[::1]:6380/2?protocol=3", "worker"),
        ("unix:///run/redis.sock?db=1", None),
        ("unix://worker@/run/redis.sock", "worker"),
    ],
)
def test_the_password_of_the_file_goes_into_the_url(
    secret: Path, monkeypatch: pytest.MonkeyPatch, url: str, user: str | None
) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    made = checked_url(resolve_url(None))
    parts, plain = (dict(parse_url(one)) for one in (made, url))
    assert parts.pop("password") == PASSWORD and parts.pop("username", None) in (user, "")
    plain.pop("username", None)
    assert parts == plain, "nothing else of it is another"


@pytest.mark.parametrize("url", ["redis://:own@h:6379/0", "redis://worker:own@h/0", "unix://:own@/run/redis.sock"])
def test_a_url_with_a_password_keeps_it(secret: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    assert resolve_url(None) == url


def test_a_url_that_was_given_gets_none(secret: Path) -> None:
    """It may be of another Redis, which must not learn the password of ours."""
    assert resolve_url("redis://elsewhere:6379/0") == "redis://elsewhere:6379/0"


def test_without_a_url_it_is_for_the_redis_on_this_machine(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    url = resolve_url(None)
    assert url.endswith("@127.0.0.1:6379/0") and PASSWORD in unquote(url)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_what_an_editor_adds_is_none_of_it(
    secret: Path, monkeypatch: pytest.MonkeyPatch, mark: bytes, end: bytes
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://h:6379/0")
    secret.write_bytes(mark + b"pass word" + end)
    assert parse_url(resolve_url(None))["password"] == "pass word"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"a\nb\n",
        b"\xff\xfe",
        b"a\rb",
        b"\xef\xbb\xbf\r\n",
        *("pw\r\n".encode(f"utf-16{e}") for e in ("", "-le")),
    ],
)
def test_a_file_that_is_no_password_is_named(secret: Path, content: bytes) -> None:
    secret.write_bytes(content)
    with pytest.raises(RedisUrlError, match=r"REDIS_PASSWORD_FILE: .*secret"):
        resolve_url(None)


def test_a_file_that_is_missing_is_named(secret: Path) -> None:
    secret.unlink()
    with pytest.raises(RedisUrlError, match=r"secret cannot be read as text \(FileNotFoundError\)"):
        Producer()


def test_a_password_in_the_query_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the file")
    monkeypatch.setenv("REDIS_PASSWORD_FILE", str(tmp_path / "secret"))
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1/0?db=1&password=own")
    assert resolve_url(None) == "redis://127.0.0.1/0?db=1&password=own"
