"""Packages that only some functions need, from the extras of pyproject.toml."""

import importlib
from types import ModuleType

from enact_common.utils.errors import UserError


def needed(module: str, why: str, extra: str) -> ModuleType:
    """Import a package of an extra.

    Args:
        module: the module's name.
        why: what needs it, for the message.
        extra: the extra that brings it.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise
        raise UserError(
            f"{why} needs the package {error.name.partition('.')[0]}, which is not installed: "
            f"pip install 'enact-detection[{extra}]'"
        ) from error
