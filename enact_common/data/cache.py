"""The images of data sets held in memory, as files or decoded, where worker processes share them (`--cache_mode`)."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from enact_common.data.coco import CocoDetection
from enact_common.data.images import decode_rgb, image_size, read_file
from enact_common.utils.errors import UserError
from enact_common.utils.progress import Progress

# Reading waits for disks and decoding is OpenCV's, which lets other threads run: both go in parallel.
MAX_THREADS = 8


@dataclass(frozen=True)
class ImageCache:
    """Arrays of bytes in one tensor; the cache of a data set has one for each of its items.

    One tensor, not a list of objects: worker processes that are forked afterwards share its pages, since nothing in
    them changes, not even a reference count.

    Attributes:
        content: uint8 (bytes,), the arrays, one behind the other.
        begins: int64 (n,), where in it each begins.
        shapes: int64 (n, dimensions), of each.
    """

    content: Tensor
    begins: Tensor
    shapes: Tensor

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int) -> Tensor:
        """An array, uint8: a part of `content`, not a copy."""
        begin, shape = int(self.begins[index]), self.shapes[index]
        return self.content[begin : begin + int(shape.prod())].view(shape.tolist())

    def select(self, indices: Tensor) -> "ImageCache":
        """The cache of some of the arrays, indices int64 (m,), in that order; its content is this one's."""
        return ImageCache(self.content, self.begins[indices], self.shapes[indices])


def cache_images(datasets: Sequence[CocoDetection], mode: str) -> None:
    """Read the images of data sets into memory; from then on they are taken from there.

    A file that several data sets have is held once. One that cannot be read is an error, or is noted in the data sets
    as unreadable where all that have it go on without (`on_unreadable`).

    Args:
        datasets: whose images; call this before their worker processes start.
        mode: "encoded" holds the files as they are, "decoded" the pixels, which need five to ten times the memory and
            no decoding in every epoch.

    Raises:
        UserError: a file cannot be read, or most cannot where single ones may be unreadable; or all of them together
            are larger than this machine's memory, which is found out before any is read.
    """
    measure, read, nothing = (
        (pixels_shape, read_pixels, (3, 0, 0)) if mode == "decoded" else (file_shape, read_encoded, (0,))
    )
    paths_of = [[dataset.path(i) for i in range(len(dataset))] for dataset in datasets]
    paths = list(dict.fromkeys(chain.from_iterable(paths_of)))
    needed = {
        path
        for dataset, own in zip(datasets, paths_of, strict=True)
        if dataset.on_unreadable == "raise"
        for path in own
    }
    failed: dict[Path, UserError] = {}

    def attempt(step: Callable, path: Path, *args):
        try:
            return step(path, *args)
        except UserError as error:
            if path in needed:
                raise
            failed[path] = error
            return None

    folders = " and ".join(dict.fromkeys(dataset.image_folder.name for dataset in datasets))
    opencv_threads = cv2.getNumThreads()
    # The images are the parallelism. OpenCV's own threads would also be missing in processes that are forked later.
    cv2.setNumThreads(0)
    try:
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            measured = pool.map(lambda path: attempt(measure, path) or nothing, paths)
            shapes = torch.tensor(list(measured), dtype=torch.int64)
            sizes = shapes.prod(dim=1)
            ends = sizes.cumsum(0)
            check_memory(int(ends[-1]), mode)
            cache = ImageCache(torch.empty(int(ends[-1]), dtype=torch.uint8), ends - sizes, shapes)

            def load(i: int) -> None:
                place = cache[i].numpy()
                content = None if paths[i] in failed else attempt(read, paths[i], place.shape)
                if content is not None:
                    np.copyto(place, content)

            title = f"reading {folders} into memory"
            progress = Progress(paths, title, images_per_step=1, print_freq=max(len(paths) // 10, 1))
            loaded = pool.map(load, range(len(paths)))
            for i, _ in progress:
                next(loaded)
                if progress.due(i):
                    progress.show(i, {"GiB": int(ends[i]) / 2**30})
    finally:
        cv2.setNumThreads(opencv_threads)
    index = {path: i for i, path in enumerate(paths)}
    for dataset, own in zip(datasets, paths_of, strict=True):
        own_failed = {i: failed[path] for i, path in enumerate(own) if path in failed}
        dataset.set_cache(cache.select(torch.tensor([index[path] for path in own])), own_failed)


def file_shape(path: Path) -> tuple[int]:
    """(bytes,) of a file.

    Raises:
        UserError: it cannot be found.
    """
    try:
        return (path.stat().st_size,)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def read_encoded(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A file's bytes, uint8 (bytes,).

    Raises:
        UserError: it cannot be read, or is not of this shape.
    """
    encoded = read_file(path)
    if encoded.shape != shape:
        raise UserError(f"{path}: changed while it was read")
    return encoded


def pixels_shape(path: Path) -> tuple[int, int, int]:
    """(3, height, width) of an image, from its header.

    Raises:
        UserError: it cannot be read, is no image, or has too many pixels.
    """
    width, height = image_size(path)
    return 3, height, width


def read_pixels(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An image, uint8 (3, height, width), as `CocoDetection.image` gives it.

    Raises:
        UserError: it cannot be read, or is not of this shape.
    """
    pixels = decode_rgb(read_file(path), path).transpose(2, 0, 1)
    if pixels.shape != shape:
        (_, h, w), (_, height, width) = pixels.shape, shape
        raise UserError(
            f"{path}: has {h} x {w} pixels (height x width), but its header says {height} x {width}; mend it, or pass "
            "--cache_mode encoded"
        )
    return pixels


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(size: int, mode: str) -> None:
    """Refuse a cache that this machine's memory cannot hold.

    Args:
        size: bytes, in each of the processes that torchrun starts on this machine.
        mode: as for `cache_images`.

    Raises:
        UserError: saying both sizes.
    """
    processes, memory = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), physical_memory()
    if size * processes > memory:
        content, way_out = "the image files", "leave the flag out"
        if mode == "decoded":
            content, way_out = "the decoded images", f"pass --cache_mode encoded, or {way_out}"
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"--cache_mode {mode}: {content} are {gibibytes(size)}{each}, this machine's memory is "
            f"{gibibytes(memory)}; {way_out}"
        )


def gibibytes(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.4g} GiB"
