"""Signals that ask a process to end: what a training does then, and what every other command does.

Schedulers announce a preemption or the end of the time by a signal, and kill the process some time later. In between, a
training finishes its step and writes a checkpoint within the epoch (`listening`). Every other command ends as after
Ctrl-C (`interruptible`): the signal raises `Interrupted`, and each block on the way out cleans up.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor
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


# Signals that end other commands than a training. SIGHUP comes when the terminal or the ssh connection is closed.
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

# `timeout` and launchers send a signal to the process and to its group: within so many seconds it is the same request.
SAME_REQUEST = 1.0

# Seconds that child processes get to clean up before they are killed.
CHILDREN_MAY_TAKE = 5.0


class Interrupted(KeyboardInterrupt):
    """A signal asks the command to end. A KeyboardInterrupt, so that all that handles Ctrl-C handles it.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


def interruption(error: KeyboardInterrupt) -> tuple[int, str]:
    """The exit status after an interruption, 128 and the signal's number as in a shell, and what happened in words."""
    return 128 + getattr(error, "number", signal.SIGINT), str(error) or "interrupted by Ctrl-C"


# The first signal since `interruptible` began: its number, when it came, and whether it has been raised.
_first: int | None = None
_since = 0.0
_raised = False
# Open blocks of `uninterrupted`.
_blocks = 0


@contextmanager
def interruptible() -> Iterator[None]:
    """A block that SIGTERM and SIGHUP end as Ctrl-C does, by an exception; a second signal ends the process at once.

    Signals that are ignored stay ignored (`nohup`). Outside the main thread, where Python installs no handlers, the
    signals do what they did before.

    Raises:
        Interrupted: a signal came.
    """
    global _first, _raised
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _first, _raised, owner = None, False, os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _first, _since
        # A forked process has inherited this handler, but none of the blocks that clean up are its own.
        if os.getpid() != owner or (_first is not None and time.monotonic() - _since > SAME_REQUEST):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            # The first process of a container outlives that.
            os._exit(128 + number)
        elif _first is None:
            _first, _since = number, time.monotonic()
            if not _blocks:
                raise_pending()

    before = {number: signal.getsignal(number) for number in ENDING}
    # None stands for a handler that was not installed from Python, and could not be put back.
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    except Exception as error:
        if _first is None:
            raise
        # C++ code that calls Python, as PyTorch's exporter does, passes an interruption on as an error of its own.
        raise Interrupted(_first) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _first = None


def raise_pending() -> None:
    """Raise the signal that came, if there is one that has not been raised."""
    global _raised
    if _first is not None and not _raised:
        _raised = True
        raise Interrupted(_first)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A short block within `interruptible` that a signal does not cut in two: it is raised at the block's end."""
    global _blocks
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
    if not _blocks:
        raise_pending()


def end_children() -> None:
    """End the processes that `multiprocessing` started for this one, by SIGTERM or, after 5 s, by SIGKILL.

    The workers of PyTorch's loaders are left to their loaders, which would take their deaths for failures.
    """
    children = [child for child in multiprocessing.active_children() if not child.daemon]
    for child in children:
        child.terminate()
    until = time.monotonic() + CHILDREN_MAY_TAKE
    for child in children:
        child.join(max(until - time.monotonic(), 0))
        child.kill()
        child.join()


@contextmanager
def cancelling(pool: Executor) -> Iterator[None]:
    """A block within a pool's own, which after an interruption would wait until all that was submitted is done."""
    try:
        yield
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        end_children()
        raise
