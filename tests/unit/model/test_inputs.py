"""Where the sequences of a packed row begin: one shape for rows of one length, and every chunk once."""

import pytest

from worker.model.inputs import CHUNK, PLACES, packing_of

ROW = 512


@pytest.mark.parametrize("lengths", [[512], [100, 412], [1, 63, 64, 65, 319], [64] * 8, [1] * 7 + [505], [511, 1]])
def test_every_chunk_is_there_once_in_order_and_the_rest_is_of_an_empty_sequence(lengths: list[int]) -> None:
    packing = packing_of(lengths)
    starts = packing.starts.tolist()
    assert starts[: len(lengths) + 1] == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert set(starts[len(lengths) :]) == {ROW}
    expected = [[n, c] for n, length in enumerate(lengths) for c in range((length + CHUNK - 1) // CHUNK)]
    chunks = packing.chunks.tolist()
    assert chunks[: len(expected)] == expected
    empty = packing.places
    assert starts[empty] == starts[empty + 1] == ROW
    assert all(chunk == [empty, 0] for chunk in chunks[len(expected) :])


def test_shapes_follow_from_the_row_alone() -> None:
    shapes = {
        (packing.starts.shape, packing.starts32.shape, packing.chunks.shape)
        for packing in map(packing_of, ([ROW], [64] * 8, [1, 511], [1] * 7 + [505], [65] * 7 + [57]))
    }
    assert len(shapes) == 1


def test_more_sequences_take_more_places() -> None:
    packing = packing_of([32] * (2 * PLACES))
    assert packing.places == 2 * PLACES
    assert len(packing.chunks) >= 2 * PLACES
