"""The name by which a command was called, for its usage line and its errors."""

# Set by the command `enact`, for example to "enact predict". None under `python -m enact_common.predict`.
called_as: str | None = None


def program(module: str) -> str:
    """Return a command's name as the user typed it.

    Args:
        module: the command's module, for example "enact_common.predict".
    """
    return called_as or f"python -m {module}"


def enact() -> str:
    """Return `enact` as the user can call it: in a checkout it may not be installed."""
    return "enact" if called_as else "python -m enact_common"
