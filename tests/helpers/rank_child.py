"""Test program: another rank of `RankProcesses`, which sums, and fails as it is told."""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from patience import until

from producer.errors import TandemError
from worker.distributed.rank_processes import inherited, meet
from worker.utils import unix_socket


class OtherError(TandemError):
    """Another one than rank 0's."""


def total() -> float:
    """The sum over the ranks of 1, which all must ask for."""
    one = torch.ones(1)
    dist.all_reduce(one)
    return float(one)


def main() -> None:
    import sys

    sock = inherited(sys.argv)
    told = unix_socket.receive(sock)
    if told.get("refuse"):
        unix_socket.send(sock, {"failed": "this part fits nowhere"})
        return
    unix_socket.send(sock, {"ready": os.getpid()})
    while (message := unix_socket.receive(sock)) is not None:
        raised = None
        if message["op"] == "meet":
            meet(told)
        elif message["op"] == "sum":
            total()
        elif message["op"] == "raise":
            raised = message["name"]
        elif message["op"] == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif message["op"] == "wait":
            until(Path(message["for"]).exists, "rank 0's test goes on", pace=0.05)
            if message["sum"]:
                total()
        elif message["op"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif message["op"] == "fail":
            unix_socket.send(sock, {"failed": "no room for this part"})
            os._exit(1)
        unix_socket.send(sock, {"raised": raised})


if __name__ == "__main__":
    main()
