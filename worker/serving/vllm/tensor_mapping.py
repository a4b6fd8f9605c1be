"""Which rows of which server parameter every transformers tensor is, found by running the model's own loader.

No dimension and no layer is written down: the names and shapes come from transformers' model (`names`), the places
from watching vLLM's `load_weights` (`recorder`).

Under tensor parallelism each rank sees its own part: a tensor's block then holds some pieces of its rows, or some of
its columns, and its `Shard` says which. That all ranks' parts make up the tensor is checked by who sees them all
(shared_weights/ranks.py).

Invariants: every element of every parameter that is not frozen is covered exactly once, by a tensor or by named
vocabulary padding; every tensor is one contiguous block of rows; the parameters are bit-identical afterwards. Must not
know: Redis.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from worker.serving.vllm.load_recorder import MappingError, Recorder, Write
from worker.shared_weights.backend import dtype_name, unique_parameters
from worker.shared_weights.slices import FLOAT32_PARAMETERS, Slice
from worker.shared_weights.tensor_names import Source
from worker.utils.shard import Shard

FROZEN_PREFIXES = ("visual.",)
"""Server parameters that text training leaves alone."""


@dataclass(frozen=True)
class Padding:
    """Rows `start` to `start + rows` of `param` stand for no token; they are zero and stay so."""

    param: str
    start: int
    rows: int


@dataclass(frozen=True)
class Mapping:
    """What `derive` found."""

    slices: tuple[Slice, ...]
    """One for each tensor, sorted by name."""
    padding: tuple[Padding, ...]
    frozen: tuple[str, ...]
    """Server parameters that no text tensor lies in."""


def derive(model: nn.Module, sources: Sequence[Source], *, divided: bool = False) -> Mapping:
    """The mapping of vLLM's `model` (any device, parameters in place) for transformers' tensors `sources`.

    divided: the model is one rank's of several, which holds parts of tensors.
    `MappingError` names the first parameter or tensor that cannot be mapped, and says why.
    """
    parameters = unique_parameters(model)
    _check_dtypes(parameters)
    writes = _record(model, parameters, sources)
    make = _part if divided else _slice
    slices = [make(source, [w for w in writes if w.source == source.source], parameters) for source in sources]
    padding = [_padding(write, parameters[write.param]) for write in writes if write.source is None]
    pieces: list[Slice | Padding] = [*slices, *padding]
    touched = {piece.param for piece in pieces}
    frozen = [name for name in parameters if name not in touched and name.startswith(FROZEN_PREFIXES)]
    for name, parameter in parameters.items():
        if name not in frozen:
            _check_coverage(name, parameter.shape[0], [piece for piece in pieces if piece.param == name])
    return Mapping(tuple(sorted(slices, key=lambda s: s.name)), tuple(padding), tuple(frozen))


def _check_dtypes(parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        expected = torch.float32 if name.rpartition(".")[2] in FLOAT32_PARAMETERS else torch.bfloat16
        if parameter.dtype != expected:
            raise MappingError(
                f"parameter {name} is {dtype_name(parameter.dtype)}, not {dtype_name(expected)}: serve an unquantized"
                " model with --dtype bfloat16"
            )
        if not parameter.is_contiguous() or parameter.dim() == 0:
            raise MappingError(f"parameter {name} has strides {parameter.stride()}: its rows are not contiguous")


def _record(model: nn.Module, parameters: dict[str, nn.Parameter], sources: Sequence[Source]) -> list[Write]:
    """Run the model's loader on meta tensors and return what it would have written."""
    tensors = {s.source: torch.empty(s.shape, dtype=torch.bfloat16, device="meta") for s in sources}
    before = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    recorder = Recorder(parameters, tensors)
    try:
        with torch.no_grad(), recorder:
            model.load_weights(iter(tensors.items()))  # type: ignore[operator]  # every vLLM model has it
    except MappingError:
        raise
    except Exception as error:
        raise MappingError(
            f"{type(model).__name__}.load_weights refuses the tensors that transformers' model has"
            f" ({type(error).__name__}: {error}): this server's model and transformers' do not match"
        ) from error
    after = {name: parameter.data_ptr() for name, parameter in unique_parameters(model).items()}
    if moved := [name for name in before if after.get(name) != before[name]]:
        raise MappingError(f"parameter {moved[0]}: the loader replaces it instead of writing into it")
    return recorder.writes


def _slice(source: Source, writes: list[Write], parameters: dict[str, nn.Parameter]) -> Slice:
    """One block from the pieces that `source` was copied in."""
    if not writes:
        raise MappingError(f"tensor {source.name} has no place in the server's model: nothing is loaded from it")
    writes = sorted(writes, key=lambda write: write.source_start)
    first = writes[0]
    if first.columns is not None:
        raise MappingError(f"parameter {first.param}: the loader puts only some columns of {source.name} into it")
    expected = 0
    for write in writes:
        same_block = write.param == first.param and write.start - write.source_start == first.start
        if write.source_start != expected or not same_block:
            raise MappingError(f"parameter {write.param}: {source.name} is not one contiguous block of rows in it")
        expected += write.count
    if expected != prod(source.shape):
        raise MappingError(f"parameter {first.param}: only {expected} of {prod(source.shape)} values of {source.name}")
    parameter = parameters[first.param]
    start, rows = _rows(parameter, first.start, expected)
    if parameter.shape[1:] != source.shape[1:] or rows != source.shape[0]:
        raise MappingError(
            f"parameter {first.param}: {source.name} has shape {source.shape}, its rows there {tuple(parameter.shape)}"
        )
    return Slice(source.name, source.source, first.param, start, rows, source.shape, dtype_name(parameter.dtype))


def _part(source: Source, writes: list[Write], parameters: dict[str, nn.Parameter]) -> Slice:
    """The block that holds this rank's part of `source`; all of it where it is not divided."""
    if sum(write.count for write in writes) == prod(source.shape):
        return _slice(source, writes, parameters)
    if not writes:
        raise MappingError(f"tensor {source.name} has no place in the server's model: nothing is loaded from it")
    writes = sorted(writes, key=lambda write: write.start)
    first, end = writes[0], writes[0].start
    for write in writes:
        if write.param != first.param or write.start != end or write.columns != first.columns:
            raise MappingError(f"parameter {write.param}: this rank's part of {source.name} is not one block in it")
        end += write.count
    parameter = parameters[first.param]
    shard = _columns(source, writes) if first.columns is not None else _pieces(source, writes)
    start, rows = _rows(parameter, first.start, end - first.start)
    if (rows, *parameter.shape[1:]) != shard.local:
        raise MappingError(
            f"parameter {first.param}: the part of {source.name} {source.shape} has shape {shard.local}, its rows there"
            f" {(rows, *parameter.shape[1:])}"
        )
    dtype = dtype_name(parameter.dtype)
    return Slice(source.name, source.source, first.param, start, rows, shard.local, dtype, shard)


def _columns(source: Source, writes: list[Write]) -> Shard:
    """The same columns of all rows."""
    width = writes[0].columns
    assert width is not None
    first, expected = writes[0].source_start % source.shape[1], 0
    for write in writes:
        if write.source_start != expected * source.shape[1] + first:
            raise MappingError(f"parameter {write.param}: the loader takes other columns of {source.name} row by row")
        expected += write.count // width
    if expected != source.shape[0]:
        raise MappingError(f"parameter {writes[0].param}: only {expected} of {source.shape[0]} rows of {source.name}")
    return Shard(source.shape, 1, ((first, width),))


def _pieces(source: Source, writes: list[Write]) -> Shard:
    """Pieces of its rows, in their order."""
    row = prod(source.shape[1:])
    pieces: list[tuple[int, int]] = []
    for write in writes:
        if write.source_start % row or write.count % row:
            raise MappingError(f"parameter {write.param}: the loader takes parts of rows of {source.name}")
        first, count = write.source_start // row, write.count // row
        end = sum(pieces[-1]) if pieces else 0
        if first < end:
            raise MappingError(f"parameter {write.param}: the loader changes the order of the rows of {source.name}")
        if pieces and first == end:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + count)
        else:
            pieces.append((first, count))
    return Shard(source.shape, 0, tuple(pieces))


def _padding(write: Write, parameter: nn.Parameter) -> Padding:
    padding = Padding(write.param, *_rows(parameter, write.start, write.count))
    if padding.start + padding.rows != parameter.shape[0]:
        raise MappingError(f"parameter {write.param}: the loader zeroes rows {padding.start} on, which is no padding")
    return padding


def _rows(parameter: nn.Parameter, start: int, count: int) -> tuple[int, int]:
    """(first row, rows) of a block of elements; both 0-based, whole rows only."""
    row = prod(parameter.shape[1:])
    if start % row or count % row:
        raise MappingError(f"a block of {count} elements at {start} is not made of whole rows of {row}")
    return start // row, count // row


def _check_coverage(name: str, rows: int, pieces: Iterable[Slice | Padding]) -> None:
    """Rows 0 to `rows` of parameter `name` are covered once each."""
    end = 0
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if piece.start < end:
            raise MappingError(f"parameter {name}: rows {piece.start} to {end} are loaded from two tensors")
        if piece.start > end:
            break
        end = piece.start + piece.rows
    if end != rows:
        raise MappingError(f"parameter {name}: rows from {end} on (of {rows}) are loaded from no text tensor")
