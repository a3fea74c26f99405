"""The annotations of one split as arrays, for the checks."""

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


def as_numbers(rows: list, width: int) -> np.ndarray:
    """Lists of numbers as float64 (n, width); entries other than `width` numbers become rows of NaN."""
    try:
        table = np.array(rows)
    except ValueError:
        table = np.array(None)
    # A number written as text would make an array of strings.
    numbers = table.dtype.kind in "iuf" and table.shape == (len(rows), width)
    # NumPy turns booleans among numbers into numbers.
    if numbers and bool not in set(map(type, chain.from_iterable(rows))):
        return table.astype(np.float64)
    nothing = [math.nan] * width
    whole = (isinstance(row, list) and len(row) == width and all(map(is_number, row)) for row in rows)
    return np.array(
        [row if good else nothing for row, good in zip(rows, whole, strict=True)], dtype=np.float64
    ).reshape(-1, width)


def as_indices(ids: list, index: dict[int, int]) -> np.ndarray:
    """The position of each id in an index, int64 (n,); -1 for unlisted and invalid ids."""
    return np.array([index.get(i, -1) if is_integer(i) else -1 for i in ids], dtype=np.int64)


class Split:
    """The readable annotations of one split.

    Args:
        name: "train", "val" or "test"; "test" needs no annotations.
        folder: the image folder.
        file: COCO-format JSON.
        data: the file's object, raw or from `load_annotations` (which renumbers annotations and thereby hides faulty
            annotation ids); None reads the file.

    Attributes:
        images, categories, annotations: the usable entries, in the order of the file, as `normalise` returns them.
        rewritten: the values that `normalise` changed.
        malformed: the unusable entries of each of these lists, by its name.
        outside: the entries of `images` whose file name leads out of the folder.
        missing: the names of missing lists.

    Raises:
        UserError: the file is missing, or is not a JSON object.
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
        """x, y, width, height of each annotation in pixels, float64 (n, 4); NaN for invalid boxes."""
        boxes = as_numbers([annotation.get("bbox") for annotation in self.annotations], 4)
        boxes[~np.isfinite(boxes).all(axis=1)] = math.nan
        return boxes

    @cached_property
    def image_of(self) -> np.ndarray:
        """Index of each annotation's image, int64 (n,), -1 for an unlisted image."""
        index = {image["id"]: i for i, image in enumerate(self.images)}
        return as_indices([annotation.get("image_id") for annotation in self.annotations], index)

    @cached_property
    def category_of(self) -> np.ndarray:
        """Index of each annotation's category, int64 (n,), -1 for an unlisted category."""
        index = {category["id"]: i for i, category in enumerate(self.categories)}
        return as_indices([annotation.get("category_id") for annotation in self.annotations], index)

    @cached_property
    def crowd(self) -> np.ndarray:
        """Which annotations are crowds or marked `ignore`, bool (n,)."""
        return np.array([is_crowd(annotation) for annotation in self.annotations], dtype=bool)

    @cached_property
    def areas(self) -> np.ndarray:
        """The area of each annotation in px² as used in evaluation, its `area` or else its box's, float64 (n,)."""
        given = [annotation.get("area") for annotation in self.annotations]
        areas = np.array([area if is_area(area) else math.nan for area in given], dtype=np.float64)
        return np.where(np.isfinite(areas), areas, self.boxes[:, 2:].clip(0).prod(axis=1))

    @cached_property
    def sizes(self) -> np.ndarray:
        """Stated width and height of each image in pixels, float64 (images, 2), as in training; else infinite."""
        return np.array([stated_size(image) for image in self.images], dtype=np.float64).reshape(-1, 2)

    @cached_property
    def readable(self) -> np.ndarray:
        """Which annotations have a box, an image and a category, bool (n,)."""
        return ~np.isnan(self.boxes[:, 0]) & (self.image_of >= 0) & (self.category_of >= 0)

    @cached_property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Left, top, right, bottom of each box, unclipped and clipped to its image, float64 (n, 4) each."""
        corners = np.concatenate((self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]), axis=1)
        bounds = np.full((len(corners), 2), math.inf)
        listed = self.image_of >= 0
        bounds[listed] = self.sizes[self.image_of[listed]]
        return corners, corners.clip(0, np.tile(bounds, 2))

    @cached_property
    def objects(self) -> np.ndarray:
        """Which annotations training uses, bool (n,): readable, not a crowd, with area inside the image."""
        _, clipped = self.edges
        return self.readable & ~self.crowd & (clipped[:, 2:] > clipped[:, :2]).all(axis=1)

    def path(self, image: dict) -> Path:
        """The path of an image's file."""
        return self.folder / image["file_name"]

    def describe(self, i: int) -> str:
        """Annotation i as text: its id, image and box."""
        annotation, image = self.annotations[i], self.image_of[i]
        where = f" in {self.images[image]['file_name']}" if image >= 0 else ""
        return f"annotation {annotation.get('id')}{where}: bbox {shown(annotation.get('bbox'))}"

    def known_ids(self, key: str) -> set[int]:
        """Ids of all entries of `images` or `categories`, including entries that are unusable for another reason."""
        entries = [*getattr(self, key), *self.malformed[key], *(self.outside if key == "images" else ())]
        return {entry["id"] for entry in entries if isinstance(entry, dict) and is_id(entry.get("id"))}

    def file_index(self) -> list[dict[str, list[str]]]:
        """The files in the image folder that no entry names, indexed for `hint`."""
        missing, _ = missing_files(map(self.path, self.images))
        absent = set(missing)
        taken = (image["file_name"] for image in self.images if self.path(image) not in absent)
        return index_files(self.folder, taken)


def shorten(value: Any) -> str:
    """A value as text, cut to 80 characters."""
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
