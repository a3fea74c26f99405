"""A training's settings in a YAML file: `--config FILE` reads one, each training writes its own as `config.yaml`.

Keys are flag names without the leading dashes; `-` and `_` are interchangeable. Each setting is turned into
command-line words, so the parser's types and choices check both.
"""

import argparse
import difflib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from enact_common.utils.errors import UserError

# The settings file that a training writes to its output folder.
CONFIG = "config.yaml"

# Flags of a single run: where it writes, what it resumes, which processes take part. They are not written to
# `config.yaml`, because a second training from that file would overwrite the first.
OF_ONE_RUN = (
    "config", "output_dir", "resume", "auto_resume", "start_epoch", "eval", "world_size", "dist_url", "dist_timeout",
)  # fmt: skip

# The folder of the shipped configs: next to the package in a checkout, inside it once installed.
SHIPPED = next(
    (
        folder
        for folder in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
        if folder.is_dir()
    ),
    Path("configs"),
)


def find_config(name: str) -> Path:
    """Return the path of the file that `--config` names: a path, or the name of a shipped config.

    Raises:
        UserError: there is no such file; the message lists the shipped configs.
    """
    path = Path(name)
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    if path.is_file():
        return path
    # A bare name only: a missing path must not fall back to a shipped config of the same file name.
    if path.name == name and name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    raise UserError(f"--config {name}: no such file; pass a path, or a shipped config: {', '.join(shipped)}")


def read_config(name: str, parser: argparse.ArgumentParser) -> list[tuple[str, list[str]]]:
    """Return the settings of a file, named as `--config` does, as command-line words.

    Args:
        name: a path, or the name of a shipped config.
        parser: defines the flags; each switch needs an opposite, see `add_opposites`.

    Returns:
        (key, words) of each setting, in the file's order. The words are empty for a default that no flag can express.

    Raises:
        UserError: the file is missing or is not a mapping, a key is unknown (the message suggests the nearest flag), or
            the command line cannot express a value. The parser checks the types of values.
    """
    path = find_config(name)
    try:
        content = path.read_bytes()
        settings, tree = yaml.safe_load(content), yaml.compose(content, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date such as 2024-02-30
        raise UserError(f"--config {path}: not a YAML file ({' '.join(str(error).split())})") from error
    if settings is None:
        return []
    if not isinstance(settings, Mapping):
        raise UserError(f"--config {path}: must be lines of FLAG: VALUE, is a {type(settings).__name__}")
    # YAML silently keeps the last value of a repeated key.
    keys = Counter(key.value for key, _ in tree.value if isinstance(key, yaml.ScalarNode))
    if keys and keys.most_common(1)[0][1] > 1:
        raise UserError(f"--config {path}: the key {keys.most_common(1)[0][0]} appears twice; remove one")
    flags, key_of_dest, words = flags_of(parser), {}, []
    for key, value in settings.items():
        flag = str(key).lstrip("-").replace("-", "_")
        if flag in ("config", "help"):
            raise UserError(f"--config {path}: {key}: is for the command line only; remove the line")
        if flag not in flags:
            nearest = difflib.get_close_matches(flag, flags, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"{parser.prog} --help lists the flags"
            raise UserError(f"--config {path}: {key}: no such flag of this model; {hint}")
        option, action = flags[flag]
        if action.dest in key_of_dest:
            raise UserError(f"--config {path}: {key_of_dest[action.dest]} and {key} set the same flag; remove one")
        key_of_dest[action.dest] = key
        try:
            words.append((str(key), words_of(option, action, value, flags)))
        except ValueError as error:
            raise UserError(f"--config {path}: {key}: {error}") from error
    return words


def flags_of(parser: argparse.ArgumentParser) -> dict[str, tuple[str, argparse.Action]]:
    """Return {config key: (option, action)}. A key is the flag without leading dashes, other dashes as underscores."""
    return {
        option.lstrip("-").replace("-", "_"): (option, action)
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }


def words_of(option: str, action: argparse.Action, value: Any, flags: Mapping[str, tuple]) -> list[str]:
    """Return the command-line words that set a flag to a value; a ValueError if the command line cannot express it."""
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
        raise ValueError("is an empty list; give at least one value, or remove the line")
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, is {value!r}")
        return [option if value else opposite_of(option, action, flags)]
    if value is True and action.nargs == "?":
        return [option]
    if value is False and action.default is False:
        return []
    # FLAG=VALUE in one word: argparse would take a separate value with a leading dash for a flag.
    return [option, str(value)] if action.nargs == "+" else [f"{option}={value}"]


def opposite_of(option: str, action: argparse.Action, flags: Mapping[str, tuple]) -> str:
    """Return the flag that undoes a switch."""
    if isinstance(action, argparse.BooleanOptionalAction):
        positive, negative = action.option_strings
        return positive if option == negative else negative
    return next(
        other for other, candidate in flags.values() if candidate.dest == action.dest and candidate.nargs == 0
        and candidate.const is not action.const
    )  # fmt: skip


def add_opposites(parser: argparse.ArgumentParser) -> None:
    """Add the missing opposite of each switch (`--no-sgd`, `--aux_loss`), hidden from the help.

    Opposites let the command line override a config, and a config set a switch to false.
    """
    switches = [a for a in parser._actions if a.nargs == 0 and isinstance(a.const, bool)]
    sides = {(action.dest, action.const) for action in switches}
    for action in switches:
        if (action.dest, not action.const) in sides:
            continue
        option = f"--no-{action.dest}" if action.const else f"--{action.dest}"
        if option in parser._option_string_actions:
            continue  # --dilation exists already and takes a value
        parser.add_argument(
            option, dest=action.dest, action="store_false" if action.const else "store_true",
            default=argparse.SUPPRESS, help=argparse.SUPPRESS,
        )  # fmt: skip


class ConfigDumper(yaml.SafeDumper):
    """Writes words with U+0085 in double quotes, where PyYAML escapes it; elsewhere it would read back as a space."""


ConfigDumper.add_representer(
    str,
    lambda dumper, word: dumper.represent_scalar("tag:yaml.org,2002:str", word, style='"' if "\x85" in word else None),
)


def config_text(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """Return the settings of a training as YAML for `--config`: every flag except `OF_ONE_RUN`, in the help's order."""
    settings: dict[str, Any] = {}
    skipped_dests = set(OF_ONE_RUN)
    for action in parser._actions:
        if action.dest in skipped_dests or not hasattr(args, action.dest):
            continue
        skipped_dests.add(action.dest)
        value = getattr(args, action.dest)
        option = max(action.option_strings, key=len)
        if isinstance(action, argparse.BooleanOptionalAction):
            option = action.option_strings[0]
        elif action.nargs == 0:
            value = value == action.const
        elif action.type and type(value) is int:
            # A float flag may have an int default (1); convert it, so that a config survives a round trip (1.0).
            value = action.type(str(value))
        settings[option.lstrip("-")] = list(value) if isinstance(value, tuple) else value
    return yaml.dump(
        settings, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=116
    )
