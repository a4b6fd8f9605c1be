"""The counter-based draws: Philox against its authors' vectors, rounding bits that no tiling changes, normal
projections."""

import pytest
import torch

from worker.apollo import ApolloMini, philox
from worker.apollo.cpu import CpuBackend

# Random123's tests/kat_vectors, the three lines "philox4x32 10": counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_known_answers(counter: str, key: str, result: str) -> None:
    low, high = words(key)
    assert [int(word) for word in philox.philox4x32(words(counter), (low, high))] == words(result)


def lane_by_lane(seed: int, step: int, id: int, e: int) -> int:
    """The 16 bits of one element, straight from the layout's definition."""
    block, lane = divmod(e, 8)
    counter = (block & 0xFFFFFFFF, block >> 32, step, id)
    word = int(philox.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))[lane // 2])
    return word >> 16 if lane % 2 else word & 0xFFFF


@pytest.mark.parametrize("first", [0, 3, 8, 2**35 - 5])
def test_rounding_bits_follow_the_layout(first: int) -> None:
    seed, step, id = 0x0123456789ABCDEF, 5, 77
    bits = philox.rounding_bits(seed, step, id, torch.tensor([first]), 21)
    assert bits.tolist() == [[lane_by_lane(seed, step, id, first + k) for k in range(21)]]


def test_rounding_bits_do_not_depend_on_how_they_are_cut() -> None:
    whole = philox.rounding_bits(3, 1, 2, torch.tensor([0]), 40 * 27).view(40, 27)
    rows = torch.arange(11, 40) * 27 + 9
    assert torch.equal(philox.rounding_bits(3, 1, 2, rows, 13), whole[11:, 9:22])


def test_chunks_do_not_change_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same bits in chunks of one row (the projections' sums are over whole rows here, so they agree too)."""
    results = []
    for chunk in (1 << 20, 1):
        monkeypatch.setattr("worker.apollo.cpu.CHUNK", chunk)
        weight = torch.linspace(-1, 1, 60 * 30).view(60, 30).bfloat16()
        optimizer = ApolloMini([{"params": [torch.nn.Parameter(weight)], "algorithm": "adamw"}], lr=1e-3)
        optimizer.step(grads=[torch.ones(60, 30)])
        results.append(weight)
    assert torch.equal(*results)


def check_shards(device: str) -> None:
    """Shards by rows and by columns, told their places, give exactly the unsharded weights (AdamW: elementwise)."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(24, 40, generator=generator).bfloat16()
    gradients = [torch.randn(24, 40, generator=generator).to(device) for _ in range(3)]
    options = {"algorithm": "adamw", "ids": [6]}
    whole = torch.nn.Parameter(weight.clone().to(device))
    optimizer = ApolloMini([{"params": [whole], **options}], lr=1e-2)
    for gradient in gradients:
        optimizer.step(grads=[gradient])
    for rows, cols in [((0, 12), (0, 40)), ((12, 24), (0, 40)), ((0, 24), (16, 40)), ((5, 9), (3, 22))]:
        part = torch.nn.Parameter(weight[slice(*rows), slice(*cols)].clone().to(device))
        places = [(rows[0], cols[0], 40)]
        optimizer = ApolloMini([{"params": [part], "places": places, **options}], lr=1e-2)
        for gradient in gradients:
            optimizer.step(grads=[gradient[slice(*rows), slice(*cols)].contiguous()])
        assert torch.equal(part, whole[slice(*rows), slice(*cols)]), (rows, cols)


def test_shards() -> None:
    check_shards("cpu")


def test_ids_follow_sorted_names_or_are_given() -> None:
    def ids(params: list) -> list[int]:
        return [slot.id for slot in ApolloMini(params, lr=1e-3)._slots]

    a, b, c = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    assert ids([("b", b), ("a", a), ("c", c)]) == [1, 0, 2]
    assert ids([a, b]) == [0, 1]
    assert ids([{"params": [("x", a), ("w", b)], "ids": [40, 41]}, {"params": [("a", c)]}]) == [40, 41, 0]


def test_projections_are_standard_normal_and_all_different() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = [philox.projection(seed, id, draw, 20001) for seed, id, draw in keys]
    stacked = torch.stack(draws).double()
    assert stacked.mean(1).abs().max() < 4 / 20001**0.5
    assert (stacked.var(1) - 1).abs().max() < 4 * (2 / 20001) ** 0.5
    assert (stacked.pow(4).mean(1) - 3).abs().max() < 4 * (96 / 20001) ** 0.5
    assert (torch.corrcoef(stacked) - torch.eye(4)).abs().max() < 4 / 20001**0.5
    assert torch.equal(philox.projection(0, 0, 0, 7), draws[0][:7])


def test_a_projection_is_kept_until_its_redraw() -> None:
    asked = []

    def projection(index: int, shape: tuple[int, int], draw: int) -> torch.Tensor:
        asked.append((index, shape, draw))
        return torch.ones(shape)

    tall, wide = torch.nn.Parameter(torch.zeros(5, 3)), torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = ApolloMini([tall, wide], lr=1e-3, projection_gap=3, projection=projection)
    assert isinstance(optimizer._steps.backend, CpuBackend)
    for _ in range(4):
        optimizer.step(grads=[torch.ones(5, 3), torch.ones(3, 5)])
    assert asked == [(0, (1, 3), 0), (1, (3, 1), 0), (0, (1, 3), 1), (1, (3, 1), 1)]
