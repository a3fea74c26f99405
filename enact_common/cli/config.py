"""A training's settings in a YAML file: `--config FILE` reads one, each training writes its own as `config.yaml`.

Keys are the flags without their dashes; `-` and `_` are alike within them. A value becomes the words that would follow
the flag on the command line, so both are checked by the same types and choices.
"""

import argparse
import difflib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from enact_common.utils.errors import UserError

# The settings of a training, in its output folder.
CONFIG = "config.yaml"

# Flags of one run rather than of a training: where it writes, what it goes on from, and which processes take part. A
# file that is written has none of them, so that another training from it cannot overwrite the first.
OF_ONE_RUN = (
    "config", "output_dir", "resume", "auto_resume", "start_epoch", "eval", "world_size", "dist_url", "dist_timeout",
)  # fmt: skip

# The files that come with the project: beside the package in a checkout, within it where installed.
SHIPPED = next(
    (
        folder
        for folder in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
        if folder.is_dir()
    ),
    Path("configs"),
)


def find_config(name: str) -> Path:
    """The file that `--config` names: a path, or the name of a file that comes with the project.

    Raises:
        UserError: there is none; the message names those that come with the project.
    """
    path = Path(name)
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    if path.is_file():
        return path
    # A name, not a path that ends alike.
    if path.name == name and name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    raise UserError(f"--config {name}: no such file; pass a path, or the name of one of ours: {', '.join(shipped)}")


def read_config(name: str, parser: argparse.ArgumentParser) -> list[tuple[str, list[str]]]:
    """The settings of a file as words of the command line.

    Args:
        name: a path, or the name of a file that comes with the project.
        parser: whose flags the keys are; each of its switches needs a flag for either way, see `add_opposites`.

    Returns:
        (key, words) of each setting, in the file's order; no words where it is the default that no word stands for.

    Raises:
        UserError: the file is missing or no mapping, or has an unknown key, the nearest of which is named, or a value
            that no word stands for. Values' types are left to the parser.
    """
    path = find_config(name)
    try:
        content = path.read_bytes()
        settings, tree = yaml.safe_load(content), yaml.compose(content, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-02-30, which would be a date
        raise UserError(f"--config {path}: not a YAML file ({' '.join(str(error).split())})") from error
    if settings is None:
        return []
    if not isinstance(settings, Mapping):
        raise UserError(f"--config {path}: must be lines of FLAG: VALUE, is a {type(settings).__name__}")
    # YAML keeps the last value of a repeated key without a word.
    keys = Counter(key.value for key, _ in tree.value if isinstance(key, yaml.ScalarNode))
    if keys and keys.most_common(1)[0][1] > 1:
        raise UserError(f"--config {path}: the key {keys.most_common(1)[0][0]} is there twice")
    flags, taken, words = flags_of(parser), {}, []
    for key, value in settings.items():
        flag = str(key).lstrip("-").replace("-", "_")
        if flag in ("config", "help"):
            raise UserError(f"--config {path}: {key}: is for the command line alone; remove the line")
        if flag not in flags:
            nearest = difflib.get_close_matches(flag, flags, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"{parser.prog} --help lists the flags"
            raise UserError(f"--config {path}: {key}: no such flag of this model; {hint}")
        option, action = flags[flag]
        if action.dest in taken:
            raise UserError(f"--config {path}: {taken[action.dest]} and {key} set the same; remove one of them")
        taken[action.dest] = key
        try:
            words.append((str(key), words_of(option, action, value, flags)))
        except ValueError as error:
            raise UserError(f"--config {path}: {key}: {error}") from error
    return words


def flags_of(parser: argparse.ArgumentParser) -> dict[str, tuple[str, argparse.Action]]:
    """Each flag's name as a key of a file, dashes taken off or made underscores, to (option, action)."""
    return {
        option.lstrip("-").replace("-", "_"): (option, action)
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }


def words_of(option: str, action: argparse.Action, value: Any, flags: Mapping[str, tuple]) -> list[str]:
    """The words of the command line that set a flag.

    Args:
        option: the flag.
        action: the parser's.
        value: of the file.
        flags: of `flags_of`.

    Raises:
        ValueError: no words do.
    """
    if value is None:
        if action.default is None:
            return []
        raise ValueError("has no value; write one, or remove the line")
    if isinstance(value, (Mapping, set, bytes)):
        raise ValueError(f"must be a value or a list of values, is a {type(value).__name__}")
    if isinstance(value, list):
        if action.nargs not in ("+", "*"):
            raise ValueError("takes one value, not a list")
        if any(isinstance(item, (Mapping, list, set, bytes, type(None))) for item in value):
            raise ValueError("must be a list of plain values")
        if value:
            return [option, *map(str, value)]
        if action.default == []:
            return []
        raise ValueError("is an empty list; name a value at least, or remove the line")
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, is {value!r}")
        return [option if value else opposite_of(option, action, flags)]
    if value is True and action.nargs == "?":
        # The flag without a word.
        return [option]
    if value is False and action.default is False:
        return []
    # One word, so that a value with a dash at its front is not taken for a flag.
    return [option, str(value)] if action.nargs == "+" else [f"{option}={value}"]


def opposite_of(option: str, action: argparse.Action, flags: Mapping[str, tuple]) -> str:
    """The flag that undoes a switch."""
    if isinstance(action, argparse.BooleanOptionalAction):
        positive, negative = action.option_strings
        return positive if option == negative else negative
    return next(
        other for other, candidate in flags.values() if candidate.dest == action.dest and candidate.nargs == 0
        and candidate.const is not action.const
    )  # fmt: skip


def add_opposites(parser: argparse.ArgumentParser) -> None:
    """Give each switch that has none a flag that undoes it, which the help does not show: `--no-sgd`, `--aux_loss`.

    With them, the command line can undo what a file sets, and a file can say false.
    """
    switches = [a for a in parser._actions if a.nargs == 0 and isinstance(a.const, bool)]
    sides = {(action.dest, action.const) for action in switches}
    for action in switches:
        if (action.dest, not action.const) in sides:
            continue
        option = f"--no-{action.dest}" if action.const else f"--{action.dest}"
        if option in parser._option_string_actions:
            continue  # --dilation takes a word
        parser.add_argument(
            option, dest=action.dest, action="store_false" if action.const else "store_true",
            default=argparse.SUPPRESS, help=argparse.SUPPRESS,
        )  # fmt: skip


def config_text(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The settings of a training as YAML that `--config` reads: every flag but `OF_ONE_RUN`, in the help's order.

    Args:
        parser: whose flags they are.
        args: their values.
    """
    settings: dict[str, Any] = {}
    written = set(OF_ONE_RUN)
    for action in parser._actions:
        if action.dest in written or not hasattr(args, action.dest):
            continue
        written.add(action.dest)
        value = getattr(args, action.dest)
        option = max(action.option_strings, key=len)
        if isinstance(action, argparse.BooleanOptionalAction):
            option = action.option_strings[0]
        elif action.nargs == 0:
            value = value == action.const
        elif action.type and type(value) is int:
            # A default of 1 for a float, which a file that was read and written again would have as 1.0.
            value = action.type(str(value))
        settings[option.lstrip("-")] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, default_flow_style=None, width=116)
