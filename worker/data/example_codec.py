"""Examples as plain maps, for a journal or another process: tokens and masks as bytes.

Must not know: Redis, torch.
Invariant: what is read has the tokens, masks, kind and weight of what was written.
"""

from typing import Any

import numpy as np

from worker.data.examples import Example, TokenSequence


def plain_example(example: Example) -> dict[str, Any]:
    """In msgpack types."""
    return {
        "id": example.id,
        "weight": example.weight,
        "sequences": [_plain(sequence) for sequence in example.sequences],
        **({"kind": example.kind} if example.kind != "demonstration" else {}),
        **({"teachers": [_plain(one) for one in example.teachers]} if example.teachers else {}),
    }


def example_of(item: dict[str, Any]) -> Example:
    """What `plain_example` made, without its report."""
    return Example(
        item["id"],
        tuple(_sequence(*s) for s in item["sequences"]),
        item["weight"],
        {},
        item.get("kind", "demonstration"),
        tuple(_sequence(*s) for s in item.get("teachers", [])),
    )


def _plain(sequence: TokenSequence) -> list[Any]:
    ids, mask = np.asarray(sequence.ids, "<u4"), np.asarray(sequence.mask, bool)
    return [ids.tobytes(), np.packbits(mask).tobytes()] + [True] * sequence.rejected


def _sequence(ids: bytes, mask: bytes, rejected: bool = False) -> TokenSequence:
    tokens = np.frombuffer(ids, "<u4")
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(tokens))
    return TokenSequence(tuple(tokens.tolist()), tuple(bits.astype(bool).tolist()), rejected)
