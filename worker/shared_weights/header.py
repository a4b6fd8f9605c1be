"""The header beside the weights: which lineage they are, which version was applied last, and whether they are whole.

It lies in the weights' own memory and dies with them, so it is the truth that Redis is compared with.

The fence is a number that a trainer gets with its lease on the weights. To take the lease back, the server moves the
fence first and reads the state afterwards; to begin, the trainer writes APPLYING first and reads the fence afterwards.
So at least one of them sees the other, wherever the trainer was stopped: it never writes to weights that the server
believes whole.

Invariants: `state` is APPLYING from before the first byte of an update until after the last; `version` is only ever
moved while APPLYING; the fence only grows, and only the owner of the weights moves it. Every write is a torch copy on
the tensor's device, so that on CUDA it is ordered with the kernels that change the weights; each is one aligned 8-byte
word, so that a reader in another process sees old or new.

Must not know: Redis, vLLM.
"""

import uuid

import torch

from producer.errors import TandemError

HEADER_BYTES = 64
"""Size of the area: eight int64 words."""

CLEAN, APPLYING = "CLEAN", "APPLYING"

_MAGIC = int.from_bytes(b"TANDEM\x00\x02", "big")  # the last byte is the layout's number
_LINEAGE_HIGH, _LINEAGE_LOW, _VERSION, _STATE, _FENCE = 1, 2, 3, 4, 5  # word numbers; word 0 is the magic
_STATE_CODES = {CLEAN: 1, APPLYING: 2}
_STATE_NAMES = {code: name for name, code in _STATE_CODES.items()}


class HeaderError(TandemError):
    """The header is not one of ours, or a step of the update protocol came out of order."""


class LeaseLostError(TandemError):
    """The server took the lease back before the first write: nothing was written."""


class Header:
    """Reads and writes the header in `tensor`, a uint8 tensor of `HEADER_BYTES` in the weights' memory (any device)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        if tensor.dtype != torch.uint8 or tensor.shape != (HEADER_BYTES,):
            raise HeaderError(f"a header is {HEADER_BYTES} bytes (uint8), not {tuple(tensor.shape)} {tensor.dtype}")
        self._words = tensor.view(torch.int64)

    def adopt(self, lineage: str, version: int) -> None:
        """Start `lineage` (32 hex digits) at `version`, CLEAN: for the owner of new weights, or after a restore."""
        value = uuid.UUID(hex=lineage).int
        self._put(_STATE, _STATE_CODES[APPLYING])
        self._put(_LINEAGE_HIGH, _signed(value >> 64))
        self._put(_LINEAGE_LOW, _signed(value & (2**64 - 1)))
        self._put(_VERSION, version)
        self._put(0, _MAGIC)
        self._settle()

    def begin(self, fence: int) -> None:
        """Say that an update is being applied, by the trainer that got `fence` with its lease.

        `HeaderError` if one already is: the weights are torn. `LeaseLostError`, and still CLEAN, if the server took the
        lease back.
        """
        if self.state != CLEAN:
            raise HeaderError("an update was begun and never finished: the weights are torn, restart the server")
        self._put(_STATE, _STATE_CODES[APPLYING])
        if self.fence != fence:
            self._settle()
            raise LeaseLostError(
                "the server took its weights back, because this trainer was silent for longer than its lease; nothing"
                " was written: start the trainer again"
            )

    def hold(self, fence: int) -> None:
        """`begin`, unless an update is begun already: to make weights again, which may be torn."""
        if self.state == CLEAN:
            self.begin(fence)

    def revoke(self) -> dict[str, str | int]:
        """Take back every lease given so far; the fields as they are then. For the owner of the weights alone.

        CLEAN: nobody with an older fence will begin any more. APPLYING: one may be writing, or about to find out.
        """
        self._put(_FENCE, self.fence + 1)
        return self.fields()

    def finish(self, version: int) -> None:
        """Say that the weights are wholly `version` (the one before, if nothing was written after all).

        `HeaderError` without a `begin`, or if `version` goes back.
        """
        fields = self.fields()
        if fields["state"] != APPLYING:
            raise HeaderError("no update was begun: finish() without begin()")
        if version < int(fields["version"]):
            raise HeaderError(f"version {version} lies before {fields['version']}")
        self._put(_VERSION, version)
        self._settle()

    def abandon(self) -> None:
        """Take `begin` back: the update was refused before its first write, the version stays."""
        if self.state != APPLYING:
            raise HeaderError("no update was begun: abandon() without begin()")
        self._settle()

    def fields(self) -> dict[str, str | int]:
        """{"lineage": 32 hex digits, "version": int, "state": "CLEAN" | "APPLYING", "fence": int}, read in one copy."""
        words = self._words.cpu().tolist()
        if words[0] != _MAGIC:
            raise HeaderError("no header of this version of Tandem lies beside the weights: restart the server")
        if words[_STATE] not in _STATE_NAMES:
            raise HeaderError(f"the header's state is {words[_STATE]}, which is not a known state: restart the server")
        lineage = ((words[_LINEAGE_HIGH] % 2**64) << 64) | (words[_LINEAGE_LOW] % 2**64)
        return {
            "lineage": f"{lineage:032x}",
            "version": words[_VERSION],
            "state": _STATE_NAMES[words[_STATE]],
            "fence": words[_FENCE],
        }

    @property
    def lineage(self) -> str:
        """The weights' life, as 32 hex digits; a restarted server has another."""
        return str(self.fields()["lineage"])

    @property
    def version(self) -> int:
        """The version applied last."""
        return int(self.fields()["version"])

    @property
    def state(self) -> str:
        """CLEAN, or APPLYING while an update is being written (and for ever, if its trainer died)."""
        return str(self.fields()["state"])

    @property
    def fence(self) -> int:
        """The number that a lease given now would have."""
        return int(self.fields()["fence"])

    def _settle(self) -> None:
        """CLEAN, and wait until it is written: other processes read the header on streams of their own."""
        self._put(_STATE, _STATE_CODES[CLEAN])
        self.fields()

    def _put(self, word: int, value: int) -> None:
        self._words[word].fill_(value)


def _signed(word: int) -> int:
    """The int64 with the bits of the unsigned `word`."""
    return word - 2**64 if word >= 2**63 else word
