"""Check, pack and decode object masks in COCO's format: polygons or run-length codes.

A run-length code lists the lengths of alternating runs of background and object pixels, column by column from the top
left. It is a list of numbers, or a string ("compressed"). In a string, a number has digits of five bits, the lowest
first, written as characters from chr(48) on. A digit's bit 32 marks that another digit follows; the last digit's bit 16
is the sign. From the fourth number on, each number is stored as the difference to the number two before it (maskApi.c
of https://github.com/cocodataset/cocoapi).

Segmentations from a file must pass `normalize_segmentation` before pycocotools or faster-coco-eval use them: a damaged
one makes their C and C++ code read and write out of bounds.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from enact_common.data.values import as_whole, is_integer, shown
from enact_common.utils.errors import UserError

# A polygon has at least three corners of two numbers each. pycocotools reads four numbers as a box.
FEWEST_NUMBERS = 6

# Below this many pixels, runs have at most six digits, for which pycocotools reserves memory.
PIXEL_LIMIT, MOST_DIGITS = 2**29, 6

# pycocotools needs about 100 bytes per pixel of an outline, so this limits it to 7 GB.
LONGEST_OUTLINE = 2**26

# Faults in a compressed code, by the number that `read_texts` returns.
DAMAGE = (
    "",
    "it has invalid characters",
    "it ends inside a number",
    f"it has a number of more than {MOST_DIGITS} digits",
    "it has a negative run",
    "its runs do not add up to its image's pixels",
)

# The number of codes that are read together and their maximum length bound the memory.
BATCH, LONG_TEXT = 128, 4096

WAYS_OUT = "use annotations with masks, or leave --masks out"


def normalize_size(height: Any, width: Any) -> list[int]:
    """[height, width] in pixels as int, from integers that may be written as floats or text.

    Raises:
        ValueError: a side is not an integer above 0. The message gives both.
    """
    size = [as_whole(height), as_whole(width)]
    if not all(map(is_integer, size)) or min(size) <= 0:
        raise ValueError(f"states height {shown(height)} and width {shown(width)}, not integers above 0")
    return size


def normalize_segmentations(
    images: Iterable[dict], annotations: Iterable[dict], source: Path | str
) -> tuple[list[dict], list[dict]]:
    """Check all masks and convert images and annotations for training and both evaluation packages.

    Args:
        images: entries of `images`. They must state their size, because evaluation draws masks without the image.
        annotations: the file's annotations. Annotations of other images are dropped.
        source: the file, for the message.

    Returns:
        the images, with `height` and `width` as int; and their annotations, with `segmentation` from
        `normalize_segmentation`. The input entries are not modified.

    Raises:
        UserError: an entry has no usable mask or size. The message names the file and the first such entry.
    """
    sizes, sized, checked = {}, [], []
    for image in images:
        try:
            size = normalize_size(image.get("height"), image.get("width"))
        except ValueError as error:
            raise UserError(
                f"{source}: image {image['id']} {error}, but --masks needs its size in pixels; state it, or leave "
                "--masks out"
            ) from error
        sizes[image["id"]] = size
        sized.append({**image, "height": size[0], "width": size[1]})
    own = [annotation for annotation in annotations if annotation["image_id"] in sizes]
    segmentations = [annotation.get("segmentation") for annotation in own]
    read = normalize_all(segmentations, [sizes[annotation["image_id"]] for annotation in own])
    for annotation, segmentation in zip(own, read, strict=True):
        if isinstance(segmentation, str):
            raise UserError(
                f"{source}: annotation {annotation['id']} of image {annotation['image_id']}, counted from 1, "
                f"{segmentation}; {WAYS_OUT}"
            )
        checked.append({**annotation, "segmentation": segmentation})
    return sized, checked


def normalize_all(segmentations: list, sizes: list[list[int]]) -> Iterator[list | dict | str]:
    """Yield `normalize_segmentation` of each segmentation and its image's size, or the message of its error."""
    for first in range(0, len(segmentations), BATCH):
        part = list(zip(segmentations[first : first + BATCH], sizes[first : first + BATCH], strict=True))
        texts = [i for i, (segmentation, size) in enumerate(part) if is_plain_text(segmentation, size)]
        intact: set[int] = set()
        if texts:
            pixels = np.array([size[0] * size[1] for _, size in (part[i] for i in texts)])
            runs, counts, damage = read_texts([part[i][0]["counts"] for i in texts], pixels)
            start = counts.cumsum() - counts
            runs[start] = 1  # a code may start with a run of 0
            intact = set(np.array(texts)[(damage == 0) & (np.minimum.reduceat(runs, start) > 0)].tolist())
        for i, (segmentation, size) in enumerate(part):
            if i in intact:
                yield {"size": size, "counts": segmentation["counts"]}
                continue
            try:
                yield normalize_segmentation(segmentation, size)
            except ValueError as error:
                yield str(error)


def is_plain_text(segmentation: Any, size: list[int]) -> bool:
    """Whether this is a short compressed run-length code in ASCII for an image of this size."""
    if not isinstance(segmentation, dict) or size[0] * size[1] >= PIXEL_LIMIT:
        return False
    counts, stated = segmentation.get("counts"), segmentation.get("size")
    return isinstance(counts, str) and counts.isascii() and 0 < len(counts) <= LONG_TEXT and matches(stated, size)


def normalize_segmentation(segmentation: Any, size: list[int]) -> list | dict:
    """Return a segmentation of the same pixels that is safe for C code.

    Args:
        segmentation: a segmentation from a file.
        size: [height, width] of its image in pixels, from `normalize_size`.

    Returns:
        polygons unchanged; or a run-length code with its size as int and its `counts` as ASCII or a list of int. Only
            the first run may be 0 (pycocotools merges and compares other runs of 0 wrongly).

    Raises:
        ValueError: it is not a mask of an image of this size. The message continues a sentence that starts with the
            annotation's name.
    """
    if not segmentation:
        raise ValueError("has no segmentation, but --masks needs one for each object")
    if size[0] * size[1] >= PIXEL_LIMIT:
        raise ValueError(f"belongs to an image of {size} (height, width): masks have fewer than {PIXEL_LIMIT} pixels")
    if isinstance(segmentation, dict):
        return normalize_code(segmentation, size)
    if isinstance(segmentation, list) and all(isinstance(polygon, list) for polygon in segmentation):
        for polygon in segmentation:
            check_polygon(polygon, size)
        return segmentation
    if isinstance(segmentation, list) and any(isinstance(part, dict) for part in segmentation):
        raise ValueError("has a list of run-length codes as segmentation: expected a single code, or polygons")
    raise ValueError(
        f"has a segmentation that is neither a list of polygons nor a run-length code: {shown(segmentation)}"
    )


def check_polygon(polygon: list, size: list[int]) -> None:
    """Refuse a polygon that pycocotools would misread, or draw with excessive memory and time."""
    types = set(map(type, polygon))
    if list in types:
        raise ValueError("has a polygon with a list in it: expected x, y, x, y, ... in a single list")
    if len(polygon) < FEWEST_NUMBERS or len(polygon) % 2:
        raise ValueError(f"has a polygon of {len(polygon)} numbers: expected x, y of at least three corners")
    # pycocotools traces the whole outline, even outside the image, and counts in 32 bits.
    limit = min(4 * size[0] * size[1] + 2**16, LONGEST_OUTLINE)
    if types <= {int, float}:
        wrong = [number for number in polygon if not -limit <= number <= limit]  # True for NaN
    else:
        wrong = [value for value in polygon if type(value) not in (int, float)]
    if wrong:
        raise ValueError(
            f"has a polygon with {shown(wrong[0])} in it: expected finite numbers, pixels in or near its image of "
            f"{size} (height, width)"
        )
    # This upper bound on the outline clears most polygons.
    if len(polygon) * (max(polygon) - min(polygon)) > limit:
        corners = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        outline = np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum()
        if outline > limit:
            raise ValueError(f"has a polygon with an outline of {outline:.0f} pixels, too long for its image of {size}")


def normalize_code(code: dict, size: list[int]) -> dict:
    """`normalize_segmentation` for a run-length code."""
    counts, runs = code.get("counts"), read_runs(code, size)
    if not runs[1:].all():
        counts, runs = None, without_empty_runs(runs)
    return {"size": size, "counts": counts if isinstance(counts, str) else runs.tolist()}


def read_runs(code: dict, size: list[int]) -> np.ndarray:
    """The runs of a run-length code, int64 (runs,), background first: each 0 or more, summing to the image's pixels."""
    stated, counts, pixels = code.get("size"), code.get("counts"), size[0] * size[1]
    if not matches(stated, size):
        raise ValueError(f"has a run-length code of size {shown(stated)}, but its image is {size} (height, width)")
    if isinstance(counts, bytes):  # pycocotools leaves bytes in annotations that it has evaluated
        counts = counts.decode("latin-1")
    if isinstance(counts, str):
        return read_text(counts, pixels)
    if isinstance(counts, list) and set(map(type, counts)) <= {int, float}:
        return read_numbers(counts, pixels)
    raise ValueError("has a segmentation whose counts are neither a string nor a list of integers")


def read_numbers(counts: list[int | float], pixels: int) -> np.ndarray:
    """`read_runs` for an uncompressed run-length code."""
    if not counts:
        raise ValueError("has an empty run-length code")
    # Check before the conversion: a number may exceed int64.
    if min(counts) < 0 or max(counts) > pixels:
        raise ValueError("has a damaged run-length code: a run is negative, or longer than its image")
    runs = np.array(counts)
    if not (runs == np.floor(runs)).all():  # also true for NaN
        raise ValueError("has a damaged run-length code: a run is not an integer")
    if runs.sum() != pixels:
        raise ValueError(f"has a damaged run-length code: {DAMAGE[-1]}")
    return runs.astype(np.int64)


def read_text(text: str, pixels: int) -> np.ndarray:
    """`read_runs` for a compressed run-length code."""
    if not text:
        raise ValueError("has an empty run-length code")
    if text[:2] in ("b'", 'b"'):
        raise ValueError(
            f"has the repr of Python bytes as a run-length code ({shown(text)}); write the file with counts.decode(), "
            "not str(counts)"
        )
    if not text.isascii():
        raise ValueError(f"has a damaged run-length code: {DAMAGE[1]} ({shown(text)})")
    runs, _, damage = read_texts([text], np.array([pixels]))
    if damage[0]:
        raise ValueError(f"has a damaged run-length code: {DAMAGE[damage[0]]} ({shown(text)})")
    return runs


def read_texts(texts: list[str], pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read compressed run-length codes in ASCII, none empty, together, which is much faster than one by one.

    Returns:
        the concatenated runs of all codes, int64 (runs,); the number of runs of each code, int64 (texts,); and the
            fault of each code as an index into `DAMAGE`, 0 for no fault, int64 (texts,).
    """
    digits = np.frombuffer("".join(texts).encode(), dtype=np.uint8) - np.uint8(48)  # below chr(48): wraps around
    lengths = np.array([len(text) for text in texts])
    text_end = lengths.cumsum()
    more = digits & 32 != 0
    cut = more[text_end - 1]
    more[text_end - 1] = False  # no number continues in the next text
    last = np.flatnonzero(~more)  # (runs,), each number's last digit
    first = np.concatenate(([0], last[:-1] + 1))
    size = last - first + 1
    place = np.arange(len(digits)) - np.repeat(first, size)  # (digits,)
    numbers = np.add.reduceat((digits & 31).astype(np.int64) << 5 * place, first)  # (runs,)
    numbers -= (digits[last] & 16 != 0).astype(np.int64) << 5 * size

    counts = np.diff(np.searchsorted(last, text_end), prepend=0)  # (texts,)
    start = counts.cumsum() - counts
    index = np.arange(len(numbers)) - np.repeat(start, counts)  # (runs,), within its code
    runs = numbers.copy()
    for parity in (0, 1):
        # From the fourth number on, each number is the difference to the run two before it.
        chain = (index > 0) & (index % 2 == parity)
        total = np.where(chain, numbers, 0).cumsum()
        runs[chain] = (total - np.repeat(total[start], counts))[chain]
    damage = np.select(
        (
            np.maximum.reduceat(digits, text_end - lengths) > 63,
            cut,
            np.maximum.reduceat(size, start) > MOST_DIGITS,
            np.minimum.reduceat(runs, start) < 0,
            np.add.reduceat(runs, start) != pixels,
        ),
        range(1, len(DAMAGE)),
    )
    return runs, counts, damage


def matches(stated: Any, size: list[int]) -> bool:
    """Whether a run-length code's `size` equals that of its image."""
    return stated == size or (isinstance(stated, list) and [as_whole(side) for side in stated] == size)


def without_empty_runs(runs: np.ndarray) -> np.ndarray:
    """Equivalent runs without empty ones, int64 (runs,); only the first may be 0."""
    edges, times = np.unique(runs.cumsum(), return_counts=True)
    # The value changes at an edge where an odd number of runs ends; the last edge is the image's end.
    return np.diff(np.concatenate(([0], edges[:-1][times[:-1] % 2 == 1], edges[-1:])))


class PackedMasks:
    """Polygons or run-length codes of many objects in one tensor, whose memory worker processes share."""

    def __init__(self, segmentations: Iterable[list | dict]):
        # JSON holds polygons and codes alike, and parses much faster than an image decodes.
        texts = [json.dumps(segmentation, separators=(",", ":")).encode() for segmentation in segmentations]
        self._ends = torch.tensor([0, *map(len, texts)]).cumsum(0)
        self._text = torch.frombuffer(bytearray(b"".join(texts) or b"\0"), dtype=torch.uint8)

    def decode(self, objects: slice, height: int, width: int, image: str) -> Tensor:
        """The masks of a range of objects in one image, bool (n, height, width).

        Raises:
            UserError: a segmentation is damaged, or its size differs from the image's.
        """
        masks = torch.zeros(objects.stop - objects.start, height, width, dtype=torch.bool)
        for mask, number in zip(masks, range(objects.start, objects.stop), strict=True):
            segmentation = json.loads(self._text[self._ends[number] : self._ends[number + 1]].numpy().tobytes())
            mask.copy_(torch.from_numpy(decode_mask(segmentation, height, width, image)))
        return masks


def decode_mask(segmentation: list | dict, height: int, width: int, image: str) -> np.ndarray:
    """A segmentation as uint8 (height, width), 0 or 1."""
    try:
        if isinstance(segmentation, dict):
            runs = read_runs(segmentation, [height, width])
            pixels = np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs)
            return pixels.reshape(width, height).T  # (height, width)
        segmentation = normalize_segmentation(segmentation, [height, width])
    except ValueError as error:
        raise UserError(f"{image}: an object {error}; {WAYS_OUT}") from error
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
