"""`ApolloMini`: a torch optimizer with AdamW's step sizes and, for a matrix, a few numbers of state a row or column.

It knows parameters and groups. The order of a step is in steps.py, the arithmetic in formulas.py and factored.py, and
in cpu.py or cuda.py, chosen by the parameters' device. Must not know: Redis, vLLM, transformers.

Invariants: everything that outlives a step is in the state area or follows from (seed, id, step). A burst that meets a
non-finite gradient changes nothing. One matrix's result does not depend on which others are updated with it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from worker.apollo.backends import backend_for, one_device
from worker.apollo.errors import ApolloError
from worker.apollo.gradient_hooks import OneBehind, Pairs, collecting
from worker.apollo.parameters import Backend, LastUpdate, Options, Projection, Slot, SumOverShards, make_slots
from worker.apollo.products import GradientProduct, Part
from worker.apollo.rehearsal import rehearse
from worker.apollo.saved_groups import check_groups, load_groups, plain_groups
from worker.apollo.slot_table import SlotTable
from worker.apollo.state_layout import APOLLO, MATRIX_ALGORITHMS, StateArea
from worker.apollo.steps import Steps


class ApolloMini(torch.optim.Optimizer):
    """APOLLO-Mini (arXiv 2412.05270: rank 1, tensor-wise scaling) for matrices, AdamW with fp32 moments for the rest.

    params: tensors, (name, tensor) pairs, or group dicts, all on one device, bfloat16 or float32. They may be row
    slices of merged weights with any row stride; each is a logical matrix of its own. So is each matrix of a stack
    [E, rows, cols] (a mixture's experts): one without a gradient in a step, all zeros, keeps its weights and its state,
    and counts its own steps. Gradients may be either, too.
    matrices: "factored" has them take the rule of factored.py, which knows neither b1, scale, gamma nor projections.
    sum_over_shards: where parameters are parts of matrices that several processes hold, adds tensors up over them, in
    place; all processes call alike, for the same parameters in the same order.
    Group keys besides the hyper-parameters: "algorithm" ("apollo" | "factored" | "adamw") overrides the choice by
    shape; "ids", an int a parameter, names it in every random draw, together with the number of a matrix in its stack
    (default: its rank among the sorted names, or its position when nameless); "places", a (first row, first column,
    full row length) a parameter, says where a shard lies in its unsharded matrix, so that its rounding bits are that
    matrix's; "shards", a `Shard` or None a parameter, says which part of a whole each is: its step is then the whole's,
    up to the order of sums.
    lr: what it means follows `scale`: the update's RMS is about lr * sqrt(scale / min(rows, cols)); scale="auto" is
    min(rows, cols) for each matrix, with which a step is about as long as AdamW's at the same lr. Factored: about lr.
    gamma: the norm-growth limiter's; math.inf switches it off. projection_gap: steps between redraws of P.
    rounding: how bf16 weights are written, "stochastic" or "nearest"; the latter loses most of a small update.
    projection: for tests, (index, shape, draw) -> P.
    state: flat uint8 memory of `state_bytes(shapes)` bytes, on the parameters' device, for everything that must survive
    this object; all zero means a fresh start. Raises `ApolloError` if it belongs to other parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scale: float | str = "auto",
        scale_front: bool = False,
        gamma: float = 1.01,
        projection_gap: int = 200,
        seed: int = 0,
        rounding: str = "stochastic",
        projection: Projection | None = None,
        state: Tensor | None = None,
        matrices: str = APOLLO,
        sum_over_shards: SumOverShards | None = None,
    ) -> None:
        if matrices not in MATRIX_ALGORITHMS:
            raise ValueError(f'matrices take "apollo" or "factored", not {matrices!r}')
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f'rounding is "stochastic" or "nearest", not {rounding!r}')
        if projection_gap < 1 or not 0 <= seed < 1 << 64:
            raise ValueError("projection_gap is at least 1 and seed a 64-bit unsigned integer")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "scale": scale,
            "scale_front": scale_front,
            "gamma": gamma,
        }
        self._slots: list[Slot] = []
        super().__init__(params, defaults)
        self._matrices = matrices
        self._slots = make_slots(self.param_groups, self._matrices)
        self._table = SlotTable(self._slots)
        device = one_device(self._slots)
        layout = self._table.layout()
        memory = state if state is not None else torch.zeros(layout.total, dtype=torch.uint8, device=device)
        if memory.device != device:
            raise ApolloError(f"the optimizer's state memory is on {memory.device} and the parameters on {device}")
        self.area = StateArea(memory, layout)
        self._options = Options(seed, rounding == "stochastic", projection, sum_over_shards)
        self._steps = Steps(self._make_backend(device), self.area, projection_gap)

    # -- a step ---------------------------------------------------------------------------------------------------

    @property
    def step_count(self) -> int:
        """Steps taken over the life of the state area. On CUDA, launched: a refused one counts until told."""
        return self._steps.count

    @property
    def last_update(self) -> LastUpdate:
        """How large the last step was."""
        return self._steps.last_update

    @property
    def projection_gap(self) -> int:
        """Steps between redraws of P."""
        return self._steps.projection_gap

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        grads: Sequence[Tensor | None] | None = None,
        step_scale: float = 1.0,
    ) -> float | None:
        """Burst: apply every gradient that is there, in one sweep, or none.

        grads: one per parameter, in order, instead of the parameters' own `.grad` (a None is skipped). step_scale: the
        batch's own multiplier of the step, 0 or more, decay included; a factor on the gradients would change nothing,
        since the step is normalised. It multiplies after the limiter, and moments never see it. On a CPU, raises
        `NonFiniteGradientError` before anything changes; on CUDA nothing changes either, and `check`, `last_update` or
        a later step raises it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = grads if grads is not None else [parameter.grad for parameter in self._table.parameters]
        found = [
            (p, gradient) for p, gradient in zip(self._table.parameters, given, strict=True) if gradient is not None
        ]
        with self._steps.one(step_scale):
            self._steps.update(self._table.pairs(found))
        return loss

    def capture(self) -> Callable[..., None]:
        """CUDA: a burst over the gradients that are there now, as one CUDA graph; calling the result is a step, and
        takes `step_scale` as `step` does.

        The gradients' memory is the graph's input from then on: fill it in place. Needs one `step()` with the same
        gradients before, which compiles the kernels.
        """
        pairs = [(p, p.grad) for p in self._table.parameters if p.grad is not None]
        return self._steps.capture(self._table.pairs(pairs))

    def prepare(self) -> None:
        """Do ahead what the next step would do first: on CUDA, once in `projection_gap` steps, draw new projections on
        the CPU, a fraction of a second for a large model. Optional; call it before pausing a server for the step."""
        self._steps.prepare()

    def warm_up(self) -> None:
        """Compile what a step needs, on tensors of its own: the first step then takes as long as any other."""
        rounding = "stochastic" if self._options.stochastic else "nearest"
        rehearse(self._slots, partial(ApolloMini, lr=0.0, rounding=rounding, seed=self._options.seed))

    def begin(self, step_scale: float = 1.0) -> None:
        """Streaming: open a step. Then `update` each parameter once, in any order, then `finish`.

        step_scale: as for `step`. Raises `ApolloError` for one that is negative or not finite.
        """
        self._steps.begin(step_scale)

    def update(self, parameter: Tensor, grad: Tensor | None = None) -> None:
        """Streaming: apply `grad` (default: the parameter's own) now; the caller may free it as soon as this returns.

        Same result, bit for bit, as a burst. A non-finite gradient leaves its own matrix alone; the ones applied before
        it stay applied. Raises like `step`.
        """
        gradient = grad if grad is not None else parameter.grad
        if gradient is None:
            raise ApolloError("update() was given a parameter without a gradient")
        self.update_many([(parameter, gradient)])

    @torch.no_grad()
    def update_many(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Streaming, several (parameter, gradient) at a time: the same result with fewer launches."""
        self._steps.update(self._table.pairs(pairs))

    def takes_product(self, weight: Tensor, parts: Sequence[Part]) -> bool:
        """Whether a step can be decided from the products that a gradient is made of: on CUDA, of a whole matrix under
        APOLLO's rule, of factors in bf16."""
        return self._steps.backend.takes_product(self._table.first(weight), parts)

    @torch.no_grad()
    def prepare_products(self, given: Sequence[GradientProduct]) -> Any:
        """For `decide_products`: all that it needs of the host, and of memory. Each was taken by `takes_product`."""
        return self._steps.backend.prepare_products([(self._table.first(one.weight), one) for one in given])

    @torch.no_grad()
    def decide_products(self, prepared: Any) -> None:
        """Streaming: what `write` will move these matrices by, before any other gradient of the step. R is that of
        the products in fp32, not of gradients in bf16: moments differ in their last bits from those of `update`."""
        self._steps.decide_products(prepared)

    @torch.no_grad()
    def write(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Streaming: move matrices that `decide_products` was given, by their gradients, which are read once."""
        self._steps.write(self._table.pairs(pairs))

    def sweep_order(self) -> list[Tensor]:
        """All parameters, in the order in which `update_many` takes the fewest launches for neighbours."""
        return list({id(slot.parameter): slot.parameter for slot in self._steps.backend.order()}.values())

    @property
    def sum_over_shards(self) -> SumOverShards | None:
        """What adds tensors up over the processes that hold shards; None where all parameters are whole."""
        return self._options.sum_over_shards

    def is_shard(self, parameter: Tensor) -> bool:
        """Whether it is a part of what several processes hold."""
        return self._table.first(parameter).shard is not None

    def name_of(self, parameter: Tensor) -> str:
        """What errors call it."""
        return self._table.name_of(parameter)

    def finish(self) -> None:
        """Close the step: the step count goes up by one."""
        self._steps.finish()

    def abandon(self) -> None:
        """Close a step that failed half-way: the step count stays, and so do the matrices already applied."""
        self._steps.abandon()

    @contextmanager
    def streaming(
        self,
        bucket_bytes: int = 1 << 30,
        *,
        step_scale: float = 1.0,
        before: Callable[[Pairs], Callable[[], None] | None] = lambda pairs: None,
    ) -> Iterator[None]:
        """Inside, one `backward` is one step: gradients are applied and freed as they come.

        Up to `bucket_bytes` of them are held back and applied together, which saves launches and changes no result; 0
        applies each at once. step_scale: as for `step`. before: is given them first, and may change them in place. What
        it returns is called before they are applied, which is when the next come: until then they may go on changing.
        """
        buckets = OneBehind(before, self.update_many)
        with self._steps.one(step_scale):
            with collecting(self._table.trained(), bucket_bytes, buckets.give, self._table.whole_bytes):
                yield
            buckets.finish()

    @contextmanager
    def dropping(self, bucket_bytes: int = 1 << 30) -> Iterator[None]:
        """As `streaming`, but that gradients are dropped where they would be applied: no step, the same memory."""
        with collecting(self._table.trained(), bucket_bytes, lambda bucket: None, self._table.whole_bytes):
            yield

    def check(self) -> None:
        """Raise `NonFiniteGradientError` if a step was refused and nobody was told yet; waits for the device."""
        self._steps.told(self._steps.backend.check)

    # -- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain data and one tensor: {"state": {"area": uint8}, "run": {...}, "param_groups": [...]}; loads with
        `weights_only=True`, and `area` alone is what safetensors has to keep."""
        area = self.area.memory[: self.area.layout.total].detach().clone()
        options = self._options
        run = {"seed": options.seed, "projection_gap": self.projection_gap, "stochastic": options.stochastic}
        return {"state": {"area": area}, "run": run, "param_groups": plain_groups(self.param_groups)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state, hyper-parameters, seed, gap and rounding; the next step is what it would have been there.

        Raises `ApolloError` if the state belongs to other parameters.
        """
        check_groups(self.param_groups, state_dict["param_groups"])
        self.area.load(state_dict["state"]["area"].to(self.area.memory.device))
        load_groups(self.param_groups, state_dict["param_groups"])
        run = state_dict["run"]
        self._options = replace(self._options, seed=run["seed"], stochastic=run["stochastic"])
        self._slots = make_slots(self.param_groups, self._matrices)
        self._table = SlotTable(self._slots)
        self._steps.resume(self._make_backend(self.area.memory.device), run["projection_gap"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._slots:
            raise ApolloError("parameters cannot be added later: the state's layout is fixed when ApolloMini is made")
        super().add_param_group(param_group)

    # -- construction ---------------------------------------------------------------------------------------------

    def _make_backend(self, device: torch.device) -> Backend:
        return backend_for(device, self._slots, self.area, self._options)
