"""Read the image files of a split in several threads."""

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

# OpenCV's decoding releases the GIL.
MAX_THREADS = 8


@dataclass(frozen=True)
class StoredImage:
    """The properties of an image file.

    Attributes:
        size: (width, height) in pixels as stored; None if the file cannot be read.
        orientation: EXIF orientation, 1 to 8; 1 is upright.
        digest: hash of the pixels.
        error: why the file cannot be read; else empty.
    """

    size: tuple[int, int] | None = None
    orientation: int = 1
    digest: bytes = b""
    error: str = ""


def inspect_image(path: Path) -> StoredImage | None:
    """Read a whole image file; None if it is missing."""
    if file_size(path) is None:
        return None
    try:
        encoded = read_file(path)
        pixels = decode_rgb(encoded, path)  # (height, width, 3)
    except UserError as error:
        return StoredImage(error=str(error))
    height, width = pixels.shape[:2]
    digest = hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=16, key=f"{width} {height}".encode()).digest()
    return StoredImage((width, height), exif_orientation(encoded.tobytes()), digest)


def inspect_images(split: Split, progress: bool = False) -> list[StoredImage | None]:
    """The properties of each image's file, None if it is missing; reads all files of a split in threads."""
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
    """The size of a file in bytes; None if it is missing or its name is invalid."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return None
