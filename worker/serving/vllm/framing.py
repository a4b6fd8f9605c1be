"""Messages of the control socket on asyncio's streams: bounded in size and in time, from our own user alone.

Invariant: whatever the other side sends or fails to read ends in a WireError or a TimeoutError, never in waiting for
ever.
"""

import asyncio
import socket
from typing import Any

from worker.serving.protocol import MAX_REQUEST
from worker.utils import unix_socket

MESSAGE_SECONDS = 10.0
"""From a message's first bytes to its last. Between messages a trainer may be silent for as long as it likes."""


def peer_pid(writer: asyncio.StreamWriter) -> int:
    """The process at the other end; WireError when it is another user's."""
    transport_socket = writer.get_extra_info("socket")
    with socket.fromfd(transport_socket.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        return unix_socket.check_peer(sock)


async def receive(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next request, or None when the connection ended between requests; WireError for anything malformed."""
    try:
        first = await reader.readexactly(1)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    try:
        async with asyncio.timeout(MESSAGE_SECONDS):
            length = unix_socket.check_length(first + await reader.readexactly(3))
            if length > MAX_REQUEST:
                raise unix_socket.WireError(
                    f"a request of {length} bytes is announced, over the limit of {MAX_REQUEST}"
                )
            return unix_socket.unpack(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        raise unix_socket.WireError("the connection ended in the middle of a request") from None
    except TimeoutError:
        raise unix_socket.WireError(f"the rest of the request did not come within {MESSAGE_SECONDS:g} s") from None


async def send(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> None:
    """Write `reply`; TimeoutError when the other side does not read."""
    try:
        writer.write(unix_socket.pack(reply))
        await asyncio.wait_for(writer.drain(), MESSAGE_SECONDS)
    except ConnectionError:
        pass  # the next read says so
