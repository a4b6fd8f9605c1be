"""What a server that runs says of itself, and to a second one."""

import json

import pytest
from server_options import MULTI_MODAL
from stand_in import LAYOUT

from worker.shared_weights.weights_client import ask
from worker.testing.server_process import ServerFailedError, ServerProcess

pytestmark = pytest.mark.server


@pytest.mark.skipif(MULTI_MODAL, reason="the stand-in's checkpoint is of text alone, which this vLLM does not serve")
def test_the_stand_in_has_the_layout_of_a_real_server(server: ServerProcess) -> None:
    described, _ = ask(server.run_dir, "describe", 60)
    layout = json.loads(LAYOUT.read_text())
    shapes = {n: {"shape": p["shape"], "dtype": p["dtype"]} for n, p in described["parameters"].items()}
    assert shapes == layout["parameters"]
    for name in ("slices", "padding", "frozen", "model_class"):
        assert described[name] == layout[name], name


def test_a_second_server_is_refused_by_the_first_ones_name(server: ServerProcess) -> None:
    with pytest.raises(
        ServerFailedError, match=rf"exit code 1(?s:.*)in use by process {server.pid} serving"
    ) as failure:
        ServerProcess(server.model_dir, server.run_dir)
    assert "Application startup complete" not in str(failure.value)  # the log is shared, the report is of its own part
    assert server.alive()
