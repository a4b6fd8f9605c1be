"""What training holds at the three moments that can be its peak: in the loss, in a layer's backward pass, and at the
embeddings' gradient.

    for name, moment in MOMENTS.items():
        gradients, activations = moment(config, tokens, way, kept, tables)       # bytes; activations by name

Arithmetic on a model's sizes and a number of tokens; what it cannot know is in the constants, checked against measured
peaks. config: the model's sizes. tokens: of one forward pass, padding included, all of them trained. kept: how many of
the last layers keep their activations; the others are recomputed. tables: whether embeddings and head are trained.

Must not know: torch, vLLM.
Invariants: more tokens never need less. Weights and gradients are bf16, A_log is fp32.
"""

import math
from collections.abc import Sequence

from worker.memory.activations import extra, factors, saved
from worker.memory.plan import Way
from worker.memory.traced_sizes import Sizes

BUCKET_BYTES = 1 << 30
"""Gradients that streaming holds back to apply together: `ApolloMini.streaming`'s default."""
LOSS_BLOCK = 1 << 27
"""Most logits at a time: worker.model.head_blocks's BLOCK."""
LOSS_BLOCKS = 3
"""In fp32, what stands of them: a block's logits and gradient, and those of the one before until replaced."""
TEACHER = 65 * 40
"""Bytes a token of a teacher's next words, K + 1 of them (`worker.model.soft_targets`), and of what the loss makes of
them: which they are and where (8 each), whether in this block (1), expected, found, and their parts of gradients."""
HIDDEN = 12
"""Bytes for each element of the last hidden states while the loss and its gradient are computed."""
FACTORS = "factors of the matrices' gradients"
INPUTS = "layer inputs"
"""Rows' names."""

Moment = tuple[float, list[tuple[str, float]]]
"""(gradients in flight, activations by name), in bytes."""


def in_loss(config: Sizes, tokens: int, way: Way, kept: int, tables: bool) -> Moment:
    """Everything the forward pass kept, one block of logits, and the head's gradient or its factors."""
    logits = 4 * LOSS_BLOCKS * min(LOSS_BLOCK, tokens * config.vocab)
    # before and after the last norm, the gathered rows and their gradient in bf16, and its sum over blocks in fp32
    hidden = HIDDEN * config.hidden * tokens
    rows = [*_held(config, tokens, kept), ("logits", logits), ("hidden states and their gradient", hidden)]
    rows.append(("a teacher's next words", TEACHER * tokens))
    if way == "factors":
        return _buffer(config, tables), [*rows, (FACTORS, _table_factors(config, tables) * tokens)]
    return (_table_bytes(config) if tables else 0), rows


def in_backward(config: Sizes, tokens: int, way: Way, kept: int, tables: bool) -> Moment:
    """Everything the forward pass kept, and what the backward pass of the last layer adds to it; or, if that is more,
    of the first recomputed one, before which the kept ones have been freed. Factors grow from the last layer to the
    first while activations go, so that one of the ends is the largest.

    A tied table's gradient waits from the loss on for the embeddings' part of it.
    """
    kinds = set(config.layers)
    last = max(extra(config, kind) for kind in kinds)
    # a recomputed layer's input is one of the layer inputs already
    again = max(sum(saved(config, kind)) - 2 * config.hidden + extra(config, kind) for kind in kinds)
    first = len(config.layers) - kept
    inputs = (INPUTS, 2 * config.hidden * first * tokens)
    moments = [[*_held(config, tokens, kept), ("one layer's backward pass", last * tokens)]] if kept else []
    if way == "factors":
        head = _table_factors(config, tables)
        moments = [[*rows, (FACTORS, head * tokens)] for rows in moments]
        done = (FACTORS, (head + _layer_factors(config, config.layers[first:])) * tokens)
        if first:
            moments.append([inputs, done, ("one layer's backward pass", again * tokens)])
        everything = (FACTORS, (head + _layer_factors(config, config.layers)) * tokens)
        moments.append([everything, ("one layer's backward pass", again * tokens)])
        return _formed(config, tables), max(moments, key=_sum)
    matrices = [2 * math.prod(shape) for kind in kinds for shape in config.layer(kind).values()]
    gradients = max(matrices) + (_table_bytes(config) if tables and config.tied else 0)
    gradients += _bucket(config) if way == "streaming" else 0
    if first:
        moments.append([inputs, ("one layer's backward pass", again * tokens)])
    return gradients, max(moments, key=_sum)


def at_embeddings(config: Sizes, tokens: int, way: Way, kept: int, tables: bool) -> Moment:
    """The table's gradient; tied, that of the head beside it. The layers are done, and nothing of them is left but
    factors."""
    rows: list[tuple[str, float]] = [("hidden states and their gradient", HIDDEN * config.hidden * tokens)]
    if way == "factors":
        everything = _table_factors(config, tables) + _layer_factors(config, config.layers)
        return _formed(config, tables), [*rows, (FACTORS, everything * tokens)]
    table = _table_bytes(config) * (2 if config.tied else 1) if tables else 0
    return table + (_bucket(config) if way == "streaming" else 0), rows


MOMENTS = {"in the loss": in_loss, "in a layer's backward pass": in_backward, "at the embeddings": at_embeddings}


def layers_bytes(config: Sizes, tokens: int, *, way: Way, kept: int) -> float:
    """Bytes that forward and backward of the layers alone take at their peak, and in burst all of their gradients:
    nothing of embeddings, head, loss and buffer."""
    _, activations = in_backward(config, tokens, way, kept, tables=False)
    return _sum(activations) + (gradient_bytes(config, tables=False) if way == "burst" else 0)


def input_bytes(config: Sizes, tokens: int) -> int:
    """Bytes of the inputs of all layers, where all are computed again."""
    return 2 * config.hidden * len(config.layers) * tokens


def gradient_bytes(config: Sizes, tables: bool) -> int:
    """Bytes of all gradients together; without tables, those of embeddings and head are left out."""
    return 2 * config.count() - (0 if tables else _table_bytes(config) * len(config.tables()))


def _held(config: Sizes, tokens: int, kept: int) -> list[tuple[str, float]]:
    """What the forward pass leaves for backward."""
    again = len(config.layers) - kept
    each = {kind: sum(saved(config, kind)) for kind in set(config.layers)}
    rows: list[tuple[str, float]] = []
    if again:
        rows.append((INPUTS, 2 * config.hidden * again * tokens))
    if kept:
        rows.append((f"activations of {kept} layers", sum(each[kind] for kind in config.layers[again:]) * tokens))
    return rows


def _layer_factors(config: Sizes, layers: Sequence[str]) -> int:
    """Bytes a token of these layers' factors."""
    each = {kind: factors(config, kind) for kind in set(layers)}
    return sum(each[kind] for kind in layers)


def _table_factors(config: Sizes, tables: bool) -> int:
    """Bytes a token: the head's input and the gradient of its logits, and the gradient of the embeddings' rows."""
    return 2 * (config.vocab + 2 * config.hidden) if tables else 0


def _buffer(config: Sizes, tables: bool) -> int:
    """Where products are formed: a bucket of them, or the largest matrix."""
    matrices = [2 * math.prod(shape) for kind in set(config.layers) for shape in config.layer(kind).values()]
    return max(_bucket(config), *matrices, _table_bytes(config) if tables else 0)


def _formed(config: Sizes, tables: bool) -> int:
    """Gradients by factors, once the layers are done: the buffer, and those of experts, which have no factors."""
    return _buffer(config, tables) + 2 * config.stacks()


def _sum(rows: list[tuple[str, float]]) -> float:
    return sum(size for _, size in rows)


def _table_bytes(config: Sizes) -> int:
    return 2 * config.vocab * config.hidden


def _bucket(config: Sizes) -> int:
    return min(BUCKET_BYTES, 2 * config.count() - _table_bytes(config) * len(config.tables()))
