"""Shared parts of the plots: colours, fonts and atomic saving. Needs matplotlib (extra `plots`)."""

from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.text import Text

from enact_common.drawing.fonts import OWN_FONT, font_sources, has_glyph, say_which_font
from enact_common.utils.files import write_file

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C4B00")

# Colour of background lines.
GREY = "#BBBBBB"


def colour(number: int) -> str:
    """Return the colour of the line with this number, from 0; colours repeat after the last."""
    return COLOURS[number % len(COLOURS)]


def literal(text: str) -> str:
    """Escape dollar signs, which matplotlib would take for formulas in names of classes and runs."""
    return text.replace("$", r"\$")


@cache
def family_of(source: str) -> str:
    """Register the font file of this path with matplotlib and return its family name."""
    fontManager.addfont(source)
    return FontProperties(fname=source).get_name()


def choose_fonts(figure: Figure) -> None:
    """Set fonts that have the characters of a figure's texts; a character without a font becomes an escape.

    matplotlib's own font lacks, for example, Chinese, Japanese and Korean: it would draw boxes and warn of each.
    """
    for text in figure.findobj(Text):
        own, families, content = findfont(text.get_fontproperties()), list(text.get_fontfamily()), text.get_text()
        for character in sorted({c for c in content if not has_glyph(own, c)}):
            source = next((s for s in font_sources() if s != OWN_FONT and has_glyph(s, character)), None)
            if source is None:
                say_which_font(content)
                # The escape of Python's ascii(): backslash, u, digits.
                text.set_text(text.get_text().replace(character, ascii(character)[1:-1]))
            else:
                families.append(family_of(source))
        text.set_fontfamily(list(dict.fromkeys(families)))


def picture_kinds() -> list[str]:
    """Return the supported picture suffixes, without dots."""
    return sorted(FigureCanvasBase.get_supported_filetypes())


def rendered(figure: Figure) -> np.ndarray:
    """Return a figure's pixels, uint8 (height, width, 3), RGB, at the figure's own resolution."""
    choose_fonts(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def save(figure: Figure, picture: Path) -> None:
    """Write a figure atomically, in the format that the suffix sets; a UserError if it cannot be written."""
    choose_fonts(figure)
    kind = picture.suffix[1:].lower()
    write_file(picture, lambda file: figure.savefig(file, format=kind, dpi=150))
