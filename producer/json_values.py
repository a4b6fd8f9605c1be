"""JSON values of a file that is no JSONL: an array, objects over several lines, or several of these in a row.

Knows where a value ends, and nothing else of JSON: what is between is parsed, and refused, by itself.
Invariants: holds one block and one value; how the bytes arrive changes nothing; no byte of a value is lost or changed.
"""

import re
from collections.abc import Callable, Iterator

Value = tuple[int, bytes | ValueError | None]
"""The number of the line where it begins, from 1, and its bytes; None: too long to be kept; or what is wrong there."""

MARK = b"\xef\xbb\xbf"
_OUTSIDE = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'["\\]')


def values(read: Callable[[], bytes], longest: int) -> Iterator[tuple[list[Value], int]]:
    """The values that each block completes, and the block's size. A top-level array stands for its elements.

    read: the next block, b"" at the end. longest: bytes of a value that are kept.
    """
    splitter = _Splitter(longest)
    first = True
    while block := read():
        size = len(block)
        if first:
            block, first = block.removeprefix(MARK), False
        yield splitter.feed(block), size
    yield splitter.end(), 0


class _Splitter:
    """Where values begin and end, across blocks."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.line = 1
        self.array = False
        """Inside an array of the top level, whose elements are the values."""
        self._depth = 0
        """Of the value that is being read."""
        self._string = False
        self._escaped = False
        """The block ended between a backslash and what it escapes."""
        self._begin()

    def _begin(self) -> None:
        self._kept = bytearray()
        self._start: int | None = None
        self._too_long = False

    def feed(self, block: bytes) -> list[Value]:
        found: list[Value] = []
        taken = position = 0
        if self._escaped and block:
            self._escaped, position = False, 1
        while match := (_INSIDE if self._string else _OUTSIDE).search(block, position):
            position, token = match.end(), match[0]
            if token == b"\\":
                self._escaped = position == len(block)
                position += 1
            elif token == b'"':
                self._string = not self._string
            elif token == b"[" and not self._depth and not self.array:
                found += self._done(block[taken : position - 1])
                self.array, taken = True, position
            elif token in b"[{":
                if not self._depth and not self.array:
                    found += self._done(block[taken : position - 1])
                    taken = position - 1
                self._depth += 1
            elif token == b",":
                if not self._depth:
                    found += self._done(block[taken : position - 1])
                    taken = position
            elif self._depth:
                self._depth -= 1
                if not self._depth and not self.array:
                    found += self._done(block[taken:position])
                    taken = position
            else:  # the end of the array, or a closing bracket too many, which is reported with what follows
                found += self._done(block[taken : position - 1])
                taken = position if self.array else position - 1
                self.array = False
        self._keep(block[taken:])
        return found

    def end(self) -> list[Value]:
        found = self._done(b"")
        if self.array:
            found.append((self.line, ValueError("the input ends inside an array here: it was cut off")))
        return found

    def _keep(self, piece: bytes) -> None:
        if self._start is None:
            text = piece.lstrip()
            self.line += piece.count(b"\n", 0, len(piece) - len(text))
            if not text:
                return
            self._start, piece = self.line, text
        self.line += piece.count(b"\n")
        self._too_long |= len(self._kept) + len(piece) > self.longest
        if self._too_long:
            self._kept.clear()
        else:
            self._kept += piece

    def _done(self, piece: bytes) -> list[Value]:
        self._keep(piece)
        found: list[Value] = []
        if self._start is not None:
            found.append((self._start, None if self._too_long else bytes(self._kept)))
        self._begin()
        return found
