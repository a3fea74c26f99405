"""A cache of images in memory, encoded or decoded, shared by the worker processes (`--cache_mode`)."""

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

# Disk reads and OpenCV's decoding release the GIL, so threads run in parallel.
MAX_THREADS = 8


@dataclass(frozen=True)
class ImageCache:
    """Byte arrays packed into one tensor, one array per item of a data set.

    Worker processes that are forked later share the tensor's pages. With a list of objects, changing reference counts
    would make each worker copy them.

    Attributes:
        content: uint8 (bytes,), the concatenated arrays.
        offsets: int64 (n,), the start of each array in `content`.
        shapes: int64 (n, dimensions), the shape of each array.
    """

    content: Tensor
    offsets: Tensor
    shapes: Tensor

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Tensor:
        """An array, uint8: a view of `content`, not a copy."""
        start, shape = int(self.offsets[index]), self.shapes[index]
        return self.content[start : start + int(shape.prod())].view(shape.tolist())

    def select(self, indices: Tensor) -> "ImageCache":
        """A cache of the arrays at `indices`, int64 (m,), in that order; it shares `content`."""
        return ImageCache(self.content, self.offsets[indices], self.shapes[indices])


def cache_images(datasets: Sequence[CocoDetection], mode: str) -> None:
    """Read the images of data sets into memory and let the data sets use them.

    A file shared by several data sets is cached once. An unreadable file is an error, unless all its data sets tolerate
    unreadable images (`on_unreadable`); it is then marked unreadable in them.

    Args:
        datasets: the data sets; call this before their worker processes start.
        mode: "encoded" caches the files, "decoded" the pixels, which take five to ten times the memory but save
            decoding in every epoch.

    Raises:
        UserError: a file cannot be read (or most cannot, where unreadable images are tolerated); or the images exceed
            this machine's memory, which is checked before reading.
    """
    measure, read, empty_shape = (
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
    # We parallelise over images. OpenCV's own threads would also be missing in processes that are forked later.
    cv2.setNumThreads(0)
    try:
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            measured = pool.map(lambda path: attempt(measure, path) or empty_shape, paths)
            shapes = torch.tensor(list(measured), dtype=torch.int64)
            sizes = shapes.prod(dim=1)
            ends = sizes.cumsum(0)
            check_memory(int(ends[-1]), mode)
            cache = ImageCache(torch.empty(int(ends[-1]), dtype=torch.uint8), ends - sizes, shapes)

            def load(i: int) -> None:
                array = cache[i].numpy()
                content = None if paths[i] in failed else attempt(read, paths[i], array.shape)
                if content is not None:
                    np.copyto(array, content)

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
    """The size of a file as a shape, (bytes,)."""
    try:
        return (path.stat().st_size,)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def read_encoded(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a file, uint8 (bytes,), which must have this shape."""
    encoded = read_file(path)
    if encoded.shape != shape:
        raise UserError(f"{path}: changed while it was read")
    return encoded


def pixels_shape(path: Path) -> tuple[int, int, int]:
    """The shape of an image, (3, height, width), from its header."""
    width, height = image_size(path)
    return 3, height, width


def read_pixels(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The pixels of an image, uint8 (3, height, width), which must have this shape."""
    pixels = decode_rgb(read_file(path), path).transpose(2, 0, 1)
    if pixels.shape != shape:
        (_, h, w), (_, height, width) = pixels.shape, shape
        raise UserError(
            f"{path}: has {h} x {w} pixels (height x width), but its header says {height} x {width}; repair the file, "
            "or pass --cache_mode encoded"
        )
    return pixels


def physical_memory() -> int:
    """The memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(size: int, mode: str) -> None:
    """Refuse a cache of `size` bytes per process of torchrun that exceeds this machine's memory."""
    processes, memory = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), physical_memory()
    if size * processes > memory:
        content, way_out = "the image files", "leave the flag out"
        if mode == "decoded":
            content, way_out = "the decoded images", f"pass --cache_mode encoded, or {way_out}"
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"--cache_mode {mode}: {content} are {size / 2**30:.4g} GiB{each}, but this machine's memory is "
            f"{memory / 2**30:.4g} GiB; {way_out}"
        )
