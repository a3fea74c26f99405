"""Search for installed fonts that have a text's characters."""

import importlib.util
import logging
import os
import re
import sys
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageFont

logger = logging.getLogger("enact")

# Font height: minimum in pixels, and fractions of the square root of the picture's area and of its shorter side.
FONT_MIN, FONT_OF_AREA, FONT_OF_SHORTER = 13, 0.022, 0.06

# Source of Pillow's own font, and a code point that no font has.
OWN_FONT, NO_CHARACTER = "", "\U0010ffff"
# Drawn next to every name.
SCORE_CHARACTERS = "0123456789."
# Suffixes of font files, names of faces to try last, and fonts that only have placeholder glyphs.
FONT_SUFFIXES = frozenset(".otf .ttc .ttf".split())
STYLED = re.compile("Bold|Italic|Oblique|Light|Thin|Black|Mono|Serif")
EMPTY_FONTS = re.compile("lastresort|adobeblank", re.IGNORECASE)
# Prefixes of the Unicode names of characters in Debian's package fonts-noto-cjk.
CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "IDEOGRAPHIC", "FULLWIDTH", "BOPOMOFO")


@cache
def readable_name(name: str, label: int) -> tuple[str, str]:
    """Return a class name that can be drawn here, and the source for `open_font` of a font that has its characters.

    If no font has them all, accents and unknown characters are dropped. If nothing remains, the label's number replaces
    the name.
    """
    name = " ".join(name.split())
    for source in font_sources():
        if name and all(has_glyph(source, character) for character in name + SCORE_CHARACTERS):
            return name, source
    known = "".join(c for c in unicodedata.normalize("NFKD", name) if has_glyph(OWN_FONT, c)).strip()
    if name:
        say_which_font(name)
    return known or f"class {label}", OWN_FONT


# Packages that `say_which_font` has already named.
_said: set[str] = set()


def say_which_font(text: str) -> None:
    """Warn once per package that no font here has all characters of a text, and say what to install."""
    cjk = any(unicodedata.name(character, "").startswith(CJK) for character in text)
    package = "fonts-noto-cjk" if cjk else "fonts-noto-core"
    if package not in _said:
        _said.add(package)
        logger.warning(
            "no font here has all characters of %r, so missing ones are not drawn; install a font that has them "
            "(on Debian and Ubuntu: apt install %s)", text, package,
        )  # fmt: skip


@cache
def font_sources() -> tuple[str, ...]:
    """Return the available sources for `open_font`: Pillow's own, matplotlib's if installed, then the system's.

    Pillow's own font has only ASCII; matplotlib's (DejaVu Sans) also has European scripts, Arabic and Hebrew.
    """
    matplotlib = importlib.util.find_spec("matplotlib")
    bundled = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf" if matplotlib else None
    sources = (OWN_FONT, *((str(bundled),) if bundled else ()), *map(str, installed_fonts()))
    return tuple(source for source in sources if open_font(source, FONT_MIN) is not None)


def installed_fonts() -> list[Path]:
    """Return the font files of the system and the user, plain faces before bold and slanted ones."""
    environment = os.environ.get
    if sys.platform == "win32":
        folders = [environment("WINDIR", "C:/Windows") + "/Fonts"]
        folders += [environment("LOCALAPPDATA", "~/AppData/Local") + "/Microsoft/Windows/Fonts"]
    elif sys.platform == "darwin":
        folders = ["/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"]
    else:
        shared = environment("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        roots = [environment("XDG_DATA_HOME") or "~/.local/share", *shared.split(":")]
        folders = ["~/.fonts", *(f"{root}/fonts" for root in roots)]
    paths = [path for folder in folders for path in Path(os.path.expanduser(folder)).rglob("*")]
    paths = [p for p in paths if p.suffix.lower() in FONT_SUFFIXES and not EMPTY_FONTS.search(p.name)]
    return sorted(paths, key=lambda path: (bool(STYLED.search(path.name)), path.name))


@lru_cache(maxsize=32)  # each keeps its file open
def open_font(source: str, size: int) -> ImageFont.FreeTypeFont | None:
    """Return the font at a path, or `OWN_FONT`, of this height in pixels; None if it cannot be read."""
    if source == OWN_FONT:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(source, size)
    except OSError:
        return None


@cache
def has_glyph(source: str, character: str) -> bool:
    """Return whether a font can draw a character, other than as the box for missing characters."""
    if character.isspace():
        return True
    font = open_font(source, FONT_MIN * 2)
    drawn, unknown = (font.getmask(text) for text in (character, NO_CHARACTER))
    return drawn.size != unknown.size or bytes(drawn) != bytes(unknown)
