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


def run_script(words: list[str], environment: dict[str, str], method: str, stdout, stderr: str) -> None:
    """Run a script as `python words...` does, in a process group of its own.

    Args:
        words: the script and its arguments.
        environment: all variables.
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
    multiprocessing.set_start_method(method, force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


class Forked:
    """A script that runs in a forked process, in place of a `subprocess.Popen`.

    Attributes:
        stdout: what it prints, a text file.
        pid, returncode, poll, kill, send_signal, communicate: as of `subprocess.Popen`.

    Args:
        words: the script and its arguments.
        environment: all variables.
    """

    def __init__(self, words: list[str], environment: dict[str, str]):
        reader, writer = FORKS.Pipe(duplex=False)
        self._stderr = tempfile.NamedTemporaryFile()
        args = (words, environment, multiprocessing.get_start_method(), writer, self._stderr.name)
        self._process = FORKS.Process(target=run_script, args=args)
        self._process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        reader.close()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """The rest of what it prints, and all that it complains of, once it has ended; killed after `timeout` s."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        with self.stdout, self._stderr:
            said = self.stdout.read()
            self._process.join()
            timer.cancel()
            return said, Path(self._stderr.name).read_text()
