"""Objects' masks in COCO's format: polygons or run-length codes, checked, packed and decoded.

A run-length code lists how many pixels of background, object, background, ... follow one another, column by column from
the top left. It is a list of numbers, or a text ("compressed"): each number is written in digits of five bits, the
lowest first, as characters from chr(48) on; a digit's bit 32 says that another follows, the last digit's bit 16 is the
sign; from the fourth number on, the difference to the number before the previous one is written (maskApi.c of
https://github.com/cocodataset/cocoapi).

Segmentations from a file pass `normalize_segmentation` before pycocotools or faster-coco-eval get them: their C and C++
code reads and writes outside its memory given a damaged one.
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

# A polygon has three corners, two numbers each. pycocotools takes four numbers for a box.
FEWEST_NUMBERS = 6

# Runs of images below this many pixels have at most six digits, which is what pycocotools reserves memory for.
PIXEL_LIMIT, MOST_DIGITS = 2**29, 6

# pycocotools holds an outline with some 100 bytes a pixel, at most 7 GB so.
LONGEST_OUTLINE = 2**26

# Faults that `read_texts` finds in a code.
DAMAGE = (
    "",
    "it has characters that such codes do not have",
    "it ends inside a number",
    f"it has a number of more than {MOST_DIGITS} digits",
    "it has a negative run",
    "its runs do not add up to its image's pixels",
)

# Codes that are read together, and the longest of them, which bounds the memory.
BATCH, LONG_TEXT = 128, 4096

WAYS_OUT = "take annotations that have masks, or leave --masks out"


def normalize_size(height: Any, width: Any) -> list[int]:
    """[height, width] in pixels as int, from whole numbers, be they floats or text.

    Raises:
        ValueError: they are no whole numbers above 0; the message names them.
    """
    size = [as_whole(height), as_whole(width)]
    if not all(map(is_integer, size)) or min(size) <= 0:
        raise ValueError(f"states height {shown(height)} and width {shown(width)}, not whole numbers above 0")
    return size


def normalize_segmentations(
    images: Iterable[dict], annotations: Iterable[dict], source: Path | str
) -> tuple[list[dict], list[dict]]:
    """Images and annotations as training and either evaluation package read them, all masks checked.

    Args:
        images: their entries: the size must be stated, since evaluation draws the masks without the image.
        annotations: of the file. Those of other images are left out.
        source: the file, for the message.

    Returns:
        the images, with `height` and `width` as int; their annotations, with `segmentation` as `normalize_segmentation`
        returns it. The entries given stay unchanged.

    Raises:
        UserError: masks cannot be learned from or evaluated on an entry; the message names the file and the first one.
    """
    sizes, sized, checked = {}, [], []
    for image in images:
        try:
            size = normalize_size(image.get("height"), image.get("width"))
        except ValueError as error:
            raise UserError(
                f"{source}: image {image['id']} {error}, and --masks needs its size in pixels; state it, or leave "
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
    """`normalize_segmentation` of each segmentation; in place of an error, its words.

    Args:
        segmentations: as a file has them.
        sizes: [height, width] of each one's image, from `normalize_size`.
    """
    for begin in range(0, len(segmentations), BATCH):
        part = list(zip(segmentations[begin : begin + BATCH], sizes[begin : begin + BATCH], strict=True))
        texts = [i for i, (segmentation, size) in enumerate(part) if is_plain_text(segmentation, size)]
        intact: set[int] = set()
        if texts:
            pixels = np.array([size[0] * size[1] for _, size in (part[i] for i in texts)])
            runs, counts, damage = read_texts([part[i][0]["counts"] for i in texts], pixels)
            start = counts.cumsum() - counts
            runs[start] = 1  # a first run of 0 is fine
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
    """Whether it is a compressed run-length code of an image of this size, of some ASCII characters."""
    if not isinstance(segmentation, dict) or size[0] * size[1] >= PIXEL_LIMIT:
        return False
    counts, stated = segmentation.get("counts"), segmentation.get("size")
    return isinstance(counts, str) and counts.isascii() and 0 < len(counts) <= LONG_TEXT and matches(stated, size)


def normalize_segmentation(segmentation: Any, size: list[int]) -> list | dict:
    """A segmentation that C code can be given, of the same pixels.

    Args:
        segmentation: as a file has it.
        size: [height, width] of its image in pixels, from `normalize_size`.

    Returns:
        polygons as they are; a run-length code with its size as int, its `counts` a text of ASCII or a list of int
        without runs of 0 but for the first (pycocotools merges and compares those wrongly).

    Raises:
        ValueError: it is no mask of such an image. The message says why, and goes on from the annotation's name.
    """
    if not segmentation:
        raise ValueError("has no segmentation, and --masks needs one of each object")
    if size[0] * size[1] >= PIXEL_LIMIT:
        raise ValueError(f"belongs to an image of {size} (height, width): masks have fewer than {PIXEL_LIMIT} pixels")
    if isinstance(segmentation, dict):
        return normalize_code(segmentation, size)
    if isinstance(segmentation, list) and all(isinstance(polygon, list) for polygon in segmentation):
        for polygon in segmentation:
            check_polygon(polygon, size)
        return segmentation
    if isinstance(segmentation, list) and any(isinstance(part, dict) for part in segmentation):
        raise ValueError("has a list of run-length codes as segmentation: expected a single one, or polygons")
    raise ValueError(
        f"has a segmentation that is neither a list of polygons nor a run-length code: {shown(segmentation)}"
    )


def check_polygon(polygon: list, size: list[int]) -> None:
    """Refuse a polygon that pycocotools takes for something else, or draws with memory and time out of proportion.

    Raises:
        ValueError: as `normalize_segmentation`.
    """
    types = set(map(type, polygon))
    if list in types:
        raise ValueError("has a polygon with a list in it: expected x, y, x, y, ... in a single list")
    if len(polygon) < FEWEST_NUMBERS or len(polygon) % 2:
        raise ValueError(f"has a polygon of {len(polygon)} numbers: expected x, y of three corners or more")
    # pycocotools follows the whole outline, wherever it lies, and counts in 32 bits.
    limit = min(4 * size[0] * size[1] + 2**16, LONGEST_OUTLINE)
    if types <= {int, float}:
        wrong = [number for number in polygon if not -limit <= number <= limit]  # NaN is in no range
    else:
        wrong = [value for value in polygon if type(value) not in (int, float)]
    if wrong:
        raise ValueError(
            f"has a polygon with {shown(wrong[0])} in it: expected finite numbers, pixels in its image of {size} "
            "(height, width) or near it"
        )
    # Most polygons are short enough even if every side were the longest.
    if len(polygon) * (max(polygon) - min(polygon)) > limit:
        corners = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        outline = np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum()
        if outline > limit:
            raise ValueError(f"has a polygon of {outline:.0f} pixels around, too many for its image of {size}")


def normalize_code(code: dict, size: list[int]) -> dict:
    """`normalize_segmentation` of a run-length code.

    Raises:
        ValueError: as there.
    """
    counts, runs = code.get("counts"), read_runs(code, size)
    if not runs[1:].all():
        counts, runs = None, without_empty_runs(runs)
    return {"size": size, "counts": counts if isinstance(counts, str) else runs.tolist()}


def read_runs(code: dict, size: list[int]) -> np.ndarray:
    """The runs of a run-length code, int64 (runs,), background first: 0 or more each, as many pixels as the image has.

    Args:
        code: with `size` and `counts`, as a file has it.
        size: [height, width] of its image in pixels.

    Raises:
        ValueError: as `normalize_segmentation`.
    """
    stated, counts, pixels = code.get("size"), code.get("counts"), size[0] * size[1]
    if not matches(stated, size):
        raise ValueError(f"has a run-length code of size {shown(stated)}, its image is {size} (height, width)")
    if isinstance(counts, bytes):  # which pycocotools leaves in annotations that it has evaluated
        counts = counts.decode("latin-1")
    if isinstance(counts, str):
        return read_text(counts, pixels)
    if isinstance(counts, list) and set(map(type, counts)) <= {int, float}:
        return read_numbers(counts, pixels)
    raise ValueError("has a segmentation whose counts are neither a text nor whole numbers")


def read_numbers(counts: list[int | float], pixels: int) -> np.ndarray:
    """`read_runs` of an uncompressed run-length code.

    Raises:
        ValueError: as `normalize_segmentation`.
    """
    if not counts:
        raise ValueError("has an empty run-length code")
    # Before the conversion: int64 does not hold every number of a file.
    if min(counts) < 0 or max(counts) > pixels:
        raise ValueError("has a damaged run-length code: a run is negative, or longer than its image")
    runs = np.array(counts)
    if not (runs == np.floor(runs)).all():  # nor is NaN equal to anything
        raise ValueError("has a damaged run-length code: a run is no whole number")
    if runs.sum() != pixels:
        raise ValueError(f"has a damaged run-length code: {DAMAGE[-1]}")
    return runs.astype(np.int64)


def read_text(text: str, pixels: int) -> np.ndarray:
    """`read_runs` of a compressed run-length code.

    Raises:
        ValueError: as `normalize_segmentation`.
    """
    if not text:
        raise ValueError("has an empty run-length code")
    if text[:2] in ("b'", 'b"'):
        raise ValueError(
            f"has Python's text of bytes as a run-length code ({shown(text)}); whoever writes the file must write "
            "counts.decode(), not str(counts)"
        )
    if not text.isascii():
        raise ValueError(f"has a damaged run-length code: {DAMAGE[1]} ({shown(text)})")
    runs, _, damage = read_texts([text], np.array([pixels]))
    if damage[0]:
        raise ValueError(f"has a damaged run-length code: {DAMAGE[damage[0]]} ({shown(text)})")
    return runs


def read_texts(texts: list[str], pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read compressed run-length codes together, which takes a fraction of the time of one after the other.

    Args:
        texts: of ASCII, none empty.
        pixels: of each code's image, int (texts,).

    Returns:
        the runs of all codes, one code after the other, int64 (runs,); how many runs each has, int64 (texts,); what is
        wrong with it, an index of `DAMAGE`, 0 for nothing, int64 (texts,).
    """
    digits = np.frombuffer("".join(texts).encode(), dtype=np.uint8) - np.uint8(48)  # those below chr(48) wrap around
    lengths = np.array([len(text) for text in texts])
    text_end = lengths.cumsum()
    more = digits & 32 != 0
    cut = more[text_end - 1]
    more[text_end - 1] = False  # no number goes on in the next text
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
        # From the fourth number on, the run before the previous one was subtracted.
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
    """Whether a run-length code's `size` is that of its image."""
    return stated == size or (isinstance(stated, list) and [as_whole(side) for side in stated] == size)


def without_empty_runs(runs: np.ndarray) -> np.ndarray:
    """Runs of the same pixels, int64 (runs,), of which the first alone may be 0."""
    edges, times = np.unique(runs.cumsum(), return_counts=True)
    # Colours change at an edge that an odd number of runs ends at; the last edge is the image's end.
    return np.diff(np.concatenate(([0], edges[:-1][times[:-1] % 2 == 1], edges[-1:])))


class PackedMasks:
    """The segmentations of many objects in one piece of memory, which worker processes share.

    Args:
        segmentations: polygons, lists of x, y, x, y, ... in pixels, or run-length codes.
    """

    def __init__(self, segmentations: Iterable[list | dict]):
        # As text: polygons and codes alike, and parsed in a fraction of the time that decoding an image takes.
        texts = [json.dumps(segmentation, separators=(",", ":")).encode() for segmentation in segmentations]
        self._ends = torch.tensor([0, *map(len, texts)]).cumsum(0)
        self._text = torch.frombuffer(bytearray(b"".join(texts) or b"\0"), dtype=torch.uint8)

    def decode(self, objects: slice, height: int, width: int, image: str) -> Tensor:
        """The masks of some objects of one image of this size: bool (n, height, width).

        Args:
            objects: from which to which.
            height, width: of the image, in pixels.
            image: its name, for the message.

        Raises:
            UserError: a segmentation is damaged, or of another size than the image.
        """
        masks = torch.zeros(objects.stop - objects.start, height, width, dtype=torch.bool)
        for mask, number in zip(masks, range(objects.start, objects.stop), strict=True):
            segmentation = json.loads(self._text[self._ends[number] : self._ends[number + 1]].numpy().tobytes())
            mask.copy_(torch.from_numpy(decode_mask(segmentation, height, width, image)))
        return masks


def decode_mask(segmentation: list | dict, height: int, width: int, image: str) -> np.ndarray:
    """A segmentation as uint8 (height, width), 0 or 1.

    Raises:
        UserError: as `PackedMasks.decode`.
    """
    try:
        if isinstance(segmentation, dict):
            runs = read_runs(segmentation, [height, width])
            pixels = np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs)
            return pixels.reshape(width, height).T  # (height, width)
        segmentation = normalize_segmentation(segmentation, [height, width])
    except ValueError as error:
        raise UserError(f"{image}: an object {error}; {WAYS_OUT}") from error
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
