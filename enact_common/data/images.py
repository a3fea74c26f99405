"""Find image files in folders, and read their sizes and pixels.

OpenCV reads most formats, Pillow the rest. Every command reads images with this module and therefore accepts the same
files and sees the same pixels.
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

# OpenCV's default. Decoding briefly needs six bytes per pixel, so a small file can take at most about 6 GiB.
MAX_PIXELS = 2**30

# Pillow's names of formats that hold data, drawings or films, or that need another program (Ghostscript).
NO_PICTURES = frozenset("BUFR EPS FPX GRIB HDF5 IPTC MIC MPEG PDF WMF".split())

# Suffixes of pictures that some or all installations cannot read.
PICTURE_SUFFIXES = frozenset(
    ".3fr .arw .avif .cr2 .cr3 .dng .exr .hdr .heic .heics .heif .heifs .hif .j2k .jp2 .jxl .nef .orf .pef .raf .rw2 "
    ".srw .svg .webp".split()
)

# Advice for images without a reader.
WAY_OUT = "save such images as JPEG or PNG"

# The first bytes of TIFF and BigTIFF files, in either byte order.
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# The TIFF tag of the bits per channel.
BITS_PER_SAMPLE = 258

# Bits per channel of cameras and scanners.
DEPTHS = (8, 10, 12, 14, 16)

# Load Pillow's plug-ins now: loading them on demand fails if two threads do it at once.
Image.init()

# Whether the warning about 16-bit images was logged. Processes that are forked later share this flag.
_depth_is_logged = mmap.mmap(-1, 1)


# Folders -------------------------------------------------------------------------------------------------------------


def picture_formats() -> list[str]:
    """Pillow's names of the formats that we let it read, in the order in which it tries them."""
    return [name for name in Image.ID if name not in NO_PICTURES]


def image_suffixes() -> frozenset[str]:
    """The suffixes of image files that this installation can read, in lower case, with their dots."""
    formats = set(picture_formats())
    if not features.check("jpg_2000"):  # Pillow registers its suffixes even without the library
        formats.discard("JPEG2000")
    if "JPEG" in formats:
        formats.add("MPO")  # JPEG's reader opens them
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    # Builds of OpenCV differ too. OpenCV reads every format that it writes.
    return frozenset(suffixes | {suffix for suffix in PICTURE_SUFFIXES if cv2.haveImageWriter(f"image{suffix}")})


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden: its name starts with a dot, or it is macOS's metadata folder."""
    return name.startswith(".") or name == "__MACOSX"


@dataclass
class Found:
    """The result of a search in a folder and its sub-folders. Paths keep the links that they go through.

    Attributes:
        files: files with the wanted suffixes, sorted by name, a folder's files before those of its sub-folders.
        others: files with other suffixes.
        hidden: hidden files and folders, not searched.
        again: links to folders that are searched anyway, and links that form a loop.
        closed: folders that cannot be read, with the reason.
    """

    files: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    again: list[Path] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def unreadable(self) -> list[Path]:
        """The files in `others` with the suffix of a picture format that this installation cannot read."""
        return [path for path in self.others if path.suffix.lower() in PICTURE_SUFFIXES]

    def passed_over(self, before: str = "", behind: str = "") -> str:
        """One line on the skipped files and folders, between two other texts; empty if nothing was skipped."""
        parts = []
        if self.others:
            noun = "file by its suffix" if len(self.others) == 1 else "files by their suffix"
            parts.append(f"{len(self.others)} {noun} ({count_suffixes(self.others)})")
        if self.hidden:
            parts.append(f"{len(self.hidden)} hidden")
        if self.again:
            parts.append(f"{len(self.again)} links to folders that are searched anyway ({self.again[0]} first)")
        if self.closed:
            parts.append(f"{len(self.closed)} unreadable folders ({self.closed[0]} first)")
        unreadable = sorted({path.suffix.lower() for path in self.unreadable()})
        hint = f"; no reader for {', '.join(unreadable)}: {WAY_OUT}" if unreadable else ""
        return f"{before}skipped: {', '.join(parts)}{hint}{behind}" if parts else ""


def count_suffixes(paths: Collection[Path]) -> str:
    """The number of files with each suffix, the most frequent first: "2 .heic, 1 .txt"."""
    counts = Counter(path.suffix.lower() or "without a suffix" for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items(), key=lambda item: (-item[1], item)))


def search(folder: Path, suffixes: Collection[str], left_out: Path | None = None) -> Found:
    """Search a folder, which may be hidden or a link, and its sub-folders for files with these lower-case suffixes.

    Links to folders are followed; each folder is searched once. `left_out` is a resolved folder to skip.
    """
    found, seen = Found(), set()
    # Each folder carries its parents, those of its path and those behind links.
    parent = Path(os.path.realpath(os.path.dirname(os.path.abspath(folder))))
    folders = [(folder, frozenset((parent, *parent.parents)))]
    # Follow links last: a file that a link leads to as well is listed under its real path.
    links: list[tuple[Path, frozenset[Path]]] = []
    while folders or links:
        place, above = folders.pop() if folders else links.pop(0)
        real = Path(os.path.realpath(place))
        if real == left_out:
            continue
        # A link to a folder above itself would bring in siblings of the searched folder.
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
                mode = stat.S_IFREG  # such as a dangling link: reading it later gives the reason
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
    """The images in a folder and its sub-folders. A line on standard error counts the skipped files.

    Raises:
        UserError: there are no images. The message starts with `named`, the flag and the folder.
    """
    found = search(folder, image_suffixes())
    if not found.files:
        raise UserError(f"{named}: no image in this folder{found.passed_over(' (', ')')}")
    print(found.passed_over(f"{named}: ", "\n"), end="", file=sys.stderr)
    return found.files


# Headers -------------------------------------------------------------------------------------------------------------


def check_pixels(width: int, height: int) -> None:
    """Raise a ValueError for an image that would take too much memory: more than `MAX_PIXELS` pixels."""
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"it has {width:,} x {height:,} pixels (width x height), more than the limit of {MAX_PIXELS:,}; make it "
            "smaller"
        )


@contextlib.contextmanager
def open_image(source: Path | bytes | np.ndarray | BinaryIO) -> Iterator[Image.Image]:
    """Open an image like `PIL.Image.open`, from a path, bytes or an open file. Only the header is read.

    `MAX_PIXELS` limits its pixels. Pillow's limit is lower and global: raising it would remove the guard of a program
    that imports this package. So this function calls Pillow's readers directly.

    Raises:
        OSError: the file cannot be read, or (UnidentifiedImageError) has an unknown format.
        ValueError: the image has too many pixels.
        Exception: Pillow's readers can raise any error for damaged headers.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(source, Path):
            file = stack.enter_context(open(source, "rb"))
        else:
            file = io.BytesIO(source) if isinstance(source, bytes | np.ndarray) else source
        start = file.read(16)
        for name in picture_formats():
            reader, accepts = Image.OPEN[name]
            # `PIL.Image.open` also takes these errors as "another format".
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
                answer = not accepts or accepts(start)
                if answer and not isinstance(answer, str):  # a string says which library is missing
                    file.seek(0)
                    image = reader(file, "")
                    break
        else:
            raise UnidentifiedImageError("unknown format")
        check_pixels(*image.size)
        yield image


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file in pixels as stored, from its header.

    Raises:
        UserError: the file cannot be read, is not an image, or has too many pixels.
    """
    with contextlib.suppress(Exception), open_image(path) as image:
        return image.size
    # Only OpenCV may know the format; otherwise decoding raises the error with its reason.
    height, width = decode_rgb(read_file(path), path).shape[:2]
    return width, height


# Pixels --------------------------------------------------------------------------------------------------------------


def read_file(path: Path) -> np.ndarray:
    """The bytes of a file, uint8 (bytes,); a UserError if it cannot be read."""
    try:
        return np.fromfile(path, dtype=np.uint8)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def decode_image(path: Path) -> Tensor:
    """Decode an image file: RGB, uint8 (3, height, width), see `decode_rgb`; a UserError if that fails."""
    return decode_bytes(read_file(path), path)


def decode_bytes(encoded: np.ndarray, path: Path) -> Tensor:
    """Decode an image file's content: RGB, uint8 (3, height, width), see `decode_rgb`; a UserError if that fails."""
    return torch.from_numpy(decode_rgb(encoded, path)).permute(2, 0, 1).contiguous()


def decode_rgb(encoded: np.ndarray, path: Path) -> np.ndarray:
    """Decode an image of any colour mode, uint8 (bytes,): RGB, uint8 (height, width, 3).

    `eight_bits` converts 16-bit images. An animation gives its first frame. The alpha channel is dropped without
    blending. EXIF rotation is not applied, because COCO's boxes refer to the pixels as stored. (In TIFF, the
    orientation is part of the format, and every reader applies it.)

    Raises:
        UserError: the bytes are not a complete image, or it has 32 bits per channel or more than `MAX_PIXELS` pixels.
            The message names the path.
    """
    try:
        # OpenCV is the fastest reader; Pillow knows a few more formats.
        pixels = None if is_for_pil(encoded) else opencv_to_rgb(encoded, str(path))
        if pixels is None:
            with open_image(encoded) as image:
                pixels = pil_to_rgb(image, str(path))
        return pixels
    except Exception as error:  # the readers can raise any error for damaged files
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "unknown format"
            if path.suffix.lower() in PICTURE_SUFFIXES - image_suffixes():
                reason = f"no reader for {path.suffix}; {WAY_OUT}"
        raise UserError(f"{path}: not an image that can be read whole ({reason})") from error


def is_for_pil(encoded: np.ndarray) -> bool:
    """Whether OpenCV would alter the stored pixels of an encoded image, uint8 (bytes,)."""
    start = encoded[:4].tobytes()
    if start.startswith(b"\xff\xd8"):
        # Without an end marker, the JPEG is truncated or has extra bytes after its end. OpenCV fills a truncated one
        # with grey; PIL tells the two apart.
        return encoded[-2:].tobytes() != b"\xff\xd9"
    if start in TIFF_STARTS:
        # OpenCV blends transparent 8-bit pixels with black. Pillow reads only the upper 8 of 16 bits.
        with contextlib.suppress(Exception), open_image(encoded) as image:
            return image.getbands()[-1] in ("A", "a") and 16 not in image.tag_v2.get(BITS_PER_SAMPLE, ())
    # OpenCV, if it reads GIF, shows the background of transparent ones.
    return start == b"GIF8" or len(encoded) == 0


def opencv_to_rgb(encoded: np.ndarray, name: str) -> np.ndarray | None:
    """Decode an image with OpenCV: RGB, uint8 (height, width, 3); None if OpenCV cannot read it.

    Raises:
        ValueError: the image has 32 bits per channel, or too many pixels.
    """
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    # AVIF states its bit depth, so OpenCV converts it to 8 bits correctly.
    if encoded[4:8].tobytes() != b"ftyp":
        flags |= cv2.IMREAD_ANYDEPTH
    try:
        bgr = cv2.imdecode(encoded, flags)  # (height, width, 3)
    except cv2.error:  # too many pixels or damage: Pillow's error gives the reason
        return None
    if bgr is None:
        return None
    check_pixels(*bgr.shape[1::-1])  # OpenCV's own limit can be raised by its environment variables
    if bgr.dtype == np.uint16:
        bgr = eight_bits(bgr, name)
    if bgr.dtype != np.uint8:
        raise ValueError(TOO_DEEP)
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


TOO_DEEP = "it has 32 bits per channel, which have no standard value range; save it with 8 or 16"


def pil_to_rgb(image: Image.Image, name: str = "an image") -> np.ndarray:
    """Convert a PIL image to RGB, uint8 (height, width, 3), see `decode_rgb`. `name` is for the log.

    Raises:
        ValueError: the image has 32 bits per channel, or its colours cannot be converted.
    """
    # Older releases of Pillow read 16-bit PNG files as 32-bit; all releases do so with PGM files.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # PIL's conversion clips at 255.
        grey = eight_bits(np.asarray(image).astype(np.uint16), name)  # (height, width)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(TOO_DEEP)
    return np.array(image.convert("RGB"))


def eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Convert the colours of a 16-bit image, uint16 (height, width, ...) without alpha, to uint8 of the same shape.

    Cameras with 10, 12 or 14 bits often leave the upper bits of a 16-bit file empty, and the file does not record that.
    So the bit depth is the smallest of 8, 10, 12, 14 and 16 that holds the image's highest value, and the upper 8 of
    these bits are kept. The result depends only on the image, so training, checks and prediction agree. The first image
    below 16 bits is logged.
    """
    highest = int(values.max())
    bits = next(depth for depth in DEPTHS if highest < 1 << depth)
    if bits < 16 and highest and not _depth_is_logged[0]:
        _depth_is_logged[0] = 1
        logger.warning(
            "%s: a 16-bit image with highest value %d is read as having %d bits. The depth of other 16-bit images "
            "follows from their own highest values, without further warnings",
            name, highest, bits,
        )  # fmt: skip
    return (values >> (bits - 8)).astype(np.uint8)
