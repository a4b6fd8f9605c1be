"""What the tests of kept completions and of /v1/feedback share: requests over HTTP, and what Redis keeps of them."""

import http.client
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import redis
from patience import PATIENCE, until
from server_options import FEEDBACK_KEY

from producer.completions import Completion, load
from producer.errors import UnknownCompletionError

CONVERSATION = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who are you?"}]


@dataclass
class Answer:
    """status, headers in lower case, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def keys(self) -> list[str]:
        """Of the completions that are kept; none without the header."""
        shown = self.headers.get("x-tandem-completion")
        return shown.split(", ") if shown else []

    @property
    def events(self) -> list[Any]:
        """The JSON of a stream's events."""
        return [json.loads(line[6:]) for line in self.body.decode().splitlines() if line.startswith("data: {")]


def ask(url: str, path: str, body: dict[str, Any] | bytes | None, method: str = "POST", **headers: str) -> Answer:
    """One HTTP request."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    try:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        shown = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, {"content-type": "application/json"} | shown)
        answer = connection.getresponse()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def feedback(url: str, body: dict[str, Any] | bytes, key: str = FEEDBACK_KEY, **headers: str) -> Answer:
    """POST /v1/feedback."""
    return ask(url, "/v1/feedback", body, authorization=f"Bearer {key}", **headers)


def state(url: str, job_id: str, key: str = FEEDBACK_KEY) -> Answer:
    """GET /v1/feedback/{id}."""
    return ask(url, f"/v1/feedback/{job_id}", None, method="GET", authorization=f"Bearer {key}")


def record(client: redis.Redis, key: str) -> Completion:
    """What is kept under `key`, once it is."""
    found: list[Completion] = []

    def there() -> bool:
        try:
            found.append(load(client, key))
        except UnknownCompletionError:
            return False
        return True

    until(there, f"no completion is kept under {key}")
    return found[-1]
