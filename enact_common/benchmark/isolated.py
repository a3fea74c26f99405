"""Measurements in other processes: one that runs out of memory ends alone."""

import errno
import gc
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

from enact_common.utils.errors import UserError
from enact_common.utils.signals import end_children, interruptible, interruption

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
        numerics: how the process computed, as `numerics` describes it; None unless it is done.
    """

    status: str
    value: Any = None
    message: str = ""
    details: str = ""
    numerics: dict | None = None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, the host's or a GPU's, did not suffice."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_MESSAGES)


def numerics() -> dict:
    """The settings of this process that decide which kernels compute: TF32, attention's backends, determinism."""
    cuda = torch.backends.cuda
    attention = {
        "flash": cuda.flash_sdp_enabled(),
        "memory-efficient": cuda.mem_efficient_sdp_enabled(),
        "cuDNN": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    return {
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "attention": [name for name, enabled in attention.items() if enabled],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def attempt(function: Callable, *args) -> Outcome:
    """Call a function in this process; its errors become an outcome."""
    try:
        return Outcome(DONE, function(*args), numerics=numerics())
    except Exception as error:  # whatever it is, the other measurements go on
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        if is_out_of_memory(error):
            return Outcome(OUT_OF_MEMORY, message=message)
        if isinstance(error, UserError):
            return Outcome(FAILED, message=message)
        return Outcome(FAILED, message=f"{type(error).__name__}: {message}", details=traceback.format_exc())


class Worker:
    """A process that calls functions one after the other, each call with an `Outcome`.

    A call that does not succeed ends the process, and the next call starts a new one, so that no measurement finds what
    a failed one left behind. Used as a context manager; the process ends with it.

    Args:
        limit: let the process have no more of the host's memory than is available, so that it fails rather than
            the kernel ending a process, this one or another. For computations on the CPU: what is reserved but not
            used counts too, and GPU drivers reserve much.
        fresh: start a new process for every call.
    """

    def __init__(self, limit: bool = False, fresh: bool = False):
        self.limit = limit
        self.fresh = fresh
        self._process = self._pipe = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error) -> None:
        self._end()

    def call(self, function: Callable, *args) -> Outcome:
        """Call a function in the process and wait for what it returns.

        Args:
            function: at the top level of a module; what it takes and returns can be pickled.
            args: its arguments.
        """
        if self._process is None:
            self._start()
        try:
            self._pipe.send((function, args))
            outcome = self._pipe.recv()
        except (EOFError, ConnectionError):  # it died
            outcome = died(self._end(), self.limit)
        except BaseException:
            # Not killed at once: it may have temporary files and loaders' workers.
            end_children()
            self._end()
            raise
        if self.fresh or outcome.status != DONE:
            self._end()
        return outcome

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.limit))
        self._process.start()
        # The child's end is now the only one: its death closes the pipe.
        theirs.close()

    def _end(self) -> int:
        """Let the process end; its exit code, 0 without a process."""
        if self._process is None:
            return 0
        self._pipe.close()
        self._process.join()
        code, self._process = self._process.exitcode, None
        return code


def run_isolated(function: Callable, *args, limit: bool = False) -> Outcome:
    """Call a function in a new process, as `Worker` does."""
    with Worker(limit, fresh=True) as worker:
        return worker.call(function, *args)


def worker_for(device: torch.device) -> Worker:
    """The worker that runs measurements on a device.

    On a GPU they share a process: PyTorch counts a GPU's memory anew for each, and starting CUDA takes seconds. On a
    CPU each has a new one: what the system counts is the process's whole memory.
    """
    return Worker(limit=device.type == "cpu", fresh=device.type == "cpu")


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


def _serve(pipe, limit: bool) -> None:
    try:
        with interruptible():
            if limit:
                limit_memory()
            while True:
                function, args = pipe.recv()
                pipe.send(attempt(function, *args))
                # Models hold themselves in cycles, and with them a GPU's memory; compiled code counts against a limit.
                gc.collect()
                if "torch._dynamo" in sys.modules:
                    torch.compiler.reset()
    except (EOFError, ConnectionError):  # whoever asks has ended
        return
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
