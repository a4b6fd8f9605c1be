"""Child processes that do not outlive us."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """For `preexec_fn`: the child gets signal `number` when the thread that made it dies, however it does. Survives
    exec."""
    _libc.prctl(_PR_SET_PDEATHSIG, number)
