"""Signals that ask a process to end, in trainings and in all other commands.

Schedulers announce a preemption or the time limit by a signal, and kill the process some time later. In between, a
training finishes its step and writes a checkpoint within the epoch (`listening`). Every other command ends as after
Ctrl-C (`interruptible`): the signal raises `Interrupted`, and enclosing blocks clean up.
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

# Exit status of a training that a signal stopped and --auto_resume continues. sysexits.h: temporary failure.
STOPPED = 75

# SIGTERM comes from `docker stop`, Kubernetes, torchrun and preempting schedulers; SIGUSR1 from Slurm before the time
# limit, if asked by --signal; SIGUSR2 from submitit.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)  # Windows has only SIGTERM

_received: signal.Signals | None = None


class Stopped(Exception):
    """A signal stopped the run. The message says what was saved and how to continue."""


def stop_requested() -> signal.Signals | None:
    """Return the signal that asked this process to stop since the last start of `listening`; None without one."""
    return _received


@contextmanager
def listening() -> Iterator[None]:
    """A block in which signals that ask the process to stop are only recorded, for `stop_requested`.

    Outside the main thread, where Python cannot install handlers, signals keep their previous handlers.
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
            # None means a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


# Signals that end commands other than a training. SIGHUP comes when the terminal or the ssh connection closes.
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

# `timeout` and launchers send a signal to the process and to its group; signals within so many seconds count as one.
SAME_REQUEST = 1.0

# Seconds that child processes have to clean up before they are killed.
CHILDREN_MAY_TAKE = 5.0


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end. A KeyboardInterrupt, so that code that handles Ctrl-C handles it too."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


def interruption(error: KeyboardInterrupt) -> tuple[int, str]:
    """Return the exit status after an interruption (128 plus the signal's number, as in a shell) and its message."""
    return 128 + getattr(error, "number", signal.SIGINT), str(error) or "interrupted by Ctrl-C"


# The first signal since the start of `interruptible`: its number, its time, and whether it has been raised.
_first: int | None = None
_since = 0.0
_raised = False
# Open blocks of `uninterrupted`.
_blocks = 0


@contextmanager
def interruptible() -> Iterator[None]:
    """A block that SIGTERM and SIGHUP end by `Interrupted`, as Ctrl-C does; a second signal ends the process at once.

    Ignored signals stay ignored (`nohup`). Outside the main thread, where Python cannot install handlers, signals keep
    their previous handlers.
    """
    global _first, _raised
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _first, _raised, owner = None, False, os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _first, _since
        # A forked child inherits this handler but has nothing to clean up, so the signal ends it at once.
        if os.getpid() != owner or (_first is not None and time.monotonic() - _since > SAME_REQUEST):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            # Process 1 of a container ignores signals with default handlers, so exit.
            os._exit(128 + number)
        elif _first is None:
            _first, _since = number, time.monotonic()
            if not _blocks:
                raise_pending()

    before = {number: signal.getsignal(number) for number in ENDING}
    # None means a handler that was not installed from Python, which could not be restored.
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    except Exception as error:
        if _first is None:
            raise
        # C++ code that calls Python, as in PyTorch's exporter, turns an interruption into another exception.
        raise Interrupted(_first) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _first = None


def raise_pending() -> None:
    """Raise a received signal that has not been raised yet."""
    global _raised
    if _first is not None and not _raised:
        _raised = True
        raise Interrupted(_first)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A short block within `interruptible` that signals do not interrupt; they are raised at its end."""
    global _blocks
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
    if not _blocks:
        raise_pending()


def end_children() -> None:
    """End the child processes that `multiprocessing` started, by SIGTERM and after 5 s by SIGKILL.

    Workers of PyTorch's loaders are left out: the loaders end them, and would report their deaths as failures.
    """
    children = [child for child in multiprocessing.active_children() if not child.daemon]
    for child in children:
        child.terminate()
    until = time.monotonic() + CHILDREN_MAY_TAKE
    for child in children:
        child.join(max(until - time.monotonic(), 0))
        child.kill()
        child.join()


def end_with_parent() -> None:
    """Make a pool process end when its parent is killed, instead of waiting for work forever. After Ctrl-C, which all
    processes receive, it ends without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def cancelling(pool: Executor) -> Iterator[None]:
    """A block inside a pool's `with` that cancels submitted tasks on an interruption, which the pool would wait for."""
    try:
        yield
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        end_children()
        raise
