"""The name under which a command was called, for its usage line and its errors."""

# Set by the command `enact`: "enact predict", say. None in `python -m enact_common.predict`.
called_as: str | None = None


def program(module: str) -> str:
    """A command's name as the user typed it.

    Args:
        module: its own, "enact_common.predict".
    """
    return called_as or f"python -m {module}"
