"""A member of a group, as a process: python group_member.py PLACE ADDRESS SCENARIO SECONDS. Its last line is JSON.

sum: both add up. lost: member 1 is gone when member 0 adds up for the second time. left: it leaves before that. In both
member 0 then meets another member 1, whose scenario is sum.
"""

import json
import os
import sys
import time
from typing import Any

PLACE, ADDRESS, SCENARIO, SECONDS = int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])


def main() -> dict[str, Any]:
    import torch

    from worker.distributed.errors import GroupLostError
    from worker.distributed.rendezvous import Address, Rendezvous
    from worker.distributed.sums import begin_sum, sum_in_order

    device = "cuda" if torch.cuda.is_available() else "cpu"
    meeting = Rendezvous(Address.parse(ADDRESS), PLACE, 2, seconds=SECONDS)
    if PLACE == 0:
        meeting.open()

    def meet() -> Any:
        group = meeting.form([1], 600, lambda hello: None) if PLACE == 0 else meeting.join({}, lambda: False)
        assert group is not None
        return group

    def added(group: Any) -> list[float]:
        tensors = [torch.full((1 << 20,), 1.0 + PLACE, dtype=torch.bfloat16, device=device) for _ in range(3)]
        first, rest = tensors[:1], tensors[1:]
        wait = begin_sum(group, first, [0, 1])
        sum_in_order(group, rest, [0, 1])
        if wait is not None:
            wait()
        group.settle()
        return [float(tensor.max()) for tensor in tensors] + [float(tensor.min()) for tensor in tensors]

    group = meet()
    said: dict[str, Any] = {"first": added(group)}
    if SCENARIO == "left" and PLACE == 1:
        started = time.monotonic()
        group.close("leaves")
        return said | {"left after": time.monotonic() - started}
    if SCENARIO == "lost" and PLACE == 1:
        os._exit(9)
    if SCENARIO in ("lost", "left"):
        time.sleep(2)
        try:
            added(group)
        except GroupLostError as error:
            said["lost"] = str(error)
        said["device works"] = float((torch.ones(3, device=device) + 1).sum())
        print("ready", flush=True)
        group = meet()
        said["again"] = added(group)
    group.exchange({"bye": True})
    group.close()
    return said


if __name__ == "__main__":
    print(json.dumps(main()), flush=True)
    os._exit(0)
