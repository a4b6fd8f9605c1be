"""Test program: builds real vLLM models as its CPU worker does, exports each with the real engine, then obeys stdin.

usage: python weights_owner.py MODEL_DIR RUN_DIR [MODEL_DIR RUN_DIR ...]

Answers one JSON line per request, until EOF: {"check": i} -> what exporting changed; {"read": [i, param]} -> crc of
its bytes; {"fill": [i, param, value]}; {"config": {EngineArgs}, "set": {dotted: value}} -> what the refusal says;
{"transfer": i} -> what vLLM's own ways of sending weights are told.
"""

import json
import os
import sys
import tempfile
import zlib
from typing import Any

os.environ |= {"VLLM_PLUGINS": "tandem", "TANDEM_SERVE": "1"}  # vLLM inspects models in a process of its own
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from worker.utils import torch_setup

torch_setup.prepare()
import torch  # noqa: E402
import vllm.v1.worker.cpu.shm  # noqa: E402, F401  (what the CPU worker imports first)
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.model_loader import get_model  # noqa: E402

from producer.errors import TandemError  # noqa: E402
from worker.serving.vllm import cpu_backend  # noqa: E402
from worker.serving.vllm.unsupported_flags import RefusedFlagError, refuse_unshareable  # noqa: E402
from worker.serving.vllm.weight_engine import TandemWeightEngine  # noqa: E402


def make_config(model: str, **options: Any) -> Any:
    options = {"dtype": "bfloat16", "max_model_len": 256, "max_num_seqs": 2, "enforce_eager": True} | options
    return EngineArgs(model=model, **options).create_engine_config()


def export(model_dir: str, run_dir: str) -> tuple[Any, dict[str, Any]]:
    """The engine on a freshly loaded model, and a report of what exporting it changed."""
    config = make_config(model_dir)
    os.environ["TANDEM_RUN_DIR"] = run_dir
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, "file://" + tempfile.mktemp(), 0, "gloo")
            initialize_model_parallel(1, 1)
        model = get_model(vllm_config=config)
        before = {n: (id(p), p.stride(), p.dtype, p.detach().clone()) for n, p in model.named_parameters()}
        engine = TandemWeightEngine(None, config, torch.device("cpu"), model)
    report = {"parameters": len(before), "changed": [], "model_class": type(model).__name__}
    for name, parameter in model.named_parameters():
        identity, stride, dtype, values = before[name]
        same = torch.equal(values.view(torch.uint8), parameter.detach().view(torch.uint8))
        if not (same and id(parameter) == identity and parameter.stride() == stride and parameter.dtype == dtype):
            report["changed"].append(name)
        if parameter.data_ptr() % 64:
            report["changed"].append(f"{name} is not aligned")
    report["aliases"] = len({p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False)})
    return engine, report


def refusals_to_receive(engine: TandemWeightEngine) -> list[str]:
    """What each of vLLM's own ways of sending weights to a server is told."""
    ways = [
        lambda: engine.parse_init_info({}),
        lambda: engine.init_transfer_engine(None),
        engine.start_weight_update,
        lambda: engine.update_weights({}),
        lambda: engine.receive_weights(None),
        engine.finish_weight_update,
    ]
    said = []
    for way in ways:
        try:
            said.append(f"accepted: {way()}")
        except TandemError as error:
            said.append(str(error))
    return said


def answer(request: dict[str, Any], exported: list[tuple[Any, dict[str, Any]]]) -> Any:
    if "check" in request:
        return exported[request["check"]][1]
    if "read" in request:
        index, name = request["read"]
        parameter = exported[index][0].model.get_parameter(name)
        return zlib.crc32(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    if "fill" in request:
        index, name, value = request["fill"]
        with torch.no_grad():
            exported[index][0].model.get_parameter(name).fill_(value)
        return True
    if "transfer" in request:
        return refusals_to_receive(exported[request["transfer"]][0])
    config = make_config(**request["config"])
    for path, value in request.get("set", {}).items():
        owner = config
        *parents, last = path.split(".")
        for part in parents:
            owner = getattr(owner, part)
        object.__setattr__(owner, last, value)
    try:
        refuse_unshareable(config, request.get("device", "cpu"), request.get("environment", {}))
    except RefusedFlagError as error:
        return str(error)
    return None


def main() -> None:
    torch.set_num_threads(1)
    cpu_backend.apply()
    arguments = sys.argv[1:]
    exported = [export(model, run_dir) for model, run_dir in zip(arguments[::2], arguments[1::2], strict=True)]
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), exported)), flush=True)


if __name__ == "__main__":
    main()
