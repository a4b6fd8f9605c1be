"""What keeping completions adds to an answer's latency: pairs of requests to one server, of which one is not kept.

    python benchmarks/recording.py --model DIR --pairs 300 --tokens 1 --tokens 32 --out recording.json

Starts a Redis and `tandem serve --record`. The two requests of a pair are alike but for "store": false, follow each
other at once, in an order that changes; so both see the same machine. The difference is all that keeping takes of a
request: the tap, the task that writes to Redis, and with --logprobs the log-probabilities that the engine computes.
What the request that is not kept takes too, reading its body once, is measured by itself (`read_us`).
"""

import http.client
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import outputs

from worker.serving.vllm.feedback import requests
from worker.testing.redis_server import RedisServer
from worker.testing.server_process import ServerProcess
from worker.testing.tiny_model import make_tiny

PATH = "/v1/chat/completions"
WORDS = "The harbour opens at six and closes when the last boat is in. "


class Client:
    """One connection, kept open: what it costs to open one is not measured."""

    def __init__(self, server: ServerProcess, tokens: int, stream: bool) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=300)
        messages = [{"role": "system", "content": WORDS * 4}, {"role": "user", "content": "When does it open?"}]
        self.body = {"model": str(server.model_dir), "messages": messages, "max_tokens": tokens, "ignore_eos": True}
        self.body |= {"temperature": 0, "stream": stream}

    def seconds(self, kept: bool) -> float:
        """From the request's first byte to the answer's last."""
        body = json.dumps(self.body if kept else self.body | {"store": False})
        start = time.perf_counter()
        self._connection.request("POST", PATH, body, {"content-type": "application/json"})
        answer = self._connection.getresponse()
        answer.read()
        took = time.perf_counter() - start
        assert answer.status == 200 and (answer.getheader("X-Tandem-Completion") is not None) == kept
        return took


def measure(server: ServerProcess, tokens: int, stream: bool, pairs: int) -> dict[str, Any]:
    """Milliseconds: p50 of both, p50 and p90 of the differences within a pair."""
    client = Client(server, tokens, stream)
    for number in range(20):
        client.seconds(bool(number % 2))
    with_, without = [], []
    for number in range(pairs):
        for kept in (number % 2 == 0, number % 2 == 1):
            (with_ if kept else without).append(1000 * client.seconds(kept))
    added = sorted(one - other for one, other in zip(with_, without, strict=True))
    raw = json.dumps(client.body).encode()
    start = time.perf_counter()
    for _ in range(1000):
        assert requests.read("chat", raw)
    return {
        "tokens": tokens,
        "stream": stream,
        "pairs": pairs,
        "with_p50_ms": round(statistics.median(with_), 3),
        "without_p50_ms": round(statistics.median(without), 3),
        "added_p50_ms": round(statistics.median(added), 3),
        "added_p90_ms": round(added[int(0.9 * len(added))], 3),
        "read_us": round(1000 * (time.perf_counter() - start), 1),
    }


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), help="A model directory; by default a tiny Qwen3.5.")
@click.option("--pairs", type=click.IntRange(10), default=300, show_default=True)
@click.option("--tokens", type=click.IntRange(1), multiple=True, default=[1, 32], show_default=True)
@click.option("--logprobs", is_flag=True, help="With --record-logprobs.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the figures go, as JSON.")
@click.argument("vllm_options", nargs=-1)
def main(
    model: Path | None,
    pairs: int,
    tokens: tuple[int, ...],
    logprobs: bool,
    out: Path | None,
    vllm_options: tuple[str, ...],
) -> None:
    out = outputs.file(out) if out else None
    rows = []
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder) / "redis") as store:
        if model is None:
            model = Path(folder) / "tiny"
            make_tiny(model)
        extra = [
            "--record",
            "1",
            "--max-model-len",
            "2048",
            *(["--record-logprobs"] if logprobs else []),
            *vllm_options,
        ]
        with ServerProcess(model, Path(folder) / "run", extra=extra, env={"REDIS_URL": store.url}) as server:
            for count in tokens:
                for stream in (False, True):
                    rows.append(measure(server, count, stream, pairs))
                    print(json.dumps(rows[-1]), flush=True)
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n")
    if any(row["added_p50_ms"] >= 1 for row in rows):
        sys.exit("error: more than 1 ms were added at the median")


if __name__ == "__main__":
    main()
