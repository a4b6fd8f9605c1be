"""The bytes that the fuzz tests throw, and a watch for code that they should not be able to run."""

import pickle
import sys
from typing import Any

import msgpack
from hypothesis import strategies as st


class Evil:
    """Unpickled, it would call a shell; `Watch` sees that it was looked up at all."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return (os.system, ("true",))


class Watch:
    """Sees every process started and every class looked up by pickle in this process, between `with` and its end."""

    EVENTS = frozenset(
        {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class"}
    )
    _hooked = False
    _seen: list[str] | None = None

    def __enter__(self) -> list[str]:
        if not Watch._hooked:  # a hook cannot be taken away again
            sys.addaudithook(Watch._hook)
            Watch._hooked = True
        Watch._seen = []
        return Watch._seen

    def __exit__(self, *_: object) -> None:
        Watch._seen = None

    @staticmethod
    def _hook(event: str, arguments: Any) -> None:
        if Watch._seen is not None and event in Watch.EVENTS:
            Watch._seen.append(event)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=10)
    | st.binary(max_size=10) | st.sampled_from(["worker.train", "os.system", "state", "hello", "pause", "resume"]),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=5)
    ),
    max_leaves=20,
)  # fmt: skip
nasty = st.sampled_from([
    b"\xdd\xff\xff\xff\xff", b"\xc7\x0c\xff" + b"\xff" * 12, b"\x91" * 900 + b"\xc0", b"\x91" * 5000 + b"\xc0",
    b"\xdf\x00\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x81\x80\xc0", b"\xc1", pickle.dumps(Evil()),
])  # fmt: skip
packed = st.binary(max_size=200) | plain.map(msgpack.packb) | nasty
