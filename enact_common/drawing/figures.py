"""What the plots have in common: colours, and files that are written whole. Needs matplotlib (extra `plots`)."""

from functools import cache
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.text import Text

from enact_common.drawing.fonts import OWN_FONT, font_sources, has_glyph, say_which_font
from enact_common.utils.files import write_file

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


@cache
def family_of(source: str) -> str:
    """The name that matplotlib, which may not have known it, has for the font of this path from now on."""
    fontManager.addfont(source)
    return FontProperties(fname=source).get_name()


def choose_fonts(figure: Figure) -> None:
    """Let fonts draw the texts of a figure that have their characters; a character that none has becomes its number.

    matplotlib's own font lacks Chinese, Japanese and Korean, for example: it would draw boxes, and warn of each.
    """
    for text in figure.findobj(Text):
        own, families, content = findfont(text.get_fontproperties()), list(text.get_fontfamily()), text.get_text()
        for character in sorted({c for c in content if not has_glyph(own, c)}):
            source = next((s for s in font_sources() if s != OWN_FONT and has_glyph(s, character)), None)
            if source is None:
                say_which_font(content)
                # As a terminal that cannot show it has it: backslash, u, digits.
                text.set_text(text.get_text().replace(character, ascii(character)[1:-1]))
            else:
                families.append(family_of(source))
        text.set_fontfamily(list(dict.fromkeys(families)))


def picture_kinds() -> list[str]:
    """The suffixes, without dots, of the pictures that can be written here."""
    return sorted(FigureCanvasBase.get_supported_filetypes())


def save(figure: Figure, picture: Path) -> None:
    """Write a figure, whole or not at all, as the kind of picture that the suffix says.

    Raises:
        UserError: it cannot be written.
    """
    choose_fonts(figure)
    kind = picture.suffix[1:].lower()
    write_file(picture, lambda file: figure.savefig(file, format=kind, dpi=150))
