"""A run that is told to stop: the signals, the exit status, and whether one has come.

Schedulers announce a preemption or the end of the time by a signal, and kill what is still there some time later. In
between, a training finishes its step and writes a checkpoint within the epoch (`enact_common.run`).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Of a training that a signal stopped, and that goes on with --auto_resume. In sysexits.h: try again later.
STOPPED = 75

# SIGTERM comes from `docker stop`, Kubernetes, torchrun and schedulers that preempt; SIGUSR1 from whoever is asked to
# send it before the time is up (Slurm's --signal); SIGUSR2 from submitit.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)  # Windows has the first alone

_received: signal.Signals | None = None


class Stopped(Exception):
    """A signal stopped the run. The message says what was saved and how to go on."""


def stop_requested() -> signal.Signals | None:
    """The signal that asked this process to stop, since `listening` began the last time; None where none came."""
    return _received


@contextmanager
def listening() -> Iterator[None]:
    """A block in which the signals that ask a process to stop are remembered and do nothing else.

    Outside the main thread, where Python installs no handlers, the signals do what they did before.
    """
    global _received
    _received = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def remember(number: int, frame: FrameType | None) -> None:
        global _received
        if _received is None:
            _received = signal.Signals(number)

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
