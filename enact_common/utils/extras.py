"""Packages that only some functions need, from the extras of pyproject.toml."""

import importlib
from types import ModuleType

from enact_common.utils.errors import UserError


def needed(module: str, why: str, extra: str) -> ModuleType:
    """Import a package that something (`why`) needs, and that an extra brings; a UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise
        raise UserError(
            f"{why} needs the package {error.name.partition('.')[0]}, which is not installed: "
            f"pip install 'enact-detection[{extra}]'"
        ) from error
