"""Image files: which ones a folder holds, how large they are, and their pixels.

OpenCV reads most formats, Pillow the rest. Every command reads images here, so that all of them take the same files and
see the same pixels.
"""

import contextlib
import io
import logging
import mmap
import os
import stat
import struct
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor

from enact_common.utils.errors import UserError

logger = logging.getLogger(__name__)

# OpenCV's own default. Decoding needs six bytes a pixel for a moment, so this limits a small file to about 6 GiB.
MAX_PIXELS = 2**30

# Pillow's names of formats that hold data, drawings or films, or that another program has to draw (Ghostscript).
NO_PICTURES = frozenset("BUFR EPS FPX GRIB HDF5 IPTC MIC MPEG PDF WMF".split())

# Suffixes of pictures that not every installation reads, or none does.
PICTURE_SUFFIXES = frozenset(
    ".3fr .arw .avif .cr2 .cr3 .dng .exr .hdr .heic .heics .heif .heifs .hif .j2k .jp2 .jxl .nef .orf .pef .raf .rw2 "
    ".srw .svg .webp".split()
)

# How to get an image in that no reader knows.
WAY_OUT = "save such images as JPEG or PNG"

# The first bytes of TIFF files, in either byte order, ordinary ones and large ones.
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# TIFF's tag for the bits of each colour.
BITS_PER_SAMPLE = 258

# Bits a colour that cameras and scanners have.
DEPTHS = (8, 10, 12, 14, 16)

# Pillow loads its plug-ins at the first need, which fails where two threads have it at once.
Image.init()

# Whether the log has the line on 16-bit images. Processes that are forked later share it.
_depth_is_logged = mmap.mmap(-1, 1)


# Folders -------------------------------------------------------------------------------------------------------------


def picture_formats() -> list[str]:
    """The formats that we let Pillow read, by its names, in the order in which it tries them."""
    return [name for name in Image.ID if name not in NO_PICTURES]


def image_suffixes() -> frozenset[str]:
    """The suffixes of the image files that this installation reads, lower case, with their dots."""
    formats = set(picture_formats())
    if not features.check("jpg_2000"):  # Pillow registers its suffixes with or without the library
        formats.discard("JPEG2000")
    if "JPEG" in formats:
        formats.add("MPO")  # JPEG's reader opens them
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    # Builds of OpenCV differ too. What it writes, it reads.
    return frozenset(suffixes | {suffix for suffix in PICTURE_SUFFIXES if cv2.haveImageWriter(f"image{suffix}")})


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden: its name begins with a dot, or macOS keeps metadata in it."""
    return name.startswith(".") or name == "__MACOSX"


@dataclass
class Found:
    """The files of a folder and its sub-folders. Paths are spelled as reached, with the links they go through.

    Attributes:
        files: with the suffixes that were looked for, a folder's own before its sub-folders', by their names.
        others: files of other suffixes.
        hidden: files and folders, not looked into.
        again: links to folders that are searched anyway, and links that make a loop.
        closed: folders that cannot be read, with the reason.
    """

    files: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    again: list[Path] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def unreadable(self) -> list[Path]:
        """Those of `others` that are pictures by their suffix, of formats without a reader here."""
        return [path for path in self.others if path.suffix.lower() in PICTURE_SUFFIXES]

    def passed_over(self, before: str = "", behind: str = "") -> str:
        """The files that were passed over, in one line between two other texts; empty where nothing was."""
        parts = []
        if self.others:
            what = "file by its suffix" if len(self.others) == 1 else "files by their suffix"
            parts.append(f"{len(self.others)} {what} ({count_suffixes(self.others)})")
        if self.hidden:
            parts.append(f"{len(self.hidden)} hidden")
        if self.again:
            parts.append(f"{len(self.again)} links to what is searched anyway ({self.again[0]} first)")
        if self.closed:
            parts.append(f"{len(self.closed)} that cannot be read ({self.closed[0]} first)")
        unreadable = sorted({path.suffix.lower() for path in self.unreadable()})
        hint = f"; nothing here reads {', '.join(unreadable)}: {WAY_OUT}" if unreadable else ""
        return f"{before}passed over: {', '.join(parts)}{hint}{behind}" if parts else ""


def count_suffixes(paths: Collection[Path]) -> str:
    """How many files have each suffix, the most frequent first: "2 .heic, 1 .txt"."""
    counts = Counter(path.suffix.lower() or "without a suffix" for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items(), key=lambda item: (-item[1], item)))


def search(folder: Path, suffixes: Collection[str], left_out: Path | None = None) -> Found:
    """Search a folder and its sub-folders. Links to folders are followed; each folder is searched once.

    Args:
        folder: where to begin; may be hidden or a link itself.
        suffixes: of the files to find, lower case.
        left_out: a resolved folder that is not searched.
    """
    found, seen = Found(), set()
    # With each folder go those above it, both by its path as spelled and behind links.
    parent = Path(os.path.realpath(os.path.dirname(os.path.abspath(folder))))
    folders = [(folder, frozenset((parent, *parent.parents)))]
    # Links come last, so that files keep their real place where a link leads to them too.
    links: list[tuple[Path, frozenset[Path]]] = []
    while folders or links:
        place, above = folders.pop() if folders else links.pop(0)
        real = Path(os.path.realpath(place))
        if real == left_out:
            continue
        # A link to a folder above itself would bring in what lies beside the folder that is searched.
        if real in seen or (real in above and place != folder):
            found.again.append(place)
            continue
        seen.add(real)
        try:
            names = sorted(os.listdir(place))
        except OSError as error:
            found.closed.append(f"{place} ({error.strerror})")
            continue
        above = above | {real, *real.parents}
        inside = []
        for name in names:
            path = place / name
            try:
                mode = path.stat().st_mode
            except OSError:
                mode = stat.S_IFREG  # a link to nothing, say: reading it gives the reason
            if is_hidden(name):
                found.hidden.append(path)
            elif stat.S_ISDIR(mode):
                (links if path.is_symlink() else inside).append((path, above))
            elif stat.S_ISREG(mode):
                (found.files if path.suffix.lower() in suffixes else found.others).append(path)
        folders += reversed(inside)
    found.files.sort(key=lambda path: [(1, part) for part in path.parts[:-1]] + [(0, path.name)])
    return found


def images_in(folder: Path, named: str) -> list[Path]:
    """The images in a folder and its sub-folders. One line on standard error says what was passed over.

    Args:
        folder: where to search.
        named: the flag and the folder, for messages.

    Raises:
        UserError: there are none.
    """
    found = search(folder, image_suffixes())
    if not found.files:
        raise UserError(f"{named}: no image in this folder{found.passed_over(' (', ')')}")
    print(found.passed_over(f"{named}: ", "\n"), end="", file=sys.stderr)
    return found.files


# Headers -------------------------------------------------------------------------------------------------------------


def check_pixels(width: int, height: int) -> None:
    """Refuse an image that would take too much memory.

    Raises:
        ValueError: saying the size and the limit.
    """
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"it has {width:,} x {height:,} pixels, width x height, and the most that is read are {MAX_PIXELS:,}; make "
            "it smaller"
        )


@contextlib.contextmanager
def open_image(source: Path | bytes | np.ndarray | BinaryIO) -> Iterator[Image.Image]:
    """An image file, its path, its bytes or an open file, as `PIL.Image.open` gives it: the header is read.

    Its pixels are limited by `MAX_PIXELS`. Pillow's own limit is lower and belongs to the whole process: changing it
    would take away the guard of a program that imports this package. So the readers are asked directly.

    Raises:
        OSError: it cannot be read, or (UnidentifiedImageError) is of no known format.
        ValueError: it has too many pixels.
        Exception: damaged headers make Pillow's readers raise anything.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(source, Path):
            file = stack.enter_context(open(source, "rb"))
        else:
            file = io.BytesIO(source) if isinstance(source, bytes | np.ndarray) else source
        start = file.read(16)
        for name in picture_formats():
            reader, accepts = Image.OPEN[name]
            # `PIL.Image.open` takes the same errors for "of another format".
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
                answer = not accepts or accepts(start)
                if answer and not isinstance(answer, str):  # a text says which library is missing
                    file.seek(0)
                    image = reader(file, "")
                    break
        else:
            raise UnidentifiedImageError("of no known format")
        check_pixels(*image.size)
        yield image


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file in pixels as stored, from its header.

    Raises:
        UserError: it cannot be read, is no image, or has too many pixels.
    """
    with contextlib.suppress(Exception), open_image(path) as image:
        return image.size
    # A format that only OpenCV knows; or an error, which has the reason.
    height, width = decode_rgb(read_file(path), path).shape[:2]
    return width, height


# Pixels --------------------------------------------------------------------------------------------------------------


def read_file(path: Path) -> np.ndarray:
    """A file's bytes, uint8 (bytes,).

    Raises:
        UserError: it cannot be read.
    """
    try:
        return np.fromfile(path, dtype=np.uint8)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def decode_image(path: Path) -> Tensor:
    """An image file as `decode_bytes` gives it.

    Raises:
        UserError: the file is missing, or is no image that can be read whole.
    """
    return decode_bytes(read_file(path), path)


def decode_bytes(encoded: np.ndarray, path: Path) -> Tensor:
    """An encoded image as RGB, uint8 (3, height, width), as `decode_rgb` gives it.

    Raises:
        UserError: it is no image that can be read whole.
    """
    return torch.from_numpy(decode_rgb(encoded, path)).permute(2, 0, 1).contiguous()


def decode_rgb(encoded: np.ndarray, path: Path) -> np.ndarray:
    """An encoded image as RGB, uint8 (height, width, 3), whatever its colours.

    16 bits become eight as `eight_bits` says; of an animation, the first frame is read. Transparency is left out: a
    pixel has the colour that is stored beside it. EXIF rotation is not applied: COCO's boxes refer to the pixels as
    stored, so a rotation flag must not turn them. (That of a TIFF is a part of its format, and every reader applies
    it.)

    Args:
        encoded: uint8 (bytes,).
        path: the file it was read from, for messages.

    Raises:
        UserError: it is no image that can be read whole, has 32 bits a colour, or more than `MAX_PIXELS` pixels.
    """
    try:
        # OpenCV is the fastest reader; Pillow knows a few formats more.
        pixels = None if is_for_pil(encoded) else opencv_to_rgb(encoded, str(path))
        if pixels is None:
            with open_image(encoded) as image:
                pixels = pil_to_rgb(image, str(path))
        return pixels
    except Exception as error:  # what damaged files make the readers raise has no end
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "of no known format"
            if path.suffix.lower() in PICTURE_SUFFIXES - image_suffixes():
                reason = f"nothing here reads {path.suffix}; {WAY_OUT}"
        raise UserError(f"{path}: not an image that can be read whole ({reason})") from error


def is_for_pil(encoded: np.ndarray) -> bool:
    """Whether OpenCV would make other pixels of an encoded image, uint8 (bytes,), than those that are stored."""
    start = encoded[:4].tobytes()
    if start.startswith(b"\xff\xd8"):
        # A JPEG without its end marker: OpenCV fills a truncated one up with grey. PIL tells it from a file with
        # something behind its end.
        return encoded[-2:].tobytes() != b"\xff\xd9"
    if start in TIFF_STARTS:
        # OpenCV blends transparent pixels of 8 bits with black. Pillow reads only the upper eight of 16 bits.
        with contextlib.suppress(Exception), open_image(encoded) as image:
            return image.getbands()[-1] in ("A", "a") and 16 not in image.tag_v2.get(BITS_PER_SAMPLE, ())
    # OpenCV shows the background of a transparent GIF, if it reads GIF at all.
    return start == b"GIF8" or len(encoded) == 0


def opencv_to_rgb(encoded: np.ndarray, name: str) -> np.ndarray | None:
    """An encoded image as RGB, uint8 (height, width, 3), read by OpenCV; None where that cannot be.

    Args:
        encoded: uint8 (bytes,).
        name: of the image, for the log.

    Raises:
        ValueError: it has 32 bits a colour, or too many pixels.
    """
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    # AVIF says how many bits it has, and is brought to eight by that.
    if encoded[4:8].tobytes() != b"ftyp":
        flags |= cv2.IMREAD_ANYDEPTH
    try:
        bgr = cv2.imdecode(encoded, flags)  # (height, width, 3)
    except cv2.error:  # too many pixels, and some damage: Pillow says what it is
        return None
    if bgr is None:
        return None
    check_pixels(*bgr.shape[1::-1])  # OpenCV's own limit can be raised by its environment variables
    if bgr.dtype == np.uint16:
        bgr = eight_bits(bgr, name)
    if bgr.dtype != np.uint8:
        raise ValueError(TOO_DEEP)
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


TOO_DEEP = "it has 32 bits a colour, for which no brightest is agreed on; save it with 8 or 16"


def pil_to_rgb(image: Image.Image, name: str = "an image") -> np.ndarray:
    """A PIL image as RGB, uint8 (height, width, 3), as `decode_rgb` gives it.

    Args:
        image: the image.
        name: of it, for the log.

    Raises:
        ValueError: it has 32 bits a colour, or colours that cannot be converted.
    """
    # Older releases of Pillow give 16-bit PNG files 32 bits, and all give them to PGM files.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # PIL's own conversion cuts off at 255.
        grey = eight_bits(np.asarray(image).astype(np.uint16), name)  # (height, width)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(TOO_DEEP)
    return np.array(image.convert("RGB"))


def eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """The colours of a 16-bit image, uint16 (height, width, ...), as uint8 of the same shape.

    Cameras with 10, 12 or 14 bits often leave the upper bits of a 16-bit file empty, and nothing in the file says so.
    So an image counts as one of the least of 8, 10, 12, 14 and 16 bits that its highest value fits into, and the upper
    eight of these are taken. It depends on the image alone: training, checks and prediction see the same. The first
    image of fewer than 16 bits is logged.

    Args:
        values: the colours, without transparency.
        name: of the image, for the log.
    """
    highest = int(values.max())
    bits = next(depth for depth in DEPTHS if highest < 1 << depth)
    if bits < 16 and highest and not _depth_is_logged[0]:
        _depth_is_logged[0] = 1
        logger.warning(
            "%s: a 16-bit image whose highest value is %d: taken as one of %d bits. Other 16-bit images are judged by "
            "their own highest values, without a further line",
            name, highest, bits,
        )  # fmt: skip
    return (values >> (bits - 8)).astype(np.uint8)
