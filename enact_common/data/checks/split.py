"""A split of a data set as the checks read it: its lists, as arrays."""

import math
from collections.abc import Callable
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from enact_common.data.annotations import lies_in, missing_files, read_json, stated_size
from enact_common.data.names import index_files
from enact_common.data.values import is_area, is_crowd, is_id, is_integer, is_number, normalise, shown

# A split as arrays ---------------------------------------------------------------------------------------------------


def as_numbers(rows: list, width: int) -> np.ndarray:
    """Lists of numbers as float64 (n, width), with a row of NaN for each that is not `width` numbers."""
    try:
        table = np.array(rows)
    except ValueError:
        table = np.array(None)
    # Numbers in a string would make an array of strings.
    numbers = table.dtype.kind in "iuf" and table.shape == (len(rows), width)
    # Beside numbers, truth values would pass for numbers.
    if numbers and bool not in set(map(type, chain.from_iterable(rows))):
        return table.astype(np.float64)
    nothing = [math.nan] * width
    whole = (isinstance(row, list) and len(row) == width and all(map(is_number, row)) for row in rows)
    return np.array(
        [row if good else nothing for row, good in zip(rows, whole, strict=True)], dtype=np.float64
    ).reshape(-1, width)


def as_indices(ids: list, index: dict[int, int]) -> np.ndarray:
    """Each id's place in an index, int64 (n,), -1 for one that does not, or is no id."""
    return np.array([index.get(i, -1) if is_integer(i) else -1 for i in ids], dtype=np.int64)


class Split:
    """A split's annotations, as far as they can be read.

    Args:
        name: "train", "val" or "test"; of "test", no annotations are asked for.
        folder: where the image files are.
        file: COCO-format JSON.
        data: what it holds, where that is at hand already, as read or as `load_annotations` returns it (which numbers
            annotations anew: faults in their ids cannot be seen any more); None reads the file.

    Attributes:
        images, categories, annotations: the entries that have what an entry needs, in the order of the file, as
            `normalise` gives them.
        rewritten: what that changed.
        malformed: under each of those names, what was left out of it.
        outside: what was left out of `images` because its file would not lie in the folder.
        missing: the lists that the file lacks.

    Raises:
        UserError: the file is missing, or no JSON object.
    """

    def __init__(self, name: str, folder: Path, file: Path, data: dict | None = None):
        self.name = name
        self.folder = Path(folder)
        self.file = Path(file)
        data, self.rewritten = normalise(read_json(self.file) if data is None else data)
        needed = ("images", "categories") if name == "test" else ("images", "categories", "annotations")
        self.missing = [key for key in needed if not isinstance(data.get(key), list)]
        self.malformed: dict[str, list] = {}
        named = self._usable(data, "images", lambda e: is_id(e.get("id")) and isinstance(e.get("file_name"), str))
        inside = [lies_in(self.folder, image["file_name"]) for image in named]
        self.images = [image for image, within in zip(named, inside, strict=True) if within]
        self.outside = [image for image, within in zip(named, inside, strict=True) if not within]
        self.categories = self._usable(data, "categories", lambda e: is_id(e.get("id")) and "name" in e)
        self.annotations = self._usable(data if name != "test" else {}, "annotations", lambda e: True)

    def _usable(self, data: dict, key: str, usable: Callable[[dict], bool]) -> list[dict]:
        entries = data.get(key)
        entries = entries if isinstance(entries, list) else []
        good = [entry for entry in entries if isinstance(entry, dict) and usable(entry)]
        self.malformed[key] = []
        if len(good) < len(entries):
            self.malformed[key] = [e for e in entries if not (isinstance(e, dict) and usable(e))]
        return good

    @cached_property
    def boxes(self) -> np.ndarray:
        """x, y, width, height of each annotation in pixels, float64 (n, 4); NaN where it has no such numbers."""
        boxes = as_numbers([annotation.get("bbox") for annotation in self.annotations], 4)
        boxes[~np.isfinite(boxes).all(axis=1)] = math.nan
        return boxes

    @cached_property
    def image_of(self) -> np.ndarray:
        """Index of each annotation's image, int64 (n,), -1 for one that is not listed."""
        index = {image["id"]: i for i, image in enumerate(self.images)}
        return as_indices([annotation.get("image_id") for annotation in self.annotations], index)

    @cached_property
    def category_of(self) -> np.ndarray:
        """Index of each annotation's category, int64 (n,), -1 for one that is not listed."""
        index = {category["id"]: i for i, category in enumerate(self.categories)}
        return as_indices([annotation.get("category_id") for annotation in self.annotations], index)

    @cached_property
    def crowd(self) -> np.ndarray:
        """Which annotations are crowds, those to ignore included, bool (n,)."""
        return np.array([is_crowd(annotation) for annotation in self.annotations], dtype=bool)

    @cached_property
    def areas(self) -> np.ndarray:
        """The area of each annotation as evaluation takes it, its own or else its box's, px², float64 (n,)."""
        given = [annotation.get("area") for annotation in self.annotations]
        areas = np.array([area if is_area(area) else math.nan for area in given], dtype=np.float64)
        return np.where(np.isfinite(areas), areas, self.boxes[:, 2:].clip(0).prod(axis=1))

    @cached_property
    def sizes(self) -> np.ndarray:
        """Width and height of each image in pixels as the file says, float64 (images, 2); infinite where it does not.

        Training takes them likewise.
        """
        return np.array([stated_size(image) for image in self.images], dtype=np.float64).reshape(-1, 2)

    @cached_property
    def readable(self) -> np.ndarray:
        """Which annotations have a box, an image and a category, bool (n,)."""
        return ~np.isnan(self.boxes[:, 0]) & (self.image_of >= 0) & (self.category_of >= 0)

    @cached_property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Left, top, right, bottom of each box, and the same clipped to its image; float64 (n, 4) each."""
        corners = np.concatenate((self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]), axis=1)
        bounds = np.full((len(corners), 2), math.inf)
        listed = self.image_of >= 0
        bounds[listed] = self.sizes[self.image_of[listed]]
        return corners, corners.clip(0, np.tile(bounds, 2))

    @cached_property
    def objects(self) -> np.ndarray:
        """Which annotations training learns from, bool (n,): readable, no crowd, with some area inside the image."""
        _, clipped = self.edges
        return self.readable & ~self.crowd & (clipped[:, 2:] > clipped[:, :2]).all(axis=1)

    def path(self, image: dict) -> Path:
        """An image's file."""
        return self.folder / image["file_name"]

    def describe(self, i: int) -> str:
        """Words for annotation i."""
        annotation, image = self.annotations[i], self.image_of[i]
        where = f" in {self.images[image]['file_name']}" if image >= 0 else ""
        return f"annotation {annotation.get('id')}{where}: bbox {shown(annotation.get('bbox'))}"

    def known_ids(self, key: str) -> set[int]:
        """Ids of all entries of `images` or `categories`, those that cannot be used for another reason included."""
        entries = [*getattr(self, key), *self.malformed[key], *(self.outside if key == "images" else ())]
        return {entry["id"] for entry in entries if isinstance(entry, dict) and is_id(entry.get("id"))}

    def file_index(self) -> list[dict[str, list[str]]]:
        """The files of the image folder that no entry names rightly, for `hint`."""
        missing, _ = missing_files(map(self.path, self.images))
        absent = set(missing)
        taken = (image["file_name"] for image in self.images if self.path(image) not in absent)
        return index_files(self.folder, taken)


def shorten(value: Any) -> str:
    """A value in at most 80 characters."""
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
