"""The mapping is found by watching a loader, and every loader it would misread is refused by the parameter's name."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from worker.serving.vllm.load_recorder import MappingError
from worker.serving.vllm.tensor_mapping import Padding, derive
from worker.shared_weights.slices import Slice
from worker.shared_weights.tensor_names import Source
from worker.utils.shard import Shard

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


# -- one rank of several --------------------------------------------------------------------------------------------

WHOLE = [
    Source("model.qkv.weight", "model.language_model.qkv.weight", (12, 4)),
    Source("model.down.weight", "model.language_model.down.weight", (6, 8)),
    Source("model.embed.weight", "model.language_model.embed.weight", (10, 4)),
    Source("model.norm.weight", "model.language_model.norm.weight", (4,)),
    Source("model.A_log", "model.language_model.A_log", (6,)),
]


class Rank(nn.Module):
    """The second of two ranks: merged q, k and v (4 rows each), a matrix divided by columns, a padded vocabulary."""

    def __init__(self, line: Callable[["Rank", dict[str, torch.Tensor]], object] | None = None) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(6, 4, dtype=torch.bfloat16))
        self.down = nn.Parameter(torch.randn(6, 4, dtype=torch.bfloat16))
        self.embed = nn.Parameter(torch.randn(8, 4, dtype=torch.bfloat16))
        self.norm = nn.Parameter(torch.randn(4, dtype=torch.bfloat16))
        self.A_log = nn.Parameter(torch.randn(3))
        self._line = line

    def load_weights(self, weights: Weights) -> None:
        w = {name.rpartition("language_model.")[2]: tensor for name, tensor in weights}
        if self._line is not None:
            self._line(self, w)
        else:
            for part in range(3):
                piece = w["qkv.weight"].narrow(0, 4 * part, 4).narrow(0, 2, 2)
                self.qkv.data.narrow(0, 2 * part, 2).copy_(piece)
            self.down.data.copy_(w["down.weight"].narrow(1, 4, 4))
        self.embed[:2].data.copy_(w["embed.weight"].narrow(0, 8, 2))
        self.embed[2:].data.fill_(0)
        self.norm.data.copy_(w["norm.weight"])
        self.A_log.data.copy_(w["A_log"].narrow(0, 3, 3))


def test_a_rank_s_parts_say_where_they_lie_in_the_whole() -> None:
    mapping = derive(Rank(), WHOLE, divided=True)
    found = {piece.name: (piece.param, piece.start, piece.rows, piece.shape, piece.shard) for piece in mapping.slices}
    assert found == {
        "model.A_log": ("A_log", 0, 3, (3,), Shard((6,), 0, ((3, 3),))),
        "model.down.weight": ("down", 0, 6, (6, 4), Shard((6, 8), 1, ((4, 4),))),
        "model.embed.weight": ("embed", 0, 2, (2, 4), Shard((10, 4), 0, ((8, 2),))),
        "model.norm.weight": ("norm", 0, 4, (4,), None),
        "model.qkv.weight": ("qkv", 0, 6, (6, 4), Shard((12, 4), 0, ((2, 2), (6, 2), (10, 2)))),
    }
    assert mapping.padding == (Padding("embed", 2, 6),)


def test_a_server_of_one_rank_may_hold_no_parts() -> None:
    with pytest.raises(MappingError, match=r"only some columns of model\.down|not one contiguous block"):
        derive(Rank(), WHOLE)


def _columns(model: Rank, w: dict[str, torch.Tensor], *pieces: tuple[int, int, int]) -> None:
    model.qkv.data.copy_(w["qkv.weight"][6:])
    for row, count, column in pieces:
        model.down.data[row : row + count].copy_(w["down.weight"][row : row + count, column : column + 4])


REFUSED_OF_A_RANK: dict[str, tuple[Callable[[Rank, dict[str, torch.Tensor]], object], str]] = {
    "rows in another order": (lambda m, w: (m.qkv.data[:3].copy_(w["qkv.weight"][3:6]),
                                            m.qkv.data[3:].copy_(w["qkv.weight"][:3])), "the order of the rows"),
    "rows twice": (lambda m, w: (m.qkv.data[:3].copy_(w["qkv.weight"][:3]),
                                 m.qkv.data[3:].copy_(w["qkv.weight"][2:5])), "changes the order of the rows"),
    "a gap in the parameter": (lambda m, w: (m.qkv.data[:2].copy_(w["qkv.weight"][:2]),
                                             m.qkv.data[4:].copy_(w["qkv.weight"][2:4])), "not one block"),
    "parts of rows": (lambda m, w: m.qkv.data.view(-1)[:20].copy_(w["qkv.weight"].view(-1)[2:22]), "parts of rows"),
    "other columns row by row": (lambda m, w: _columns(m, w, (0, 3, 4), (3, 3, 0)), "other columns of model.down"),
    "columns of some rows": (lambda m, w: _columns(m, w, (0, 5, 4)), "only 5 of 6 rows of model.down"),
    "every second column": (lambda m, w: (m.qkv.data.copy_(w["qkv.weight"][6:]),
                                          m.down.data.copy_(w["down.weight"][:, ::2])), "down.*permutes or broadcasts"),
    "nothing": (lambda m, w: m.qkv.data.copy_(w["qkv.weight"][6:]), "model.down.weight has no place"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_OF_A_RANK)
def test_parts_that_cannot_be_followed_are_refused(case: str) -> None:
    line, message = REFUSED_OF_A_RANK[case]
    with pytest.raises(MappingError, match=message):
        derive(Rank(line), WHOLE, divided=True)


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
