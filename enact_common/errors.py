"""The error that a user can mend, and how a command ends with it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something in the arguments, the data or a file is wrong. The message names it and says the way out.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


def exit_status(prog: str, command: Callable[[], int]) -> int:
    """Run a command, and print its UserError, if there is one, as argparse prints its own.

    Args:
        prog: the program's name.
        command: returns its exit status.

    Returns:
        the command's; 2 after a UserError.
    """
    try:
        return command()
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
