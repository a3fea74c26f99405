"""Measurements in processes of their own: each starts from nothing, and one that runs out of memory ends alone."""

import errno
import multiprocessing
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from enact_common.errors import UserError
from enact_common.stopping import end_children, interruptible, interruption

# Statuses of an `Outcome`.
DONE, OUT_OF_MEMORY, FAILED = "done", "out of memory", "failed"

# How errors without a type of their own say that there is no memory left.
MEMORY_MESSAGES = (
    "can't allocate memory",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "is killed by signal: Killed",  # a data loader's worker
)

# Bytes that a limited process leaves to all others.
RESERVE = 256 * 2**20


@dataclass(frozen=True)
class Outcome:
    """What became of a measurement.

    Attributes:
        status: `DONE`, `OUT_OF_MEMORY` or `FAILED`.
        value: what the function returned; None unless it is done.
        message: what went wrong, in one line; "" where it is done.
        details: the traceback of an error that is neither the user's nor the memory's; else "".
    """

    status: str
    value: Any = None
    message: str = ""
    details: str = ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, the host's or a GPU's, did not suffice."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_MESSAGES)


def attempt(function: Callable, *args) -> Outcome:
    """Call a function in this process; its errors become an outcome."""
    try:
        return Outcome(DONE, function(*args))
    except Exception as error:  # whatever it is, the other measurements go on
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        if is_out_of_memory(error):
            return Outcome(OUT_OF_MEMORY, message=message)
        if isinstance(error, UserError):
            return Outcome(FAILED, message=message)
        return Outcome(FAILED, message=f"{type(error).__name__}: {message}", details=traceback.format_exc())


def run_isolated(function: Callable, *args, limit: bool = False) -> Outcome:
    """Call a function in a new process and wait for what it returns.

    Args:
        function: at the top level of a module; what it takes and returns can be pickled.
        args: its arguments.
        limit: let the process have no more of the host's memory than is available, so that it fails rather than
            the kernel ending a process, this one or another. For computations on the CPU: what is reserved but not
            used counts too, and GPU drivers reserve much.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, limit, function, args))
    process.start()
    # The child's end is now the only one: its death closes the pipe.
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = None
    except BaseException:
        # Not killed: it may have temporary files and loaders' workers.
        end_children()
        raise
    finally:
        receiver.close()
        process.join()
    return outcome or died(process.exitcode, limit)


def died(exitcode: int, limit: bool) -> Outcome:
    """The outcome of a process that ended without one.

    Args:
        exitcode: as `multiprocessing` gives it: negative for a signal.
        limit: its memory was limited: C++ aborts where nobody catches that an allocation fails.
    """
    if exitcode >= 0:
        return Outcome(FAILED, message=f"ended with status {exitcode}")
    message = f"killed by signal {-exitcode}"
    if -exitcode == signal.SIGKILL or (limit and -exitcode == signal.SIGABRT):
        return Outcome(OUT_OF_MEMORY, message=f"{message}, probably out of memory")
    return Outcome(FAILED, message=message)


def _child(sender, limit: bool, function: Callable, args: tuple) -> None:
    try:
        with interruptible():
            if limit:
                limit_memory()
            sender.send(attempt(function, *args))
    except KeyboardInterrupt as error:
        # The parent says it.
        sys.exit(interruption(error)[0])


def limit_memory() -> None:
    """Let allocations of this process fail beyond the memory that is available now; has an effect on Linux alone."""
    available = proc_bytes("/proc/meminfo", "MemAvailable")
    used = proc_bytes("/proc/self/status", "VmData")
    if sys.platform != "linux" or available is None or used is None:
        return
    limit = used + max(available - RESERVE, 0)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def proc_bytes(path: str, name: str) -> int | None:
    """A figure of a file such as `/proc/meminfo`, bytes; None where there is no such file or line."""
    file = Path(path)
    for line in file.read_text().splitlines() if file.exists() else ():
        key, _, figure = line.partition(":")
        if key == name:
            return int(figure.split()[0]) * 1024
    return None
