"""The error that a user can mend."""


class UserError(Exception):
    """Something in the arguments, the data or a file is wrong. The message names it and says the way out.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """
