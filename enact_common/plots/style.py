"""What the plots have in common: colours, and files that are written whole. Needs matplotlib (extra `plots`)."""

from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from enact_common.files import write_file

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C4B00")

# Of what stands behind the lines that matter.
GREY = "#BBBBBB"


def colour(number: int) -> str:
    """The colour of the line with this number, from 0; they come again after the last."""
    return COLOURS[number % len(COLOURS)]


def literal(text: str) -> str:
    """A text that matplotlib writes as it stands: dollar signs in names of classes and runs enclose no formulas."""
    return text.replace("$", r"\$")


def picture_kinds() -> list[str]:
    """The suffixes, without dots, of the pictures that can be written here."""
    return sorted(FigureCanvasBase.get_supported_filetypes())


def save(figure: Figure, picture: Path) -> None:
    """Write a figure, whole or not at all, as the kind of picture that the suffix says.

    Raises:
        UserError: it cannot be written.
    """
    kind = picture.suffix[1:].lower()
    write_file(picture, lambda file: figure.savefig(file, format=kind, dpi=150))
