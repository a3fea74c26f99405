"""Measurements in separate processes, so that running out of memory ends only that measurement."""

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

# Messages of out-of-memory errors raised as a plain RuntimeError.
MEMORY_MESSAGES = (
    "can't allocate memory",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "is killed by signal: Killed",  # raised by a data loader whose worker was killed
)

# Bytes that a memory-limited process leaves for other processes.
RESERVE = 256 * 2**20


@dataclass(frozen=True)
class Outcome:
    """The result of a measurement, or the reason why it failed.

    Attributes:
        status: `DONE`, `OUT_OF_MEMORY` or `FAILED`.
        value: the function's return value; None unless the status is `DONE`.
        message: the error in one line; "" if the status is `DONE`.
        details: the traceback of an error that is neither a `UserError` nor out of memory; else "".
        numerics: the result of `numerics` in the process; None unless the status is `DONE`.
    """

    status: str
    value: Any = None
    message: str = ""
    details: str = ""
    numerics: dict | None = None

    def fields(self) -> dict[str, Any]:
        """Return the entries of a row of figures that every measurement has."""
        return {"status": self.status, "message": self.message, "numerics": self.numerics}

    def log(self, name: str, result: Callable[[], str], more: str = "") -> None:
        """Print the result of a named measurement, or why it failed, to standard error."""
        text = result() if self.status == DONE else f"{self.status} ({self.message})"
        print(f"{name}: {text}{more}", file=sys.stderr)
        print(self.details, end="", file=sys.stderr, flush=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the host or a GPU ran out of memory."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_MESSAGES)


def numerics() -> dict:
    """Return the settings of this process that select kernels: TF32, attention backends, determinism."""
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
    """Call a function in this process and return an `Outcome`, also if it raises an error."""
    try:
        return Outcome(DONE, function(*args), numerics=numerics())
    except Exception as error:  # any error, so that the other measurements continue
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        if is_out_of_memory(error):
            return Outcome(OUT_OF_MEMORY, message=message)
        if isinstance(error, UserError):
            return Outcome(FAILED, message=message)
        return Outcome(FAILED, message=f"{type(error).__name__}: {message}", details=traceback.format_exc())


class Worker:
    """A process that runs function calls one after the other and returns an `Outcome` for each.

    A failed call ends the process, and the next call starts a new one, which inherits no state from the failure. Use
    it as a context manager; leaving the context ends the process.

    Args:
        limit: limit the process to the host memory available at its start. Allocations then fail in this process,
            before the kernel kills it or another one. Only for computations on the CPU: the limit also counts memory
            that is reserved and unused, and GPU drivers reserve much.
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
        """Call a function in the process and wait for its outcome.

        It is a top-level function of a module; its arguments and return value must be picklable.
        """
        if self._process is None:
            self._start()
        try:
            self._pipe.send((function, args))
            outcome = self._pipe.recv()
        except (EOFError, ConnectionError):  # the process died
            outcome = died(self._end(), self.limit)
        except BaseException:
            # Ask the process to end before joining it: it may own temporary files and loader workers.
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
        # Close the parent's copy of the child's end: then the child's death closes the pipe.
        theirs.close()

    def _end(self) -> int:
        """Wait for the process to end and return its exit code; 0 if there is no process."""
        if self._process is None:
            return 0
        self._pipe.close()
        self._process.join()
        code, self._process = self._process.exitcode, None
        return code


def run_isolated(function: Callable, *args, limit: bool = False) -> Outcome:
    """Call a function in a new process and return its `Outcome`; `limit` as in `Worker`."""
    with Worker(limit, fresh=True) as worker:
        return worker.call(function, *args)


def worker_for(device: torch.device) -> Worker:
    """Return the worker that runs measurements on a device.

    On a GPU, measurements share a process: starting CUDA takes seconds, and PyTorch resets its memory count for each
    measurement. On a CPU, each measurement gets a new process: the system only counts the memory of a whole process.
    """
    return Worker(limit=device.type == "cpu", fresh=device.type == "cpu")


def died(exitcode: int, limit: bool) -> Outcome:
    """Return the outcome of a process that ended without reporting one, by its exit code, negative for a signal.

    If memory was limited, SIGABRT means out of memory, since C++ aborts on an uncaught `std::bad_alloc`.
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
                # Models are in reference cycles that hold GPU memory; compiled code counts against a limit.
                gc.collect()
                if "torch._dynamo" in sys.modules:
                    torch.compiler.reset()
    except (EOFError, ConnectionError):  # the parent has ended
        return
    except KeyboardInterrupt as error:
        # The parent prints the message.
        sys.exit(interruption(error)[0])


def limit_memory() -> None:
    """Make allocations of this process fail beyond the memory that is available now; Linux only."""
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
    """Return an entry of a file such as `/proc/meminfo`, bytes; None if the file or the entry is missing."""
    file = Path(path)
    for line in file.read_text().splitlines() if file.exists() else ():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None
