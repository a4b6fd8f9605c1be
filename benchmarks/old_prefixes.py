"""Whether a request may read a prefix that was cached under older weights: a prompt that was cached before a version,
asked again after it, beside prompts that nobody has sent. A part of serving.py.

Must not know: loads, time.
"""

import re

from record import NOT_CHECKED, Part
from rig import Rig, RigError, metric, metrics
from serving_loads import Load
from transcript_clock import TranscriptClock

from worker.data.examples import ExampleBuilder

PREFIX_HITS = "vllm:prefix_cache_hits_total"
"""Tokens."""


def block_of(url: str) -> int:
    """Tokens of a block of the server's prefix cache."""
    found = re.search(r'^vllm:cache_config_info{.*?\bblock_size="(\d+)"', "\n".join(metrics(url)), re.MULTILINE)
    if found is None:
        raise RigError(f"{url}/metrics has no vllm:cache_config_info with a block_size")
    return int(found[1])


def check(rig: Rig, builder: ExampleBuilder, length: int, lengths: tuple[int, int], part: Part) -> None:
    """A prompt of `length` tokens, asked three times, then after a version of a transcript of `lengths`."""
    if length <= (block := block_of(rig.url)):
        part[NOT_CHECKED] = f"a prompt of {length} tokens ends within the cache's first block, of {block}"
        return
    prompt = next(Load("old prefixes", 1, (length,)).prompts(0, 900))

    def ask(salt: str | None = None) -> tuple[float, dict[str, float]]:
        """(cached tokens, log-probabilities of the likeliest next tokens)."""
        before = metric(rig.url, PREFIX_HITS)
        # More than one token, so that vLLM has counted the hits when the answer ends.
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 5}
        body |= {"cache_salt": salt} if salt else {}
        status, answer = rig.post("/v1/completions", body)
        if status != 200:
            raise RigError(f"status {status}: {answer}")
        return metric(rig.url, PREFIX_HITS) - before, answer["choices"][0]["logprobs"]["top_logprobs"][0]

    def distance(one: dict[str, float], other: dict[str, float]) -> float:
        both = one.keys() & other.keys()
        return max((abs(one[token] - other[token]) for token in both), default=float("inf"))

    for _ in range(2):  # vLLM caches a delta net's state after a prompt's first block only when it is asked again
        ask()
    part["cached before"], old = ask()
    with TranscriptClock(rig, builder, 3600.0, lengths):
        pass  # one transcript, waited for
    part["cached after"], again = ask()
    fresh = [ask(f"nobody-{number}")[1] for number in range(3)]
    part["from fresh ones"] = max(distance(again, one) for one in fresh)
    part["between fresh ones"] = max(distance(one, other) for one in fresh for other in fresh)
    part["from before"] = distance(again, old)
    part.check("the prompt was cached before the version", part.figures["cached before"] > 0)
    part.check("nothing of it was read after the version", part.figures["cached after"] == 0)
    part.check("it is answered like a fresh one", part.figures["from fresh ones"] <= part.figures["between fresh ones"])
