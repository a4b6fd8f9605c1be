"""What a model says of examples: batches, forward passes, and scores without gradients.

    reader.score(examples)                     mean NLL a token, by id
    reader.drift(examples, then)               how far the weights have moved what they expect

Must not know: Redis, vLLM, the header, versions.
Invariant: nothing here changes a weight. The order of rows, and with it of sums, follows from the examples alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from worker.data.examples import Example
from worker.data.packing import Batch, make_batches, pack
from worker.model.inputs import model_inputs
from worker.model.loss import HeadLoss, head_loss
from worker.model.output_head import OutputHead, head_of
from worker.trainer.captured_row import CapturedRow
from worker.trainer.device_time import DeviceTime
from worker.trainer.teachers import NO_TEACHERS, Teachers
from worker.trainer.token_sums import TokenSums

Part = tuple[Sequence[Example], Teachers]
"""What of a micro-batch is computed here at once: all of it, with empty places for what is not; its teachers."""


class ModelReader:
    """Reads rows with `model`, a transformers causal language model.

    `sizes` are the lengths, in tokens, of packed rows (`packed`, on a GPU) or of rows of their own; `budget` bounds the
    tokens (padding included) of one forward pass of the latter.
    """

    def __init__(
        self, model: torch.nn.Module, *, pad_id: int, sizes: Sequence[int], budget: int = 4096, packed: bool = False
    ) -> None:
        self.model: Any = model
        self.body: Any = self.model.base_model
        self.head: OutputHead = head_of(model)
        self.pad_id = pad_id
        self.sizes = tuple(sizes)
        self.budget = max(budget, max(sizes))
        self.packed = packed
        self.device = next(model.parameters()).device
        self.device_time = DeviceTime()

    def score(self, examples: Sequence[Example]) -> dict[str, float]:
        """Mean NLL per trained token by example id, without gradients; of a correction, of the chosen answer's."""
        sums = self._sums(examples, [(examples, NO_TEACHERS)])
        return dict(zip((one.id for one in examples), sums.means(), strict=True))

    def expectations(self, examples: Sequence[Example]) -> Teachers:
        """What the present weights expect at each trained token of `examples`: for `drift`, whenever."""
        return self._teachers([replace(one, kind="comment", teachers=one.sequences) for one in examples])

    def drift(self, examples: Sequence[Example], then: Teachers) -> dict[str, float]:
        """KL(then | now) by example id, in nats a trained token. then: what `expectations` found for the same."""
        taught = self._sums(examples, [(examples, then)]).taught[:, 0].tolist()
        return {one.id: total / one.trained_tokens for one, total in zip(examples, taught, strict=True)}

    @torch.no_grad()
    def _sums(self, examples: Sequence[Example], parts: Sequence[Part]) -> TokenSums:
        sums = TokenSums(examples)
        for part, teachers in parts:
            for batch in self._batches(part):
                sums.add(batch, self._forward(batch, teachers=teachers), teachers)
        return sums

    @torch.no_grad()
    def _teachers(self, examples: Sequence[Example]) -> Teachers:
        """What the teachers of `examples` expect under the present weights: where there are any, one more forward pass
        without gradients. A replay repeats it bit for bit."""
        teachers = Teachers(examples)
        for batch in self._batches(teachers.reading) if teachers.reading else []:
            teachers.add(batch, self._hidden(batch), self.head)
        return teachers

    @torch.no_grad()
    def token_nll(self, example: Example) -> torch.Tensor:
        """NLL of each trained token [N], fp32 on the host: in the order of an example's one sequence."""
        return torch.cat([self._forward(batch).nll.cpu() for batch in self._batches([example])])

    def _batches(self, examples: Sequence[Example]) -> list[Batch]:
        if not self.packed:
            return make_batches(examples, pad_id=self.pad_id, widths=self.sizes, budget=self.budget)
        return pack(examples, pad_id=self.pad_id, sizes=self.sizes)

    def _forward(self, batch: Batch, factors: torch.Tensor | None = None, teachers: Teachers = NO_TEACHERS) -> HeadLoss:
        """The batch's share of the loss, and what it is made of, by trained token.

        factors: fp32 [examples, 2], what each token is multiplied with in the loss; by default their plain sum.
        """
        each = torch.ones(len(batch.examples)) if factors is None else factors[batch.examples, batch.rejected.long()]
        # A copy to the device waits for what was launched before it: all of them come before the model.
        targets, each = (some.to(self.device) for some in (batch.targets, each))  # [N]
        soft = teachers.of(batch)
        picked = self._hidden(batch)  # [N, H]
        keep = self._head_keeper()
        return head_loss(picked, self.head.weight, targets, each, keep, soft, self.head.after, self.head.vocabulary)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """The last hidden states before each trained token: [N, H]."""
        self.device_time.forward(batch.input_ids.numel())
        before = batch.before.to(self.device)  # [N]
        inputs, row = model_inputs(batch, self.device), self._replay(batch)
        if row is not None:
            hidden = row.run(self.body.embed_tokens(inputs["input_ids"]), inputs["position_ids"], inputs["packing"])
        else:
            hidden = self.body(**inputs, use_cache=False).last_hidden_state  # [B, T, H]
        return hidden.flatten(0, 1).index_select(0, before)

    def _head_keeper(self) -> Any:
        """What keeps the factors of the head's gradient, where somebody wants them: see `head_loss`."""
        return None

    def _replay(self, batch: Batch) -> CapturedRow | None:
        """What stands in for the layers over `batch`, where they are replayed."""
        return None
