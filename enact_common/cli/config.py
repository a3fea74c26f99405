"""Settings in a file: `--config FILE` reads them, and a training writes its own as `config.yaml`."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from enact_common.utils.errors import UserError

FILE_NAME = "config.yaml"

# Flags that belong to one run: a file that set them would resume another run, or write into its folder.
RUN_FLAGS = ("help", "config", "output_dir", "resume", "auto_resume", "start_epoch", "eval")


def shipped_configs() -> dict[str, Path]:
    """The configurations that the project ships, by name."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):  # installed, or in a checkout
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def config_words(parser: argparse.ArgumentParser, source: str) -> list[str]:
    """A configuration as words of the parser's command line.

    Args:
        parser: whose flags the keys are, written with `_` or `-`.
        source: a YAML file, or the name of a shipped configuration.

    Raises:
        UserError: there is no such file, it is no mapping, or a key or value is none of the parser's.
    """
    path = Path(source)
    if not path.is_file():
        path = shipped_configs().get(source, path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        names = ", ".join(shipped_configs())
        raise UserError(f"--config {source}: no such file; shipped are {names}") from error
    except OSError as error:
        raise UserError(f"--config {source}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {source}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise UserError(f"--config {source}: holds no settings; expected lines like `lr: 1e-4`")
    actions = actions_by_key(parser)
    words = []
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--config {source}: no flag {key!r}{meant}")
        if actions[name].dest in RUN_FLAGS:
            raise UserError(f"--config {source}: {key} belongs to one run; pass it on the command line")
        try:
            words += words_of(actions[name], value, by_destination=name == actions[name].dest)
        except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
            raise UserError(f"--config {source}: {key}: {str(value)[:100]!r}: {error}") from error
    return words


def actions_by_key(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Each flag by the names that a key may have: where its value goes, and the flag's own."""
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        for name in (action.dest, *(option.lstrip("-").replace("-", "_") for option in action.option_strings)):
            actions.setdefault(name, action)
    return actions


def words_of(action: argparse.Action, value: Any, by_destination: bool) -> list[str]:
    """The words that give a flag a value.

    Args:
        action: the flag.
        value: plain YAML value.
        by_destination: the key is where the value goes (`augmentation`), not the flag's own name (`no_augmentation`).

    Raises:
        argparse.ArgumentTypeError, TypeError, ValueError: the flag cannot have that value.
    """
    option = max(action.option_strings, key=len)
    if isinstance(value, dict):
        raise ValueError("expected one value or a list")
    if isinstance(action, argparse.BooleanOptionalAction) and value is not None:
        yes, no = sorted(action.option_strings, key=len)  # --flag, --no-flag
        return [yes if expect_bool(value) == by_destination else no]
    if action.nargs == 0 and value is not None:
        given = expect_bool(value) == bool(action.const) if by_destination else expect_bool(value)
        return [option] if given else []
    unset = action.default is None or action.default is False or action.default == []
    if unset and (value is None or value is False or value == []):
        return []
    if value is None:
        raise ValueError("a flag with a default needs a value")
    many = action.nargs in ("+", "*")
    values = value if isinstance(value, list) else [value]
    if not values or (not many and len(values) != 1):
        raise ValueError("expected at least one value" if many else "expected one value")
    texts = [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
    for text in texts:
        typed = action.type(text) if action.type else text
        if action.choices is not None and typed not in action.choices:
            raise ValueError(f"choose from {', '.join(map(str, action.choices))}")
    return [option, *texts] if many else [f"{option}={texts[0]}"]


def expect_bool(value: Any) -> bool:
    """The value, which must be true or false."""
    if not isinstance(value, bool):
        raise TypeError("expected true or false")
    return value


def config_text(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """All settings of a run but `RUN_FLAGS`, as a file that `--config` reads."""
    settings = {
        action.dest: getattr(args, action.dest)
        for action in parser._actions
        if action.dest not in RUN_FLAGS and hasattr(args, action.dest)
    }
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def with_config(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """A command line with the settings of its `--config` before the others, which win.

    Raises:
        UserError: as `config_words`.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        source = finder.parse_known_args(list(words))[0].config
    except argparse.ArgumentError:  # the whole parser says what is wrong
        source = None
    return [*(config_words(parser, source) if source else []), *words]
