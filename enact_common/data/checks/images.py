"""The image files of a split, read in several threads."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from enact_common.data.checks.split import Split
from enact_common.data.exif import exif_orientation
from enact_common.data.images import decode_rgb, read_file
from enact_common.utils.errors import UserError
from enact_common.utils.signals import cancelling

# Decoding is OpenCV's, which lets other threads run.
MAX_THREADS = 8


@dataclass(frozen=True)
class StoredImage:
    """The contents of an image file, as they were read.

    Attributes:
        size: (width, height) in pixels as stored; None where it cannot be read.
        orientation: EXIF's, 1 to 8, 1 being upright.
        digest: of the pixels.
        error: why it cannot be read.
    """

    size: tuple[int, int] | None = None
    orientation: int = 1
    digest: bytes = b""
    error: str = ""


def inspect_image(path: Path) -> StoredImage | None:
    """Read an image file whole; None where there is no such file."""
    if file_size(path) is None:
        return None
    try:
        encoded = read_file(path)
        pixels = decode_rgb(encoded, path)  # (height, width, 3)
    except UserError as error:
        # Where PIL knows no such format, its reason names an object in memory.
        return StoredImage(error=str(error))
    height, width = pixels.shape[:2]
    digest = hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=16, key=f"{width} {height}".encode()).digest()
    return StoredImage((width, height), exif_orientation(encoded.tobytes()), digest)


def inspect_images(split: Split, progress: bool = False) -> list[StoredImage | None]:
    """Read all image files of a split whole, with threads.

    Args:
        split: whose.
        progress: show a bar on standard error, where that is a terminal.

    Returns:
        of each image what its file holds, None where it is missing.
    """
    paths = [split.path(image) for image in split.images]
    opencv_threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        with ThreadPoolExecutor(MAX_THREADS) as pool, cancelling(pool):
            stored = pool.map(inspect_image, paths)
            bar = tqdm(stored, split.name, len(paths), unit="image", disable=None if progress else True)
            return list(bar)
    finally:
        cv2.setNumThreads(opencv_threads)


def file_size(path: Path) -> int | None:
    """Bytes of a file; None where there is none, or can be none of this name."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return None
