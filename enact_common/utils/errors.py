"""The error that a user can mend, and how a command ends with it."""

import contextlib
import io
import os
import sys
from collections.abc import Callable

from enact_common.utils.signals import end_children, interruptible, interruption

# The shell's own status of a command that has nobody left to write to.
NO_READER = 141


class UserError(Exception):
    """Something in the arguments, the data or a file is wrong. The message names it and says the way out.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


def let_any_text_out() -> None:
    """Let standard output write the number of a character that it cannot show, rather than fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's is another
        sys.stdout.reconfigure(errors="backslashreplace")


def exit_status(prog: str, command: Callable[[], int]) -> int:
    """Run a command, and print its UserError, if there is one, as argparse prints its own.

    A command whose output nobody reads any more, because it was piped to `head`, say, ends quietly. What standard
    output cannot take, such as Chinese names in a Latin-1 terminal, is written as its number (backslash, u, digits).
    After Ctrl-C, SIGTERM or SIGHUP, the command cleans up, its child processes end, and one line says so.

    Args:
        prog: the program's name.
        command: returns its exit status.

    Returns:
        the command's; 2 after a UserError; 141 where the output is not read to its end; 128 and the signal's number
        after a signal: 130 for Ctrl-C, 143 for SIGTERM.
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
    """`exit_status` without its signals."""
    try:
        status = command()
        # What is still held back would otherwise fail when the process ends, out of reach.
        print(end="", flush=True)
        return status
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Python writes what it holds back once more when the process ends: that must not fail again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return NO_READER
