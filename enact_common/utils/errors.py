"""The error that a user can fix, and the exit status of commands."""

import contextlib
import io
import os
import sys
from collections.abc import Callable

from enact_common.utils.signals import end_children, interruptible, interruption

# The shell's status of a command whose output pipe was closed: 128 + SIGPIPE.
NO_READER = 141


class UserError(Exception):
    """An error in the arguments, the data or a file. The message says what is wrong and what to do.

    The command line prints only the message, without a traceback, and exits with status 2.
    """


def let_any_text_out() -> None:
    """Make standard output escape characters that its encoding lacks, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")


def exit_status(prog: str, command: Callable[[], int]) -> int:
    """Run a command that returns its status, print a UserError like argparse's errors, and return the status.

    A command whose output pipe closes (`... | head`) ends quietly. Characters that standard output cannot encode, such
    as Chinese names in a Latin-1 terminal, are escaped (backslash, u, digits). After Ctrl-C, SIGTERM or SIGHUP, the
    command cleans up, its child processes end, and one line reports the signal.

    Returns:
        the command's status; 2 after a UserError; 141 if the output pipe was closed; 128 plus the signal's number after
            a signal: 130 for Ctrl-C, 143 for SIGTERM.
    """
    let_any_text_out()
    try:
        with interruptible():
            return status_of(prog, command)
    except KeyboardInterrupt as error:
        end_children()
        status, text = interruption(error)
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"{prog}: {text}", file=sys.stderr)
        return status


def status_of(prog: str, command: Callable[[], int]) -> int:
    """`exit_status` without signal handling."""
    try:
        status = command()
        # Flush here, so that a closed pipe fails inside this try block and not at exit.
        print(end="", flush=True)
        return status
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Python flushes standard output again at exit; send that to devnull, so that it does not fail too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return NO_READER
