"""The file of tuned kernels: what is written is read, for the right card, and what is no such file is refused."""

import json
from pathlib import Path

import pytest

from worker.trainer.tuned_table import SHIPPED, Card, Table, TableError, read, table_for, write

H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 132)
H200 = Card("NVIDIA H200", (9, 0), 132)
PCIE = Card("NVIDIA H100 PCIe", (9, 0), 114)
A100 = Card("NVIDIA A100-SXM4-80GB", (8, 0), 108)
KEY, OPTIONS = (16, True, None, "torch.bfloat16"), {"BD": 64, "num_warps": 4, "maxnreg": None}


def table(card: Card = H100, triton: str = "3.6.0", source: str = "s", warps: int = 4) -> Table:
    made = Table(card, triton)
    made.add("fla.ops.a", source, KEY, OPTIONS | {"num_warps": warps})
    made.add("fla.ops.b", source, (1,), {"num_warps": 2})
    return made


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tables = [table(), table(H200, warps=8), table(triton="3.7.1")]
    write(tmp_path / "t.json", tables)
    assert read(tmp_path / "t.json") == tables
    lines = (tmp_path / "t.json").read_text().splitlines()
    assert sum('["torch.bfloat16"' in line or "num_warps" in line for line in lines) == 6, "a winner a line"


def test_of_two_tables_of_a_card_the_later_winner_stands(tmp_path: Path) -> None:
    later = Table(H100, "3.6.0")
    later.add("fla.ops.a", "s", KEY, {"num_warps": 1})
    later.add("fla.ops.b", "rewritten", (2,), {"num_warps": 8})
    write(tmp_path / "t.json", [table(), later])
    (kept,) = read(tmp_path / "t.json")
    assert kept.winner("fla.ops.a", "s", KEY) == {"num_warps": 1}
    assert kept.winner("fla.ops.b", "rewritten", (1,)) is None, "chosen for the former source"
    assert kept.winner("fla.ops.b", "rewritten", (2,)) == {"num_warps": 8}


def test_a_winner_is_of_its_source_and_key_alone() -> None:
    made = table()
    assert made.winner("fla.ops.a", "s", KEY) == OPTIONS
    assert made.winner("fla.ops.a", "other", KEY) is None and made.knows_otherwise("fla.ops.a", "other")
    assert made.winner("fla.ops.a", "s", (*KEY[:-1], "torch.float32")) is None
    assert made.winner("fla.ops.c", "s", KEY) is None and not made.knows_otherwise("fla.ops.c", "s")


def test_a_table_is_of_a_card_and_a_triton() -> None:
    tables = [table(triton="3.7.1"), table(H200, warps=8), table()]
    assert table_for(tables, H100, "3.6.0") is tables[2], "its own before another's"
    assert table_for(tables[:2], H100, "3.6.0") is tables[1], "an H200 has the same multiprocessors"
    assert table_for(tables, PCIE, "3.6.0") is None
    assert table_for(tables, A100, "3.6.0") is None
    assert table_for(tables, H100, "3.6.1") is None


GOOD = {"card": "c", "capability": [9, 0], "multiprocessors": 132, "triton": "3.6.0", "kernels": []}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot be read"),
        ([], "no table of tuned kernels"),
        ({"tables": []}, "'format'"),
        ({"format": 2, "tables": []}, "of format 2, this reads 1"),
        ({"format": 1, "tables": [GOOD | {"capability": [9]}]}, "no table of tuned kernels"),
        ({"format": 1, "tables": [GOOD | {"multiprocessors": "132"}]}, "'132' is no int"),
        ({"format": 1, "tables": [{"card": "c"}]}, "no table of tuned kernels"),
        ({"format": 1, "tables": [GOOD | {"kernels": [{"kernel": "k", "source": "s"}]}]}, "'winners'"),
        (
            {"format": 1, "tables": [GOOD | {"kernels": [{"kernel": "k", "source": "s", "winners": [[[1], 4]]}]}]},
            "4 is no dict",
        ),
        (
            {"format": 1, "tables": [GOOD | {"kernels": [{"kernel": "k", "source": "s", "winners": [[[[1]], {}]]}]}]},
            "[1] is no number, text or null",
        ),
    ],
)
def test_what_is_no_table_is_refused_by_name(tmp_path: Path, document: object, words: str) -> None:
    path = tmp_path / "t.json"
    if document is not None:
        path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    with pytest.raises(TableError) as refused:
        read(path)
    assert str(path) in str(refused.value) and words in str(refused.value)


def test_an_h100_and_an_h200_have_a_table_that_ships() -> None:
    tables = read(SHIPPED)
    found = table_for(tables, H100, "3.6.0")
    assert found is not None and found == table_for(tables, H200, "3.6.0")
    assert len(found.kernels) == 16 and all(kernel.winners for kernel in found.kernels.values())
    assert table_for(tables, PCIE, "3.6.0") is None


def test_what_ships_is_read_and_each_card_has_one_table_for_a_triton(tmp_path: Path) -> None:
    tables = read(SHIPPED)
    assert len({(one.card.name, one.triton) for one in tables}) == len(tables)
    write(tmp_path / "t.json", tables)
    assert (tmp_path / "t.json").read_bytes() == SHIPPED.read_bytes(), "as the benchmark writes it"
