"""What a peer's weight synchronisation takes: vLLM's own NCCL engine, from a trainer on one GPU to a server on another.

    python benchmarks/weight_sync.py --size Llama-3.1-8B --out results        # two GPUs of one host

vLLM without Tandem, random weights. This process has a second copy of them on the first GPU, as a trainer has, and
sends it whole, as vLLM documents it: pause (requests are kept), start, one packed broadcast, finish, resume. Tandem
sends nothing; its pause is in RESULTS. What is checked: the same weights, sent again, are served alike, others are not.

Must not know: Tandem's worker.
"""

import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import outputs
from record import OutOfTime, Part, Record, Until
from rig import CLOSING, Rig, server_options
from shapes import OTHERS, write_shape

from worker.shared_weights import bind
from worker.testing.server_process import free_port
from worker.utils import torch_setup


def call(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """POST; the answer's JSON."""
    request = urllib.request.Request(url + path, json.dumps(body or {}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=200) as answer:
        return json.load(answer)


def draw(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights of `model`'s shapes on this process's GPU: N(0, .02), norms of one."""
    generator = torch.Generator("cuda").manual_seed(seed)
    drawn = {}
    for name, parameter in model.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
        drawn[name] = tensor.fill_(1.0) if tensor.dim() == 1 else tensor.normal_(0, 0.02, generator=generator)
    return drawn


def logprob(rig: Rig) -> float:
    """Of one fixed prompt's last token, as the server sees it."""
    status, answer = rig.post("/v1/completions", {"prompt": list(range(5, 37)), "max_tokens": 1, "prompt_logprobs": 0})
    assert status == 200, answer
    return float(next(iter(answer["choices"][0]["prompt_logprobs"][-1].values()))["logprob"])


def synchronise(rig: Rig, group: Any, weights: dict[str, torch.Tensor], pool: ThreadPoolExecutor) -> dict[str, float]:
    """Send all weights; seconds of each part, and of all that the server stands still."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    told = {
        "names": list(weights),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()],
        "shapes": [list(tensor.shape) for tensor in weights.values()],
        "packed": True,
    }
    times = [time.monotonic()]
    call(rig.url, "/pause?mode=keep")
    times.append(time.monotonic())
    call(rig.url, "/start_weight_update")
    times.append(time.monotonic())
    received = pool.submit(call, rig.url, "/update_weights", {"update_info": told})
    NCCLWeightTransferEngine.trainer_send_weights(iter(weights.items()), {"group": group, "packed": True})
    torch.cuda.synchronize()
    received.result()
    times.append(time.monotonic())
    call(rig.url, "/finish_weight_update")
    times.append(time.monotonic())
    call(rig.url, "/resume")
    times.append(time.monotonic())
    names = ("pause_s", "start_s", "send_s", "finish_s", "resume_s")
    parts = {name: times[n + 1] - times[n] for n, name in enumerate(names)}
    return parts | {"stands_still_s": times[4] - times[1]}


def measure(rig: Rig, part: Part, model: torch.nn.Module, rounds: int) -> None:
    """`rounds` synchronisations of weights drawn anew."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    told = {"master_address": "127.0.0.1", "master_port": free_port(), "rank_offset": 1, "world_size": 2}
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(call, rig.url, "/init_weight_transfer_engine", {"init_info": told})
        group = NCCLWeightTransferEngine.trainer_init(told)
        joined.result()
        rows, seen = [], [logprob(rig)]
        for seed in range(rounds + 1):  # the first is not timed
            weights = draw(model, seed % 2)
            row = synchronise(rig, group, weights, pool)
            seen.append(logprob(rig))
            rows += [row] if seed else []
            part.keep("bytes", sum(tensor.nbytes for tensor in weights.values()))
            part.keep("rows", rows)  # the time may be over before all are there
            part.keep("log-probabilities", seen)
            del weights
    part["rows"], part["log-probabilities"] = rows, seen
    part["median"] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    part["GB/s"] = part.figures["bytes"] / 1e9 / part.figures["median"]["send_s"]
    part.check("the server has what was sent", seen[1] == seen[3] != seen[2])


@click.command()
@click.option("--size", type=click.Choice(OTHERS), default="Llama-3.1-8B", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), help="Folder of the results.")
@click.option("--until", "seconds", type=float, default=300.0, show_default=True, help="Seconds for all of it.")
@click.option("--rounds", type=click.IntRange(2), default=5, show_default=True)
@click.option("--server-option", multiple=True, help="More of vLLM's, one word each.")
def main(size: str, out: Path, seconds: float, rounds: int, server_option: tuple[str, ...]) -> None:
    """Exit code 1 if the server had other weights than were sent."""
    if torch.cuda.device_count() < 2:
        raise click.ClickException(f"two GPUs are needed, and {torch.cuda.device_count()} are visible")
    outputs.folder(out)
    until = Until(max(1.0, seconds - CLOSING))
    torch_setup.prepare()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # its weight transfer is served in that mode alone
    record = Record(out / f"weight_sync_{size}.json")
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:
        rig = Rig(Path(folder), write_shape(size, Path(folder) / "model"), card=1)
        try:
            backend = ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
            options = server_options(2048, None, [*backend, "--enforce-eager", *server_option], qwen=False)
            rig.start_server(options, until.left, plain=True)
            model = bind.on_meta(rig.model)
            record.part("vLLM's NCCL engine", lambda part: measure(rig, part, model, rounds))
        except OutOfTime:
            print("the time is over: what is missing was not run", flush=True)
        finally:
            until.disarm()
            if rig.server is not None:
                print(rig.server.tail(), file=sys.stderr)
            rig.close()
    record.summary()
    sys.exit(0 if record.parts and all(part.get("ok") for part in record.parts.values()) else 1)


if __name__ == "__main__":
    main()
