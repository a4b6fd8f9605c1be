"""What a layer wishes of its attention reaches the kernel of packed rows, or is refused by name.

The kernel itself runs on a GPU alone: tests/gpu/test_model_gpu.py.
"""

import pytest
import torch

from worker.model.attention import REFUSED, AttentionError, refuse, window


def test_a_window_counts_the_token_itself() -> None:
    assert (window(None), window(1), window(512)) == ((-1, 0), (0, 0), (511, 0))


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_know_is_refused_by_name(name: str) -> None:
    layer = torch.nn.Linear(1, 1)
    refuse(layer, {name: None, "dropout": 0.0, "use_cache": False})
    with pytest.raises(AttentionError, match=f"Linear wants {name} of its attention"):
        refuse(layer, {name: 50.0})
