"""Named points at which a test can kill or stop this process, to prove what a crash or a hang there leaves behind.

`TANDEM_FAULT=NAME` (or `NAME:K` for the K-th pass) makes `point(NAME)` a kill -9 of ourselves; with `:stop` at its end,
a SIGSTOP, after which we hang until somebody sends SIGCONT. Unset, as in production, `point` is one dictionary look-up.
Where a trainer is divided over ranks, each its own process, `TANDEM_FAULT` is rank 0's and `TANDEM_FAULT_RANK_1` rank
1's.
"""

import os
import signal

UPDATE_POINTS = ("backward", "journaled", "paused", "applying", "swept", "applied", "resumed", "committed")
"""In the order in which an update passes them: gradients half computed; the batch in the journal; server paused, header
still CLEAN; header APPLYING, before the first write; header APPLYING, after the last write; header CLEAN with the new
version, server still paused; server running, Redis not yet told; Redis told."""
RECOVERY_POINTS = ("restoring", "restored")
"""While weights are made again: header APPLYING, nothing restored; restored and replayed, header still APPLYING."""
CHECKPOINT_POINTS = ("checkpointing", "checkpointed")
"""A checkpoint whole under its temporary name; under its own name, the journal not yet shortened."""
POINTS = UPDATE_POINTS + RECOVERY_POINTS + CHECKPOINT_POINTS

_armed: dict[str, int] = {}
_signal = signal.SIGKILL


def arm(setting: str | None) -> None:
    """Obey `setting` (NAME[:K][:stop]) from now on, and nothing else; None or empty disarms every point."""
    global _signal
    _armed.clear()
    if not setting:
        return
    plain = setting.removesuffix(":stop")
    _signal = signal.SIGKILL if plain == setting else signal.SIGSTOP
    name, _, count = plain.partition(":")
    if name not in POINTS:
        raise ValueError(f"TANDEM_FAULT={setting}: unknown point, choose one of {', '.join(POINTS)}")
    if count and not (count.isdigit() and int(count)):
        raise ValueError(f"TANDEM_FAULT={setting}: {count!r} is not a count, write {name}:1 for the first pass")
    _armed[name] = int(count or 1)


def point(name: str) -> None:
    """Die, or stop, here when the environment asks for it."""
    if name in _armed:
        _armed[name] -= 1
        if _armed[name] <= 0:
            del _armed[name]
            os.kill(os.getpid(), _signal)


def environment_of_rank(rank: int) -> dict[str, str]:
    """What the process of `rank` gets of our environment: the fault that is its own, once."""
    fault = os.environ.pop(f"TANDEM_FAULT_RANK_{rank}", "")
    return dict(os.environ) | {"TANDEM_FAULT": fault}


arm(os.environ.get("TANDEM_FAULT"))
