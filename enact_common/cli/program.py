"""The name by which a command was called, and the parser of all commands, whose errors are short."""

import argparse
import difflib
import itertools
import sys
from collections.abc import Sequence
from typing import NoReturn

# Set by the command `enact`, for example to "enact predict". None under `python -m enact_common.predict`.
called_as: str | None = None


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line: without the usage, and with the flag that a misspelt one may mean."""

    words: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):
        self.words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        hint = self.nearest_flag() or f"{self.prog} --help lists the flags"
        self.exit(2, f"{self.prog}: error: {message}; {hint}\n")

    def nearest_flag(self) -> str:
        """Return a question about the command line's first unknown flag; empty if nothing resembles it."""
        known = flags_of(self)
        for word in itertools.takewhile("--".__ne__, self.words):
            flag = word.partition("=")[0]
            # Argparse accepts the beginning of a flag.
            if flag.startswith("--") and not any(name.startswith(flag) for name in known):
                near = difflib.get_close_matches(flag, known, 1)
                return f"{flag} is no flag: did you mean {near[0]}?" if near else ""
        return ""


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return the flags of a parser and of its subcommands."""
    flags = list(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags += [flag for command in action.choices.values() for flag in flags_of(command)]
    return flags


def program(module: str) -> str:
    """Return a command's name as the user typed it, by its module, for example "enact_common.predict"."""
    return called_as or f"python -m {module}"


def enact() -> str:
    """Return `enact` as the user can call it: in a checkout it may not be installed."""
    return "enact" if called_as else "python -m enact_common"
