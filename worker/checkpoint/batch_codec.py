"""A batch as it lies in the journal: transcripts, and their very tokens and masks, in order.

Must not know: Redis, torch.
Invariant: what is unpacked has the tokens, masks, kinds, weights and order of what was packed, whatever became of the
chat template or the tokenizer.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from producer.errors import TandemError
from producer.transcript import Transcript
from worker.checkpoint.records import UpdateRecord
from worker.data.example_codec import example_of, plain_example
from worker.data.examples import Example
from worker.data.replay_buffer import PREFIX


class ReplayError(TandemError):
    """A journaled batch cannot be trained again."""


@dataclass(frozen=True)
class Ready:
    """A transcript that is ready to train: what the consumer holds, and what the journal keeps."""

    example: Example
    transcript: dict[str, Any]

    @property
    def id(self) -> str:
        return self.example.id

    @property
    def tokens(self) -> int:
        """What it costs: all that the model reads of it, as student and as teacher."""
        return self.example.tokens + self.example.teacher_tokens


def rename(ready: Ready, id: str) -> Ready:
    """The same under another id: a rehearsed transcript."""
    return Ready(dataclasses.replace(ready.example, id=id), ready.transcript)


def unpack_ready(record: UpdateRecord, dropped: frozenset[str]) -> list[Ready]:
    """As `unpack_batch`, with the transcripts."""
    texts = {item["id"]: item["transcript"] for item in record.batch or []}
    return [Ready(example, texts[example.id]) for example in unpack_batch(record, dropped)]


def make_ready(transcript: Transcript, example: Example) -> Ready:
    """Pair an example with the plain map it came from (without the application's own meta)."""
    return Ready(example, transcript.to_dict(meta=False))


def pack_batch(ready: Iterable[Ready]) -> list[dict[str, Any]]:
    """The batch as it goes into the journal: transcripts, and their tokens and masks as bytes, in order."""
    return [{"transcript": item.transcript, **plain_example(item.example)} for item in ready]


def unpack_batch(record: UpdateRecord, dropped: frozenset[str]) -> list[Example]:
    """The examples of a journaled batch, without those of `dropped`. Raises `ReplayError`."""
    if record.batch is None:
        raise ReplayError(
            f"version {record.version} cannot be trained again: its transcripts have expired (--keep-transcripts)"
        )
    return [example_of(item) for item in record.batch if item["id"].removeprefix(PREFIX) not in dropped]


def ready_of(item: dict[str, Any]) -> Ready:
    """One of what `pack_batch` made."""
    return Ready(example_of(item), item["transcript"])
