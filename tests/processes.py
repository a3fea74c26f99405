"""Processes for tests, forked from a server that has the package imported: they start in milliseconds, not seconds."""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["pytest", "torch.utils.tensorboard", "torch.distributed.run", "enact_common.training.run"]
)


def run_python(words: list[str], environment: dict[str, str], folder: str, method: str, stdout, stderr: str) -> None:
    """Do what `python words...` does, in a process group of its own.

    Args:
        words: a script, `-m` and a module, or `-c` and code; then arguments.
        environment: all variables.
        folder: to work in.
        method: how `multiprocessing` starts processes by default.
        stdout: a connection to write to.
        stderr: a file's path.
    """
    os.setsid()
    os.dup2(stdout.fileno(), 1)
    stdout.close()
    with open(stderr, "wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method(method, force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = words if words[0][0] != "-" else words[1:]
    sys.path[0] = str(Path(words[0]).parent) if words[0][0] != "-" else folder
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        exec(words[1], {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")


class Forked:
    """A forked process that does what `python words...` does, in place of a `subprocess.Popen`.

    Attributes:
        stdout: what it prints, a text file.
        pid, returncode, poll, wait, kill, send_signal, communicate: as of `subprocess.Popen`.

    Args:
        words: a script, `-m` and a module, or `-c` and code; then arguments.
        environment: all variables; this process's by default.
        folder: to work in; this process's by default.
    """

    def __init__(self, words: list[str], environment: dict[str, str] | None = None, folder: str | Path = "."):
        reader, writer = FORKS.Pipe(duplex=False)
        self._stderr = tempfile.NamedTemporaryFile()  # noqa: SIM115, it lives as long as the process
        method = multiprocessing.get_start_method()
        environment = dict(os.environ) if environment is None else environment
        args = (words, environment, os.path.abspath(folder), method, writer, self._stderr.name)
        self._process = FORKS.Process(target=run_python, args=args)
        self._process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        reader.close()
        self.pid = self._process.pid

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *error) -> None:
        """Nothing is left to do: `wait` and `communicate` close what is open."""

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        """Its exit status, once it has ended; what it says is read, and nothing is made of it."""
        self.communicate()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """The rest of what it prints, and all that it complains of, once it has ended; killed after `timeout` s."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        with self.stdout, self._stderr:
            said = self.stdout.read()
            self._process.join()
            timer.cancel()
            return said, Path(self._stderr.name).read_text()
