"""The mapping is found by watching a loader, and every loader it would misread is refused by the parameter's name."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from worker.serving.vllm.load_recorder import MappingError
from worker.serving.vllm.tensor_mapping import Padding, derive
from worker.shared_weights.slices import Slice
from worker.shared_weights.tensor_names import Source

Weights = Iterable[tuple[str, torch.Tensor]]
Loader = Callable[["Merged", dict[str, torch.Tensor]], None]

SOURCES = [
    Source("model.up.weight", "model.language_model.up.weight", (6, 4)),
    Source("model.gate.weight", "model.language_model.gate.weight", (6, 4)),
    Source("model.embed.weight", "model.language_model.embed.weight", (5, 4)),
    Source("model.A_log", "model.language_model.A_log", (3,)),
]


class Merged(nn.Module):
    """A model that merges as vLLM's do: gate | up in one parameter, a padded embedding, an fp32 parameter."""

    def __init__(self, load: Loader, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(12, 4, dtype=dtype))
        self.embed = nn.Parameter(torch.randn(8, 4, dtype=dtype))
        self.A_log = nn.Parameter(torch.randn(3))
        self._load = load

    def load_weights(self, weights: Weights) -> None:
        self._load(self, {name.rpartition("language_model.")[2]: tensor for name, tensor in weights})


def faithful(model: Merged, weights: dict[str, torch.Tensor]) -> None:
    model.gate_up.data[:6].copy_(weights["gate.weight"])
    model.gate_up.data.narrow(0, 6, 6).copy_(weights["up.weight"])
    model.embed[:5].data.copy_(weights["embed.weight"])
    model.embed[5:].data.fill_(0)
    model.A_log.data.copy_(weights["A_log"])


def test_slices_padding_and_values() -> None:
    model = Merged(faithful)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mapping = derive(model, SOURCES)
    assert mapping.slices == (
        Slice("model.A_log", "model.language_model.A_log", "A_log", 0, 3, (3,), "float32"),
        Slice("model.embed.weight", "model.language_model.embed.weight", "embed", 0, 5, (5, 4), "bfloat16"),
        Slice("model.gate.weight", "model.language_model.gate.weight", "gate_up", 0, 6, (6, 4), "bfloat16"),
        Slice("model.up.weight", "model.language_model.up.weight", "gate_up", 6, 6, (6, 4), "bfloat16"),
    )
    assert mapping.padding == (Padding("embed", 5, 3),) and mapping.frozen == ()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert mapping.slices[3].of(model.gate_up).data_ptr() == model.gate_up[6:].data_ptr()


def with_line(line: Callable[[Merged, dict[str, torch.Tensor]], object]) -> Loader:
    """The faithful loader, but `line` loads `up`."""

    def load(model: Merged, weights: dict[str, torch.Tensor]) -> None:
        model.gate_up.data[:6].copy_(weights["gate.weight"])
        line(model, weights)
        model.embed[:5].data.copy_(weights["embed.weight"])
        model.embed[5:].data.fill_(0)
        model.A_log.data.copy_(weights["A_log"])

    return load


def test_a_tensor_copied_in_pieces_is_one_slice() -> None:
    def in_pieces(model: Merged, weights: dict[str, torch.Tensor]) -> None:
        for start, end in ((4, 6), (0, 1), (1, 4)):  # in any order
            model.gate_up.data[6 + start : 6 + end] = weights["up.weight"][start:end]

    assert derive(Merged(with_line(in_pieces)), SOURCES) == derive(Merged(faithful), SOURCES)


REFUSED: dict[str, tuple[Callable[[Merged, dict[str, torch.Tensor]], object], str]] = {
    "computed value": (lambda m, w: m.gate_up.data[6:].copy_(-w["up.weight"].exp()), "gate_up.*computed"),
    "cast before copying": (lambda m, w: m.gate_up.data[6:].copy_(w["up.weight"].float()), "gate_up.*computed"),
    "interleaved": (lambda m, w: m.gate_up.data[6:].copy_(w["up.weight"].view(2, 3, 4).transpose(0, 1).reshape(6, 4)),
                    "gate_up.*computed"),
    "transposed": (lambda m, w: m.gate_up.data[6:10].copy_(w["up.weight"][:4].t()), "gate_up.*permutes"),
    "broadcast": (lambda m, w: m.gate_up.data[6:].copy_(w["up.weight"][:1]), "gate_up.*broadcasts"),
    "columns": (lambda m, w: m.gate_up.data[6:, :2].copy_(w["up.weight"][:, :2]), "gate_up.*strided"),
    "rows swapped": (lambda m, w: (m.gate_up.data[6:9].copy_(w["up.weight"][3:]),
                                   m.gate_up.data[9:].copy_(w["up.weight"][:3])), "gate_up.*not one contiguous block"),
    "a row missing": (lambda m, w: m.gate_up.data[6:11].copy_(w["up.weight"][:5]), "gate_up.*only 20 of 24"),
    "written twice": (lambda m, w: m.gate_up.data[3:9].copy_(w["up.weight"]), "gate_up.*rows 3 to 6.*two tensors"),
    "not loaded": (lambda m, w: None, "model.up.weight has no place"),
    "data of its own": (lambda m, w: m.gate_up.data[6:].copy_(torch.ones(6, 4)), "gate_up.*computed"),
    "arithmetic in place": (lambda m, w: m.gate_up.data[6:].add_(1), "gate_up.*aten.add_"),
    "ones for padding": (lambda m, w: m.gate_up.data[6:].fill_(1), "gate_up.*aten.fill_"),
    "zeros in the middle": (lambda m, w: m.gate_up.data[5:7].zero_(), "gate_up.*no padding|up.weight has no place"),
    "parameter replaced": (lambda m, w: (m.gate_up.data[6:].copy_(w["up.weight"]),
                                         setattr(m, "gate_up", nn.Parameter(m.gate_up.clone()))), "gate_up.*replaces"),
    "memory replaced": (lambda m, w: (m.gate_up.data[6:].copy_(w["up.weight"]),
                                      setattr(m.gate_up, "data", m.gate_up.data.clone())), "gate_up.*replaces"),
    "loader raises": (lambda m, w: w["down.weight"], "Merged.load_weights refuses.*down.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_loaders_that_cannot_be_followed_are_refused(case: str) -> None:
    line, message = REFUSED[case]
    with pytest.raises(MappingError, match=message):
        derive(Merged(with_line(line)), SOURCES)


def test_rows_no_tensor_reaches_are_refused() -> None:
    model = Merged(faithful)
    model.extra = nn.Parameter(torch.zeros(2, 4, dtype=torch.bfloat16))
    with pytest.raises(MappingError, match=r"parameter extra: rows from 0 on \(of 2\)"):
        derive(model, SOURCES)


def test_vision_is_frozen_not_missing() -> None:
    model = Merged(faithful)
    model.visual = nn.Linear(2, 2, dtype=torch.bfloat16)
    assert derive(model, SOURCES).frozen == ("visual.weight", "visual.bias")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn])
def test_unexpected_dtypes_are_refused(dtype: torch.dtype) -> None:
    model = Merged(faithful)
    model.embed = nn.Parameter(torch.zeros(8, 4).to(dtype), requires_grad=False)
    with pytest.raises(MappingError, match=r"parameter embed is .* --dtype bfloat16"):
        derive(model, SOURCES)


def test_a_log_in_bf16_is_refused() -> None:
    model = Merged(faithful)
    model.A_log = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(MappingError, match="A_log is bfloat16, not float32"):
        derive(model, SOURCES)


def test_rows_that_are_not_contiguous_are_refused() -> None:
    model = Merged(faithful)
    model.gate_up = nn.Parameter(torch.zeros(4, 12, dtype=torch.bfloat16).t())
    with pytest.raises(MappingError, match="gate_up has strides"):
        derive(model, SOURCES)
