"""The decoder layers over a row of one size as CUDA graphs: of forward, of backward, and by factors of the norms.

    row = CapturedRow(body, sweep, tokens, streams)  # in a warm-up: it runs everything once
    row.capture(sweep, pool)                         # and captures it
    hidden = row.run(embeds, positions, packing)     # in traffic: replays in place of thousands of launches
    ...                                              # loss.backward() goes through it

A row has few tokens when the host needs longer to launch its kernels than the device to run them; a graph has one
launch. What depends on the data stays outside: embeddings, the output head, the loss.

Must not know: Redis, vLLM, the header, versions.
Invariants: a replay runs the very kernels that the layers run, on the same shapes: PLACES sequences in `tokens` tokens.
It reads the weights where they lie, and they may change in place. What it leaves (hidden states, factors, gradients) is
valid until the next replay of any graph in `pool`, or, where `captured_rows` lends its memory, a long row's forward
pass.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from worker.model.factors import Product
from worker.model.inputs import NO_MASKS, Packing, packing_of
from worker.trainer.factor_sweep import FactorSweep


class CapturedRow:
    """By factors if `sweep.factors` is recording, in its constructor and in `capture`, else with all gradients.

    body: transformers' text model, fused. streams: the first is captured on; norms, whose kernels are small, run on the
    others.
    """

    def __init__(self, body: Any, sweep: FactorSweep, tokens: int, streams: Sequence[torch.cuda.Stream]) -> None:
        self.body, self.factors, self.tokens = body, sweep.factors, tokens
        self.by_factors = sweep.factors.is_recording
        table = body.embed_tokens.weight
        self._embeds = torch.zeros(1, tokens, table.shape[1], dtype=table.dtype, device=table.device).requires_grad_()
        self._positions = torch.arange(tokens, device=table.device)[None]  # [1, T]
        self._packing = packing_of([tokens]).to(table.device)
        self._stream, *self._others = streams
        kept = sweep.factors.takes if self.by_factors else lambda parameter: False
        self._plain = [p for p in body.parameters() if p.requires_grad and not kept(p) and p is not table]
        self._weights = [(p, p.data_ptr()) for p in body.parameters()]
        self._run_once(sweep)

    @property
    def places(self) -> int:
        """The most sequences that it can hold, padding included."""
        return self._packing.places

    def run(self, embeds: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        """The last hidden states [1, T, H], differentiable; backward keeps factors and leaves gradients as the layers'
        own does. embeds: [1, T, H]; positions: int64 [1, T]."""
        if any(parameter.data_ptr() != address for parameter, address in self._weights):
            raise RuntimeError(f"weights have moved since a row of {self.tokens} tokens was captured")
        self._positions.copy_(positions)
        for name in ("starts", "starts32", "chunks"):
            getattr(self._packing, name).copy_(getattr(packing, name))
        if not embeds.requires_grad:  # frozen: what comes out is to be differentiated all the same
            embeds = embeds.detach().requires_grad_()
        return _Replay.apply(embeds, self)  # type: ignore[no-any-return]

    # -- capturing ------------------------------------------------------------------------------------------------

    def capture(self, sweep: FactorSweep, pool: Any) -> None:
        """Make the graphs, once. pool: of `torch.cuda.graph`."""
        torch.cuda.synchronize()
        with no_collector():
            self._capture(sweep, partial(self._graph, pool))

    def _capture(self, sweep: FactorSweep, graph: Callable[..., Any]) -> None:
        self.forward_graph, hidden = graph(self._layers)
        self.backward_graph, gradients = graph(lambda: self._gradients(hidden))
        self.norm_graph: torch.cuda.CUDAGraph | None = None
        self._measured: list[Tensor] = []
        if self.by_factors:
            self.norm_graph, (self._measured, found) = graph(lambda: self._squares(sweep))
            self._known = alias(found)
        # The owners of all this go: the memory is then the pool's again, and the graphs' all the same.
        self._hidden, self._inner = alias(hidden), alias(gradients[0])
        self._products = [
            (weight, Product(alias(one.left), alias(one.right), one.first)) for weight, one in self.factors.products()
        ]
        self._left = [(p, alias(g)) for p, g in zip(self._plain, gradients[1:], strict=True) if g is not None]
        self._drop()

    def _run_once(self, sweep: FactorSweep) -> None:
        """What a first run loads, a capture cannot load."""
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                hidden = self._layers()
                self._outer = torch.zeros_like(hidden)
                self._gradients(hidden)
                if self.by_factors:
                    self._squares(sweep)
                del hidden
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._drop()

    def _squares(self, sweep: FactorSweep) -> tuple[list[Tensor], Tensor]:
        parameters, found = sweep.squares(self.body.parameters(), self._others)
        assert found is not None
        return parameters, found

    def _graph(self, pool: Any, work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self._stream):
            made = work()
        return graph, made

    def _layers(self) -> Tensor:
        # Another object: what fla derives from it, it derives within the graph.
        packing = replace(self._packing, starts=self._packing.starts.view(-1))
        return self.body(  # type: ignore[no-any-return]
            inputs_embeds=self._embeds,
            position_ids=self._positions,
            attention_mask=NO_MASKS,
            packing=packing,
            use_cache=False,
        ).last_hidden_state

    def _gradients(self, hidden: Tensor) -> tuple[Tensor | None, ...]:
        """Of `embeds`, then of the parameters that leave no factors; those of the others are kept."""
        self.factors.begin_pass()
        found = torch.autograd.grad(hidden, [self._embeds, *self._plain], self._outer, allow_unused=True)
        for parameter, gradient in zip(self._plain, found[1:], strict=True):
            parameter.grad = gradient
        return found

    def _drop(self) -> None:
        self.factors.forget()
        for parameter in self._plain:
            parameter.grad = None

    # -- replaying ------------------------------------------------------------------------------------------------

    def forward(self, embeds: Tensor) -> Tensor:
        """Replay; [1, T, H]."""
        with torch.no_grad():
            self._embeds.copy_(embeds)
        self.forward_graph.replay()
        return self._hidden.detach()

    def backward(self, outer: Tensor) -> Tensor:
        """Replay, keep and leave what the layers' backward would; the gradient of the embeddings, [1, T, H]."""
        self._outer.copy_(outer)
        self.backward_graph.replay()
        if self.norm_graph is not None:
            self.norm_graph.replay()
            self.factors.known = self._measured, self._known
        for weight, product in self._products:
            self.factors.keep(weight, product)
        for parameter, gradient in self._left:
            parameter.grad = gradient
        return self._inner.detach()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeds: Tensor, row: CapturedRow) -> Tensor:
        ctx.row = row
        return row.forward(embeds)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.row.backward(outer), None


@contextmanager
def no_collector() -> Iterator[None]:
    """Python's garbage collector runs before and not meanwhile.

    Graphs of autograd that nobody needs any more can be in cycles. While one lives, backward waits for the stream that
    it was made on, and a capture cannot; nor can it free what others allocated.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Address:
    """Memory of a GPU as others describe it to torch: see `__cuda_array_interface__` in Numba's documentation."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"<i{size}",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def alias(tensor: Tensor) -> Tensor:
    """The same memory, not owned."""
    return torch.as_tensor(_Address(tensor), device=tensor.device).view(tensor.dtype)
