"""The sweep on a CPU: compiled against torch's, and against the memory's speed, on the shapes of SmolLM2-135M.

    python benchmarks/cpu_sweep.py --threads 2 --json cpu_sweep.json

One run, interleaved: each round times a plain copy (the floor: 8 bytes a parameter, a bf16 gradient read twice and a
bf16 weight read and written), a step whose weights torch writes, and one whose weights compiled code writes. Medians
over the rounds, of the clock's time and of the process's CPU time: on a machine with other work, CPU time is nearer to
what the step would take alone. Both optimizers get the same gradients and begin with the same weights; in the end their
weights and states must have the same bits. What starting costs is timed in processes of their own, without kept code
and with it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import outputs
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from worker.apollo import ApolloMini, cpu

FLOOR_BYTES = 8
"""A parameter: gradient read in each of two passes, weight read and written, bf16."""
WARM = 2
"""Rounds that are not counted."""
LOAD = """
import time, torch
from worker.apollo import compiled_write
started = time.monotonic()
compiled_write.load()
print(time.monotonic() - started)
"""


def shapes() -> list[tuple[int, ...]]:
    """SmolLM2-135M: Llama, 30 layers, 9 heads of 64 (3 for keys and values), tied head."""
    hidden, inner, keys = 576, 1536, 192
    layer: list[tuple[int, ...]] = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    return [(49152, hidden), *layer * 30, (hidden,)]


def make_optimizer(compiled: bool, matrices: str) -> ApolloMini:
    cpu.COMPILED_FROM = 0 if compiled else 1 << 62
    generator = torch.Generator().manual_seed(0)
    weights = [(torch.randn(shape, generator=generator) * 0.02).bfloat16() for shape in shapes()]
    return ApolloMini([torch.nn.Parameter(weight) for weight in weights], lr=1e-4, matrices=matrices)


Took = tuple[float, float]
"""Seconds by the clock, and of the CPU."""


def seconds(work: Callable[[], object]) -> Took:
    started = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def start_seconds() -> dict[str, float]:
    """Of `load` in a new process: without kept code, and with it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder}
        command = [sys.executable, "-c", LOAD]
        root = Path(__file__).resolve().parent.parent
        first, second = (
            float(subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True, text=True).stdout)
            for _ in range(2)
        )
    return {"compiling": first, "reading": second}


def measure(rounds: int, matrices: str) -> dict[str, object]:
    optimizers = {"torch": make_optimizer(False, matrices), "compiled": make_optimizer(True, matrices)}
    generator = torch.Generator().manual_seed(1)
    gradients = [(torch.randn(shape, generator=generator) * 1e-3).bfloat16() for shape in shapes()]
    count = sum(gradient.numel() for gradient in gradients)
    source = torch.ones(1 << 28, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times: dict[str, list[Took]] = {"copy": [], "torch": [], "compiled": []}
    for _ in range(WARM + rounds):
        times["copy"].append(seconds(lambda: target.copy_(source)))
        for name, optimizer in optimizers.items():
            times[name].append(seconds(lambda: optimizer.step(grads=gradients)))  # noqa: B023
    clocks: dict[str, dict[str, float]] = {}
    for i, clock in enumerate(("wall", "cpu")):
        counted = {name: [took[i] for took in values[WARM:]] for name, values in times.items()}
        copy, torchs, compiled = (statistics.median(values) for values in counted.values())
        floor = copy * FLOOR_BYTES * count / (2 * source.nbytes)
        clocks[clock] = {
            "copy_gb_s": 2 * source.nbytes / copy / 1e9,
            "floor_s": floor,
            "torch_s": torchs,
            "compiled_s": compiled,
            "compiled_fastest_s": min(counted["compiled"]),
            "torch_over_compiled": statistics.median(
                a / b for a, b in zip(counted["torch"], counted["compiled"], strict=True)
            ),
            "torch_over_floor": torchs / floor,
            "compiled_over_floor": compiled / floor,
        }
    one, two = optimizers.values()
    same = torch.equal(one.area.memory, two.area.memory) and all(
        torch.equal(a.view(torch.int16), b.view(torch.int16))
        for a, b in zip(one.param_groups[0]["params"], two.param_groups[0]["params"], strict=True)
    )
    return {"parameters": count, "same_bits": same, **clocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--matrices", choices=["apollo", "factored"], default="apollo", help="what matrices take")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.json:
        outputs.file(options.json)
    about = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/cpu_sweep.py " + " ".join(sys.argv[1:]),
    }
    results = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        results[f"{threads} threads"] = measure(options.rounds, options.matrices)
    everything = {"about": about | {"load_after": os.getloadavg()[0]}, "start": start_seconds(), "results": results}
    text = json.dumps(everything, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    if not all(result["same_bits"] for result in results.values()):
        sys.exit("error: the two sweeps gave different weights or states")


if __name__ == "__main__":
    main()
