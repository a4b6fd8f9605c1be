"""The optimizer's step against the memory's speed and against its peers, on the shapes of Qwen3.5, on one GPU.

    python benchmarks/optimizer.py --json optimizer.json --plot optimizer.png

One run, everything interleaved: each round times a plain copy (the floor: 8 bytes a parameter, a bf16 gradient read
twice and a bf16 weight read and written), ours as a burst, as a captured graph and streamed, the factored rule
(`--optimizer factored`) likewise, torch's fused AdamW (bf16 state) and SGD, and apollo-torch where it can be imported.
Medians over the rounds; gradients are random, weights too. The factored rule reads matrices of more than 8,192 columns
a third time; its floor counts 8 bytes all the same.
Each timed step follows untimed ones of its kind.
Peers that do not fit beside the 27B model are timed on 16 of its 64 layers.
"""

import argparse
import json
import math
import statistics
import sys
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import outputs
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from optimizer_shapes import model_shapes

from worker.apollo import ApolloMini, state_bytes

FLOOR_BYTES = 8
"""A parameter: gradient read in each of two passes, weight read and written, bf16."""


def make_parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    """Random bf16 weights with random bf16 gradients."""
    generator = torch.Generator("cuda").manual_seed(0)
    parameters = []
    for shape in shapes:
        weight = torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        parameter = torch.nn.Parameter(weight)
        parameter.grad = torch.empty_like(weight).normal_(0, 1e-3, generator=generator)
        parameters.append(parameter)
    return parameters


def import_apollo_torch() -> type | None:
    """apollo-torch's optimizer, if it is there. It imports bitsandbytes for parts that this does not use."""
    if "bitsandbytes" not in sys.modules:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            for name in (
                "bitsandbytes",
                "bitsandbytes.functional",
                "bitsandbytes.optim",
                "bitsandbytes.optim.optimizer",
            ):
                sys.modules[name] = types.ModuleType(name)
            sys.modules["bitsandbytes"].functional = sys.modules["bitsandbytes.functional"]  # type: ignore[attr-defined]
            sys.modules["bitsandbytes.optim.optimizer"].Optimizer2State = object  # type: ignore[attr-defined]
    try:
        from apollo_torch import APOLLOAdamW
    except ImportError as error:
        print(f"apollo-torch is left out: {error}")
        return None
    return APOLLOAdamW  # type: ignore[no-any-return]


def streamed(optimizer: ApolloMini, parameters: list[torch.nn.Parameter], bucket_bytes: int) -> Callable[[], None]:
    """What the hooks of `ApolloMini.streaming` do, without a backward pass in between."""

    def step() -> None:
        optimizer.begin()
        bucket: list[tuple[torch.Tensor, torch.Tensor]] = []
        for parameter in reversed(parameters):
            assert parameter.grad is not None
            bucket.append((parameter, parameter.grad))
            if sum(gradient.nbytes for _, gradient in bucket) >= bucket_bytes:
                optimizer.update_many(bucket)
                bucket.clear()
        optimizer.update_many(bucket)
        optimizer.finish()

    return step


def contestants(parameters: list[torch.nn.Parameter], peers: bool) -> dict[str, Callable[[], object]]:
    """Name -> one step. All work on the same weights and gradients: only the time matters."""
    ours = ApolloMini(parameters, lr=1e-6)
    ours.step()
    steps: dict[str, Callable[[], object]] = {
        "ours, burst": ours.step,
        "ours, graph": ours.capture(),
        "ours, streaming": streamed(ours, parameters, 1 << 28),
        "ours, one by one": streamed(ours, parameters, 0),
    }
    factored = ApolloMini(parameters, lr=1e-6, matrices="factored")
    factored.step()
    steps |= {
        "factored, burst": factored.step,
        "factored, graph": factored.capture(),
        "factored, streaming": streamed(factored, parameters, 1 << 28),
    }
    if not peers:
        return steps
    steps["torch AdamW fused"] = torch.optim.AdamW(parameters, lr=1e-6, fused=True).step
    steps["torch SGD fused"] = torch.optim.SGD(parameters, lr=1e-6, fused=True).step
    official = import_apollo_torch()
    if official is not None:
        low_rank = {"rank": 1, "proj": "random", "scale_type": "tensor", "scale": 128, "update_proj_gap": 200}
        matrices = [p for p in parameters if p.dim() == 2]
        others = [p for p in parameters if p.dim() != 2]
        groups = [{"params": others}, {"params": matrices, "proj_type": "std", **low_rank}]
        steps["apollo-torch"] = official(groups, lr=1e-6).step
    return steps


def time_ms(step: Callable[[], object]) -> float:
    """The device's time for one step that follows another without a gap, as in use it follows a backward pass.

    Without the untimed step before it, the clocks would still be those of the previous contestant, and of a chip that
    waited for its host.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    for _ in range(2):
        step()
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@dataclass
class Row:
    """`bytes_equivalent`: what the time would move at the copy's bandwidth. `of_copy`: the floor over the time."""

    name: str
    ms: float
    spread_ms: float
    bytes_equivalent: float
    of_copy: float
    times_ours: float


def measure(name: str, rounds: int, copy_bytes: int) -> dict[str, object]:
    shapes = model_shapes(name)
    parameters = make_parameters(shapes)
    count = sum(math.prod(shape) for shape in shapes)
    source = torch.empty(copy_bytes // 2, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    steps: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    steps |= contestants(parameters, peers=name != "27B")
    times: dict[str, list[float]] = {key: [] for key in steps}
    for round_ in range(rounds + 2):
        for key, step in steps.items():
            ms = time_ms(step)
            if round_ >= 2:  # two to warm up
                times[key].append(ms)
    medians = {key: statistics.median(values) for key, values in times.items()}
    bandwidth = 2 * copy_bytes / medians["copy"]  # bytes a millisecond
    floor = FLOOR_BYTES * count / bandwidth
    rows = []
    for key, ms in medians.items():
        if key == "copy":
            continue
        spread = max(times[key]) - min(times[key])
        rows.append(Row(key, ms, spread, ms * bandwidth / count, floor / ms, ms / medians["ours, burst"]))
    return {
        "model": name,
        "parameters": count,
        "tensors": len(shapes),
        "copy_tb_s": bandwidth / 1e9,
        "floor_ms": floor,
        "state_bytes": state_bytes(shapes),
        "factored_state_bytes": state_bytes(shapes, matrices="factored"),
        "adamw_fp32_state_bytes": 8 * count,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "rows": [asdict(row) for row in rows],
    }


def show(result: dict) -> None:
    print(
        f"\n{result['model']}: {result['parameters'] / 1e9:.3f}B parameters in {result['tensors']} tensors; copy "
        f"{result['copy_tb_s']:.2f} TB/s; floor at {FLOOR_BYTES} B {result['floor_ms']:.2f} ms; state "
        f"{result['state_bytes'] / 1e6:.1f} MB, factored {result['factored_state_bytes'] / 1e6:.1f} MB "
        f"(AdamW fp32: {result['adamw_fp32_state_bytes'] / 1e9:.1f} GB)"
    )
    print(f"{'':20}{'ms':>9}{'spread':>9}{'x floor':>9}{'B/param':>9}{'of copy':>9}{'x ours':>8}")
    for row in result["rows"]:
        print(
            f"{row['name']:20}{row['ms']:9.2f}{row['spread_ms']:9.2f}{1 / row['of_copy']:9.3f}"
            f"{row['bytes_equivalent']:9.2f}{row['of_copy']:9.1%}{row['times_ours']:8.2f}"
        )


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3.6 * len(results), 3.6), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        names = [row["name"] for row in result["rows"]]
        values = [1 / row["of_copy"] for row in result["rows"]]
        colours = ["#1b6ca8" if name.startswith(("ours", "factored")) else "#b8b8b8" for name in names]
        axis.barh(names[::-1], values[::-1], color=colours[::-1])
        axis.set_xscale("log")
        axis.set_xlim(0.5, 300)
        axis.set_xticks([1, 10, 100], ["1", "10", "100"])
        for place, value in enumerate(values[::-1]):
            axis.text(value * 1.05, place, f"{value:.2f}", va="center", fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{result['model']} (floor {result['floor_ms']:.1f} ms)", fontsize=9)
        axis.set_xlabel("time / floor of 8 bytes a parameter", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["0.8B", "4B", "27B layers", "27B"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--copy-gib", type=float, default=4.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    for path in filter(None, (options.json, options.plot)):
        outputs.file(path)
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs an NVIDIA GPU")
    import triton

    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/optimizer.py " + " ".join(sys.argv[1:]),
    }
    print(about)
    results = []
    for name in options.models:
        torch.cuda.reset_peak_memory_stats()
        results.append(measure(name, options.rounds, int(options.copy_gib * 2**30)))
        torch.cuda.empty_cache()
        show(results[-1])
    if options.json:
        options.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
