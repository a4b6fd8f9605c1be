"""A sweep over factors, on CUDA: which matrices it decides from products, and that the step is nearly the other one.

With TRITON_INTERPRET=1 they run on the CPU, as test_apollo_gpu.py's do.
"""

import pytest
import torch
from test_apollo_gpu import DEVICE, pytestmark  # noqa: F401
from test_products_gpu import exact, kernels_everywhere  # noqa: F401
from torch import Tensor

from worker.apollo import ApolloMini
from worker.model.factors import Product
from worker.model.gradient_factors import factors_of
from worker.trainer.factor_sweep import FactorSweep


class Model(torch.nn.Module):
    """Of what a language model has: embeddings, linear layers, one of them too odd to be taken, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(128, 64)
        self.up, self.odd, self.down = (torch.nn.Linear(*s, bias=False) for s in ((64, 104), (104, 60), (60, 64)))
        self.norm, self.head = torch.nn.LayerNorm(64), torch.nn.Linear(64, 128, bias=False)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(self.odd(torch.nn.functional.silu(self.up(x))))))  # type: ignore[no-any-return]


def test_a_sweep_decides_from_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the sweep that decides from gradients alone: the same norm, and nearly the same weights."""
    ids = torch.arange(40, device=DEVICE) * 7 % 128
    ends, norms = [], []
    for takes in (True, False):
        torch.manual_seed(0)
        model = Model().bfloat16().to(DEVICE)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = ApolloMini(model.named_parameters(), lr=1e-3)
        if not takes:
            monkeypatch.setattr(optimizer, "takes_product", lambda weight, parts: False)
        sweep = FactorSweep(factors_of(model), optimizer)
        for _ in range(2):
            sweep.reserve()
            with sweep.factors.recording():
                sweep.factors.begin_pass()
                torch.nn.functional.cross_entropy(model(ids).float(), ids).backward()
            norms.append(sweep.norm())
            sweep.prepare()
            decided = {name for name, p in model.named_parameters() if id(p) in sweep._decided}
            assert decided == ({"up.weight"} if takes else set())
            sweep.apply()
            optimizer.check()
            sweep.forget()
            optimizer.zero_grad(set_to_none=True)
        assert not any(torch.equal(p, start[name]) for name, p in model.named_parameters())
        ends.append(model.state_dict())
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-2)
    for name, tensor in ends[0].items():
        assert float((tensor == ends[1][name]).float().mean()) > 0.9, name


def recorded(passes: int = 1) -> tuple[dict[str, Tensor], FactorSweep]:
    """Parameters by name, and a sweep over what `passes` of forward and backward left; the head's, too."""
    torch.manual_seed(0)
    model = Model().bfloat16().to(DEVICE)
    ids = torch.arange(40, device=DEVICE) * 7 % 128
    sweep = FactorSweep(factors_of(model), ApolloMini(model.named_parameters(), lr=1e-3))
    sweep.reserve()
    with sweep.factors.recording():
        for _ in range(passes):
            sweep.factors.begin_pass()
            torch.nn.functional.cross_entropy(model(ids).float(), ids).backward()
            sweep.factors.keep(model.head.weight, random_product())
    return dict(model.named_parameters()), sweep


def random_product() -> Product:
    """Of the head, or of the embeddings."""
    return Product(*(torch.randn(40, side, device=DEVICE).mul(1e-2).bfloat16() for side in (128, 64)))


def exact_of(product: Product) -> Tensor:
    return exact([(product.left.detach(), product.right.detach(), 0)])


@pytest.mark.parametrize(("passes", "decided"), [(1, {"up.weight", "head.weight"}), (2, set())])
def test_sums_of_passes_are_decided_from_gradients(passes: int, decided: set[str]) -> None:
    parameters, sweep = recorded(passes)
    sweep.prepare()
    assert {name for name, p in parameters.items() if id(p) in sweep._decided} == decided


def test_a_tied_table_is_decided_from_its_gradient() -> None:
    """It has the head's product, and the rows that were looked up."""
    parameters, sweep = recorded()
    sweep.factors.keep(parameters["embed.weight"], random_product())
    sweep.prepare()
    assert id(parameters["head.weight"]) in sweep._decided and id(parameters["embed.weight"]) not in sweep._decided


def test_norms_that_came_with_the_factors_are_their_matrices() -> None:
    parameters, sweep = recorded()
    up, head = parameters["up.weight"], parameters["head.weight"]
    sweep.factors.known = [head], torch.tensor([7.0], dtype=torch.float64, device=DEVICE)
    sweep.norm()
    sweep.prepare()
    found = {id(slot.parameter): float(one.squares) for slot, one in sweep._prepared.given}
    (kept,) = (one for one in sweep.factors.products() if one[0] is up)
    assert found == {id(head): 7.0, id(up): pytest.approx(float(exact_of(kept[1]).square().sum()), rel=1e-2)}
    sweep.forget()
    assert sweep._prepared is None and not sweep._decided and not sweep._norms
