"""Types of command-line values, and the help formatter. Standard library only."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from enact_common.cli.flags import AUTO_BATCH

TRUE_WORDS = ("true", "1", "yes")
FALSE_WORDS = ("false", "0", "no")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Append the default to each help text, unless the text already states it."""

    def _get_help_string(self, action):
        switch = isinstance(action.default, bool) and action.nargs == 0
        if action.default in (None, "") or switch or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


def number_type(name: str, kind: type, allowed: Callable[[float], bool], rule: str) -> Callable[[str], Any]:
    """A type of numbers for argparse, whose messages name it and its rule."""

    def parse(text: str):
        value = kind(text)
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{rule}, got {text}")
        return value

    parse.__name__ = name
    return parse


positive_int = number_type("positive_int", int, lambda value: value >= 1, "must be at least 1")
natural_int = number_type("natural_int", int, lambda value: value >= 0, "must not be negative")
non_negative_float = number_type(
    "non_negative_float", float, lambda value: 0 <= value < math.inf, "must be a number of at least 0"
)
fraction = number_type("fraction", float, lambda value: 0 <= value <= 1, "must be a number from 0 to 1")
decay = number_type("decay", float, lambda value: 0 <= value < 1, "must be at least 0 and below 1")


def batch_size(text: str) -> int | str:
    """An integer of at least 1, or `AUTO_BATCH`, for argparse."""
    return AUTO_BATCH if text == AUTO_BATCH else positive_int(text)


def boolean(text: str) -> bool:
    """A boolean spelled as one of `TRUE_WORDS` or `FALSE_WORDS`, for argparse."""
    word = text.lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(TRUE_WORDS + FALSE_WORDS)}, got {text}")
    return word in TRUE_WORDS
