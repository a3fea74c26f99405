"""Types of command-line values, and the help formatter. Standard library only."""

import argparse
import math

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


def positive_int(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def batch_size(text: str) -> int | str:
    """An integer of at least 1, or `AUTO_BATCH`, for argparse."""
    return AUTO_BATCH if text == AUTO_BATCH else positive_int(text)


def natural_int(text: str) -> int:
    """An integer of at least 0, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def non_negative_float(text: str) -> float:
    """A finite number of at least 0, for argparse."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text}")
    return value


def decay(text: str) -> float:
    """A number of at least 0 and below 1, for argparse."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


def boolean(text: str) -> bool:
    """A boolean spelled as one of `TRUE_WORDS` or `FALSE_WORDS`, for argparse."""
    word = text.lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(TRUE_WORDS + FALSE_WORDS)}, got {text}")
    return word in TRUE_WORDS
