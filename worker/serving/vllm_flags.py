"""vLLM's command line, its flags named as vLLM's own parser names them, and the error that refuses one.

Must not know: vLLM, torch.
"""

from collections.abc import Sequence

from producer.errors import TandemError

SHORT = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size",
         "-q": "--quantization", "-n": "--nnodes", "-asc": "--api-server-count",
         "-sc": "--speculative-config"}  # fmt: skip
KV_FLAGS = ("--gpu-memory-utilization", "--device-memory-utilization", "--kv-cache-memory-bytes", "--kv-cache-memory")
"""Each says how much memory vLLM takes."""


class LaunchError(TandemError):
    """The server cannot be started like this."""


def parse_flags(options: Sequence[str]) -> dict[str, list[str]]:
    """Flag -> its values, as vLLM's parser would name them: --a_b=1 and --a-b 1 are alike, short forms spelt out."""
    flags: dict[str, list[str]] = {}
    current: list[str] | None = None
    for option in options:
        if option.startswith("-") and not _is_number(option):
            name, equals, value = option.partition("=")
            name = SHORT.get(name, name.replace("_", "-") if name.startswith("--") else name)
            current = flags.setdefault(name, [])
            if equals:
                current.append(value)
        elif current is not None:
            current.append(option)
    return flags


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
