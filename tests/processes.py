"""Processes for tests, forked from a server that has imported the package: they start in milliseconds, not seconds."""

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
    """Do what `python words...` does, in a new process group.

    Args:
        words: a script, `-m` and a module, or `-c` and code; then arguments.
        environment: all environment variables.
        folder: working directory.
        method: start method of `multiprocessing`.
        stdout: connection to write to.
        stderr: path of the file to write to.
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
    """A forked process that does what `python words...` does; replaces a `subprocess.Popen`.

    Attributes:
        stdout: its standard output, a text file.
        pid, returncode, poll, wait, kill, send_signal, communicate: as in `subprocess.Popen`.

    Args:
        words: a script, `-m` and a module, or `-c` and code; then arguments.
        environment: all environment variables; default: this process's.
        folder: working directory; default: this process's.
    """

    def __init__(self, words: list[str], environment: dict[str, str] | None = None, folder: str | Path = "."):
        reader, writer = FORKS.Pipe(duplex=False)
        self._stderr = tempfile.NamedTemporaryFile()  # noqa: SIM115, kept open as long as the process runs
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
        """Do nothing: `wait` and `communicate` close the files."""

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        """Wait for the end, discard the output; the exit status."""
        self.communicate()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end; (rest of stdout, stderr). The process is killed after `timeout` seconds."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        with self.stdout, self._stderr:
            output = self.stdout.read()
            self._process.join()
            timer.cancel()
            return output, Path(self._stderr.name).read_text()
