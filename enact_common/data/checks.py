"""What is in a data set, and what is wrong with it.

    python -m enact_common.data.checks DATA

reads the annotations, lists the folders, decodes every image (`--quick` leaves that out), and prints a report. Where
loading a data set stops at the first fault, this names every kind of fault, how often it occurs, and the first cases.
`quick_checks` is the part that costs seconds, for a training to call before it starts.
"""

import argparse
import hashlib
import math
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from enact_common.arguments import positive_int
from enact_common.data.categories import LabelMap
from enact_common.data.coco import (
    find_split,
    lies_in,
    missing_files,
    read_json,
    stated_size,
)
from enact_common.data.exif import exif_orientation
from enact_common.data.images import decode_rgb, image_suffixes, is_hidden, read_file
from enact_common.data.masks import normalize_all, normalize_size
from enact_common.data.names import hint, index_files, other_name
from enact_common.data.values import (
    BOX_WANTED,
    ID_WANTED,
    as_mark,
    is_area,
    is_crowd,
    is_id,
    is_integer,
    is_number,
    is_set,
    normalise,
    shown,
)
from enact_common.errors import UserError, exit_status
from enact_common.stopping import cancelling

# From what ends a training, over what spoils it and what it copes with, to what is good to know.
ERROR, FAULT, WARNING, NOTE = SEVERITIES = ("error", "fault", "warning", "note")

# A finding that a training words in its own way.
NOTHING_TO_MEASURE = "no boxes: COCO's figures will all be -1"

# Cases that a finding names.
EXAMPLES = 3

# COCO's ranges of object areas in square pixels, each up to and without its bound.
AREAS = {"small (below 32 x 32)": 32**2, "medium": 96**2, "large (from 96 x 96)": math.inf}

# Pixels by which annotation tools round boxes over the image's edge.
EDGE_SLACK = 1.0

# Decoding is OpenCV's, which lets other threads run.
MAX_THREADS = 8

LINE_WIDTH = 110

MEND = "write its path below that folder, with slashes, as file_name into {}"


@dataclass(frozen=True)
class Finding:
    """One kind of fault in one place.

    Attributes:
        severity: "error", training stops or refuses to start; "fault", it runs on data that are wrong; "warning", it
            copes, or the data may be meant so; "note", good to know.
        source: the split or file that has it.
        text: what it is, and what comes of it.
        count: how many cases there are.
        examples: the first cases, or all of them; none where the text says it all and there is nothing to count.
    """

    severity: str
    source: str
    text: str
    count: int
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        """In one line, for a log or an error message."""
        more = ", ..." if self.count > EXAMPLES else ""
        cases = f": {self.count:,} ({', '.join(self.examples[:EXAMPLES])}{more})" if self.examples else ""
        return f"{self.source}: {self.text}{cases}"


def found(
    severity: str, source: str, text: str, cases: Sequence, describe: Callable[[Any], str] = str
) -> list[Finding]:
    """One finding that names the first cases; none where there are no cases."""
    if not len(cases):
        return []
    return [Finding(severity, source, text, len(cases), tuple(describe(case) for case in cases[:EXAMPLES]))]


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
        """Of each annotation as evaluation takes it, its own or else its box's, square pixels, float64 (n,)."""
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


def short(value: Any) -> str:
    """A value in at most 80 characters."""
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


# What is wrong -------------------------------------------------------------------------------------------------------


def check_annotations(split: Split, num_queries: int) -> list[Finding]:
    """What is wrong with a split's JSON alone.

    Args:
        split: whose annotations.
        num_queries: of the model, which finds at most so many objects in an image.
    """
    findings = check_entries(split)
    if split.name != "test" and "annotations" not in split.missing:
        findings += check_ids(split) + check_boxes(split) + check_counts(split, num_queries)
        findings += check_masks(split)
    return findings


def check_entries(split: Split) -> list[Finding]:
    """Lists that are missing or empty, entries that lack something, and ids that stand twice."""
    source, findings = split.name, found(ERROR, split.name, f"{split.file.name} lacks a list", split.missing, repr)
    if split.rewritten.counts:
        count, examples = split.rewritten.counts.total(), tuple(split.rewritten.examples)
        findings.append(Finding(WARNING, source, str(split.rewritten), count, examples))
    for key, needs in (
        ("images", "an id and a file_name"),
        ("categories", "an id and a name"),
        ("annotations", "the form of a JSON object"),
    ):
        entries, malformed = getattr(split, key), split.malformed[key]
        wrong, lacking = [], []
        for entry in malformed:
            if isinstance(entry, dict) and "id" in entry and not is_id(entry["id"]):
                wrong.append(entry)
            elif key != "images" or not other_name(entry):  # `check_names` tells of those
                lacking.append(entry)
        text = f"ids in {key!r} that cannot be used: {ID_WANTED}"
        findings += found(ERROR, source, text, wrong, lambda entry: f"{shown(entry['id'])} in {short(entry)}")
        findings += found(ERROR, source, f"entries of {key!r} without {needs}", lacking, short)
        if key == "annotations":
            continue
        if not (entries or malformed or key in split.missing or (key == "images" and split.outside)):
            findings.append(Finding(ERROR, source, f"the list {key!r} is empty: nothing to learn", 1))
        twice = [i for i, count in Counter(entry["id"] for entry in entries).items() if count > 1]
        findings += found(ERROR, source, f"ids that stand twice in {key!r}", twice)

    findings += check_names(split)
    files = Counter(image["file_name"] for image in split.images)
    twice = [name for name, count in files.items() if count > 1]
    text = "image files listed under two ids: each time with a part of the boxes, or counted twice"
    findings += found(FAULT, source, text, twice)
    names = Counter(str(category["name"]) for category in split.categories)
    twice = [name for name, count in names.items() if count > 1]
    findings += found(WARNING, source, "names that two categories share", twice, repr)

    def stated(i: int) -> str:
        width, height = (short(split.images[i].get(side, "?")) for side in ("width", "height"))
        return f"{split.images[i]['file_name']}: {width} x {height}"

    text = "images without width and height above 0: whether boxes lie inside is not checked"
    return findings + found(WARNING, source, text, np.flatnonzero(np.isinf(split.sizes[:, 0])), stated)


def check_names(split: Split) -> list[Finding]:
    """Images without a file_name, or with one that leads out of the folder; each with the file that it may mean."""
    nameless = [(image, *other) for image in split.malformed["images"] if (other := other_name(image))]
    if not (nameless or split.outside):
        return []
    index, listing = split.file_index(), split.file.name
    text = (
        f"images without a file_name, whose file another field names, as LVIS's coco_url: write the file's path below "
        f"{split.folder} as file_name into {listing}"
    )
    outside = f"images whose file_name is no file in {split.folder} or below it: {MEND.format(listing)}"
    return [
        *found(
            ERROR, split.name, text, nameless,
            lambda case: f"image {short(case[0].get('id'))}: {case[1]} {short(repr(case[2]))}{hint(case[2], index)}",
        ),
        *found(
            ERROR, split.name, outside, split.outside,
            lambda i: f"image {i['id']}: {short(repr(i['file_name']))}{hint(i['file_name'], index)}",
        ),
    ]  # fmt: skip


def check_ids(split: Split) -> list[Finding]:
    """Annotation ids that pycocotools goes wrong with. This project's loader numbers annotations anew."""
    source, ids = split.name, [annotation.get("id") for annotation in split.annotations]
    anew = "here they are numbered anew"
    whole = [i for i in ids if is_integer(i)]
    others = [repr(i) for i in ids if not is_integer(i)] if len(whole) < len(ids) else []
    counts = Counter(whole) if len(set(whole)) < len(whole) else {}
    twice = [f"id {i}, {count} times" for i, count in counts.items() if count > 1]
    return [
        *found(WARNING, source, f"annotations whose id is missing or no integer: pycocotools fails; {anew}", others),
        *found(WARNING, source, f"annotation ids that are repeated: pycocotools gives an AP near 0; {anew}", twice),
        *found(
            WARNING, source, f"annotations with id 0: pycocotools never counts them as found; {anew}",
            [i for i, number in enumerate(ids) if is_integer(number) and number == 0], split.describe,
        ),
    ]  # fmt: skip


def check_boxes(split: Split) -> list[Finding]:
    """Annotations of nothing, and boxes that are none or lie outside."""
    source, boxes = split.name, split.boxes
    readable, positive = ~np.isnan(boxes[:, 0]), (boxes[:, 2:] > 0).all(axis=1)
    corners, clipped = split.edges
    inside = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    beyond = readable & positive & inside & (np.abs(corners - clipped) > EDGE_SLACK).any(axis=1)

    def reference(key: str) -> Callable[[int], str]:
        word = key.removesuffix("_id")
        return lambda i: f"annotation {split.annotations[i].get('id')}: {word} {shown(split.annotations[i].get(key))}"

    def references(key: str, entries: str) -> tuple[np.ndarray, np.ndarray]:
        """Which annotations have no id there, and which have one that no entry has."""
        ids, known = [a.get(key) for a in split.annotations], split.known_ids(entries)
        usable = np.array([is_id(i) for i in ids], dtype=bool)
        unknown = [is_id(i) and i not in known for i in ids]
        return ~usable, np.array(unknown, dtype=bool)

    def stated(key: str) -> Callable[[int], str]:
        return lambda i: f"annotation {split.annotations[i].get('id')}: {short(repr(split.annotations[i][key]))}"

    def odd(key: str, usable: Callable[[Any], bool]) -> np.ndarray:
        return np.array([key in a and not usable(a[key]) for a in split.annotations], dtype=bool)

    def no_mark(key: str) -> tuple[str, str, np.ndarray, Callable[[int], str]]:
        text = f"values of {key} that are neither 0 nor 1: taken as 0"
        return WARNING, text, odd(key, lambda value: as_mark(value) is not None), stated(key)

    no_image, other_image = references("image_id", "images")
    no_category, other_category = references("category_id", "categories")
    findings = []
    for severity, text, which, describe in (
        (ERROR, f"annotations whose image_id is no id: {ID_WANTED}", no_image, reference("image_id")),
        (ERROR, f"annotations whose category_id is no id: {ID_WANTED}", no_category, reference("category_id")),
        (ERROR, "annotations of images that are not listed", other_image, reference("image_id")),
        (ERROR, "annotations of categories that are not listed", other_category, reference("category_id")),
        (ERROR, f"boxes that cannot be read: {BOX_WANTED}", ~readable, split.describe),
        (FAULT, "boxes without width or height: dropped", readable & ~positive, split.describe),
        (FAULT, "boxes wholly outside their image: dropped", readable & positive & ~inside, split.describe),
        (WARNING, "boxes that reach over the image's edge by more than a pixel: clipped", beyond, split.describe),
        (WARNING, "boxes that repeat another of the same class in their image", repeated(split), split.describe),
        (WARNING, "areas that are no number from 0 on: the box's is taken", odd("area", is_area), stated("area")),
        no_mark("iscrowd"),
        no_mark("ignore"),
    ):
        findings += found(severity, source, text, np.flatnonzero(which), describe)

    if readable.any():
        box = boxes[readable]
        if (np.abs(box) <= 1).all():
            text = "all boxes lie within 0 and 1: fractions of the image, it seems; COCO's are in pixels"
            findings += found(FAULT, source, text, np.flatnonzero(readable), split.describe)
        if beyond.sum() > 0.1 * len(box) and (box[:, 2:] > box[:, :2]).all():
            text = "boxes that look like left, top, right, bottom; COCO's are x, y, width, height"
            findings += found(FAULT, source, text, np.flatnonzero(readable), split.describe)
    return findings


def repeated(split: Split) -> np.ndarray:
    """Which annotations equal an earlier one in image, category and box, bool (n,)."""
    rows = np.column_stack((split.image_of, split.category_of, split.boxes))  # (n, 6); NaN equals nothing
    order = np.lexsort(rows.T)  # stable: equal rows stay in the order of the file
    repeats = np.zeros(len(rows), dtype=bool)
    repeats[order[1:]] = (rows[order[1:]] == rows[order[:-1]]).all(axis=1)
    return repeats & ~split.crowd


def check_counts(split: Split, num_queries: int) -> list[Finding]:
    """Too many objects, or none: by image, by category, and on the whole."""
    source = split.name
    if split.annotations and not split.readable.any():
        return []  # other findings say why
    ignored = [i for i, a in enumerate(split.annotations) if is_set(a.get("ignore")) and not is_set(a.get("iscrowd"))]
    findings = found(NOTE, source, 'annotations with "ignore": 1: they count as crowds', ignored, split.describe)
    if not split.objects.any():
        text = "no boxes to learn from" if source == "train" else "no boxes: COCO's figures will all be -1"
        return [*findings, Finding(ERROR if source == "train" else WARNING, source, text, 1)]
        text = "no boxes to learn from" if source == "train" else NOTHING_TO_MEASURE
        return [*findings, Finding(ERROR if source == "train" else WARNING, source, text, 1)]
    objects = np.bincount(split.image_of[split.objects], minlength=len(split.images))
    many = np.flatnonzero(objects > num_queries)
    text = f"images with more objects than the model has queries ({num_queries}): the rest cannot be found"
    findings += found(WARNING, source, text, many, lambda i: f"{split.images[i]['file_name']}: {objects[i]}")
    empty = np.flatnonzero(objects == 0)
    findings += found(
        WARNING if len(empty) > len(objects) / 2 else NOTE, source, "images without objects",
        empty, lambda i: split.images[i]["file_name"],
    )  # fmt: skip
    uses = np.bincount(split.category_of[split.objects], minlength=len(split.categories))
    findings += found(
        WARNING if source == "train" else NOTE, source, "categories without objects",
        np.flatnonzero(uses == 0), lambda i: short(split.categories[i]["name"]),
    )  # fmt: skip
    text = "crowds: not trained on, and neither right nor wrong in evaluation"
    findings += found(NOTE, source, text, np.flatnonzero(split.crowd), split.describe)
    difficult = [i for i, annotation in enumerate(split.annotations) if is_set(annotation.get("difficult"))]
    text = "annotations marked as difficult: --remove_difficult treats them as crowds"
    findings += found(NOTE, source, text, difficult, split.describe)
    return findings


def check_masks(split: Split) -> list[Finding]:
    """Segmentations that a training with --masks refuses; nothing where there are none at all."""
    given = [annotation.get("segmentation") for annotation in split.annotations]
    if not any(given):
        return []
    sizes: list[list[int] | None] = []
    for image in split.images:
        try:
            sizes.append(normalize_size(image.get("height"), image.get("width")))
        except ValueError:
            sizes.append(None)
    unsized = [split.images[i]["file_name"] for i, size in enumerate(sizes) if size is None]
    rows = [i for i, place in enumerate(split.image_of) if place >= 0 and sizes[place]]
    absent = [i for i in rows if not given[i]]
    rows = [i for i in rows if given[i]]
    read = normalize_all([given[i] for i in rows], [sizes[split.image_of[i]] for i in rows])
    damaged = [(i, words) for i, words in zip(rows, read, strict=True) if isinstance(words, str)]

    def describe(i: int, words: str = "") -> str:
        name = split.images[split.image_of[i]]["file_name"]
        return f"annotation {split.annotations[i].get('id')} in {name}{words and ' ' + words}"

    source = split.name
    return [
        *found(FAULT, source, "segmentations that --masks refuses", damaged, lambda case: describe(*case)),
        *found(WARNING, source, "annotations without a segmentation, which --masks refuses", absent, describe),
        *found(WARNING, source, "images without a height and width for --masks: whole numbers above 0", unsized),
    ]


def check_files(split: Split) -> list[Finding]:
    """Image files that are missing or not listed."""
    if not split.folder.is_dir():
        return [Finding(ERROR, split.name, f"the image folder {split.folder} is missing", 1)]
    paths = [split.path(image) for image in split.images]
    missing, present = missing_files(paths)
    listed = set(paths)
    there = (folder / name for folder, names in present.items() for name in names)
    suffixes = image_suffixes()
    there = (path for path in there if path.suffix.lower() in suffixes and not is_hidden(path.name))
    unlisted = sorted(str(path) for path in there if path not in listed)
    absent = set(missing)
    names = [image["file_name"] for image, path in zip(split.images, paths, strict=True) if path in absent]
    index = split.file_index() if names else []
    text = f"image files that are missing in {split.folder}"
    if any(hint(name, index) for name in names):
        text += f"; where another is there, {MEND.format(split.file.name)}"
    return [
        *found(ERROR, split.name, text, names, lambda name: f"{name[:200]}{hint(name, index)}"),
        *found(NOTE, split.name, "image files that the annotations do not list: not used", unlisted),
    ]


@dataclass(frozen=True)
class StoredImage:
    """What an image file turned out to hold.

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


def check_images(split: Split, stored: Sequence[StoredImage | None]) -> list[Finding]:
    """What is wrong with the image files.

    Args:
        split: whose.
        stored: of each of its images, as `inspect_images` returns them.
    """
    unreadable, sizes, turned, by_digest = [], [], [], defaultdict(set)
    for image, said, file in zip(split.images, split.sizes, stored, strict=True):
        name = image["file_name"]
        if file is None:
            continue
        if file.error:
            unreadable.append(file.error)
            continue
        by_digest[file.digest].add(name)
        if file.orientation != 1:
            turned.append(f"{name}: {file.orientation}")
        if np.isfinite(said[0]) and tuple(said) != file.size:
            swapped = ", which fits once EXIF's rotation is applied" if tuple(said[::-1]) == file.size else ""
            swapped = swapped if file.orientation >= 5 else ""
            sizes.append("{}: {} x {}, annotated as {:g} x {:g}{}".format(name, *file.size, *said, swapped))
    twins = [" = ".join(sorted(names)) for names in by_digest.values() if len(names) > 1]
    source = split.name
    text = "images whose EXIF orientation is not upright: boxes must refer to the pixels as stored, which are used"
    return [
        *found(ERROR, source, "image files that cannot be read whole", unreadable),
        *found(FAULT, source, "images of another size than annotated (width x height)", sizes),
        *found(WARNING, source, text, turned),
        *found(WARNING, source, "images with the same pixels under several names", twins),
    ]


def compare_splits(
    train: Split,
    val: Split,
    stored: tuple[Sequence[StoredImage | None], Sequence[StoredImage | None]] | None = None,
    label_map: LabelMap | None = None,
) -> list[Finding]:
    """What two splits have in common and should not, and the other way round.

    Args:
        train: what is learned from.
        val: what is evaluated on.
        stored: what their images' files hold, for a comparison of the pixels; None compares names and file sizes.
        label_map: of the model, whose categories val may have; None for those of train.
    """
    source, findings = f"{train.name} and {val.name}", []
    own, other = ({c["id"]: str(c["name"]) for c in split.categories} for split in (train, val))
    if own and other:
        # COCO's labels are the same for all of its subsets.
        labels, owner = (
            label_map or LabelMap.from_categories(train.categories),
            "the model" if label_map else train.name,
        )
        known = {i: labels.names[label] for i, label in labels.labels().items()}
        unknown = [
            f"{i} {short(name)!r}" + (f", in {owner} {short(known[i])!r}" if i in known else "")
            for i, name in other.items()
            if known.get(i) != name
        ]
        findings += found(ERROR, source, f"categories that {val.name} has and {owner} has not", unknown)
        unseen = [f"{i} {short(name)!r}" for i, name in own.items() if i not in other]
        findings += found(WARNING, source, f"categories that {train.name} has and {val.name} has not", unseen)

    named = {image["file_name"]: train.path(image) for image in train.images}
    pairs = [(named[i["file_name"]], val.path(i)) for i in val.images if i["file_name"] in named]
    if stored is None:
        same = [str(theirs) for ours, theirs in pairs if file_size(ours) == file_size(theirs) is not None]
        text = "images of the same name and file size in both: evaluated on what was learned?"
        return findings + found(WARNING, source, text, same)
    learned: dict[bytes, str] = {}
    for image, file in zip(train.images, stored[0], strict=True):
        if file and not file.error:
            learned.setdefault(file.digest, image["file_name"])
    leaked = [
        f"{learned[file.digest]} = {image['file_name']}"
        for image, file in zip(val.images, stored[1], strict=True)
        if file and file.digest in learned
    ]
    findings += found(FAULT, source, "images with the same pixels in both: evaluated on what was learned", leaked)
    text = "image names that are in both, whatever the images"
    return findings + found(NOTE, source, text, [theirs.name for _, theirs in pairs])


def file_size(path: Path) -> int | None:
    """Bytes of a file; None where there is none, or can be none of this name."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return None


def check_quickly(splits: Sequence[Split], num_queries: int, label_map: LabelMap | None = None) -> list[Finding]:
    """All that can be found without reading an image, the worst first within each split."""
    findings = []
    for split in splits:
        findings += by_severity(check_annotations(split, num_queries) + check_files(split))
    if len(splits) == 2:
        findings += by_severity(compare_splits(*splits, label_map=label_map))
    return findings


def check_fully(splits: Sequence[Split], num_queries: int, progress: bool = False) -> list[Finding]:
    """All that can be found, with every image decoded, the worst first within each split."""
    findings, stored = [], [inspect_images(split, progress) for split in splits]
    for split, files in zip(splits, stored, strict=True):
        own = check_annotations(split, num_queries) + check_files(split) + check_images(split, files)
        findings += by_severity(own)
    if len(splits) == 2:
        findings += by_severity(compare_splits(*splits, stored))
    return findings


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first, otherwise in their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def quick_checks(
    splits: Mapping[str, tuple[Path, Path]],
    num_queries: int,
    parsed: Mapping[str, dict] | None = None,
    label_map: LabelMap | None = None,
    limited: Collection[str] = (),
) -> list[Finding]:
    """What a training should know before it starts, without reading an image: seconds for the whole of COCO.

    Args:
        splits: under "train", "val" or "test" the image folder and the annotation file, as `find_split` returns them,
            what is trained on first. Of "test", only the images are checked.
        num_queries: of the model, which finds at most so many objects in an image.
        parsed: what is in those annotation files, for those that have been read already. Lists that were cut short
            (a limit on the images) are checked as they are.
        label_map: of the model, where it has one already: a checkpoint's, which may have categories that train has not.
        limited: the splits that `--limit_train` or `--limit_val` cut short.

    Returns:
        the faults and warnings that training goes on with; `str` of each is a line to log.

    Raises:
        UserError: it cannot go on: a file is missing or not JSON, there are no images, no categories or no boxes to
            learn from, annotations belong to nothing, or the splits' categories disagree.
    """
    parsed = parsed or {}
    read = [Split(name, *paths, parsed.get(name)) for name, paths in splits.items()]
    findings = check_quickly(read, num_queries, label_map)
    errors = [finding for finding in findings if finding.severity == ERROR]
    if errors:
        more = f"; and {len(errors) - 1} more kinds of errors" if len(errors) > 1 else ""
        first = errors[0].source
        where = ", ".join(str(file) for name, (_, file) in splits.items() if name == first or first not in splits)
        way_out = "; python -m enact_common.data.checks lists everything that is wrong"
        if first in limited:
            # Of the whole, which the command looks at, it need not be true.
            way_out = f", in the part that --limit_{'train' if first == 'train' else 'val'} leaves"
        raise UserError(f"{errors[0]}{more} [{where}]{way_out}")
    # Loading has logged which values it read as numbers.
    logged = {str(split.rewritten) for split in read}
    return [finding for finding in findings if finding.severity != NOTE and finding.text not in logged]


# The report ----------------------------------------------------------------------------------------------------------


def contents_text(splits: Sequence[Split]) -> str:
    """What is in the splits, as aligned columns: on the whole, then by class."""
    columns = [contents(split) for split in splits]
    rows = [("", *(split.name for split in splits))]
    rows += [(key, *(column[key] for column in columns)) for key in columns[0]]
    return f"{table_text(rows)}\n\n{table_text(class_rows(splits))}"


def contents(split: Split) -> dict[str, str]:
    """A split in numbers, in words."""
    objects = np.bincount(split.image_of[split.objects], minlength=len(split.images))
    areas, lower = split.areas[split.objects], 0.0
    rows = {
        "images": f"{len(split.images):,}",
        "without objects": f"{(objects == 0).sum():,}",
        "objects (no crowds)": f"{split.objects.sum():,}",
        "crowds": f"{split.crowd.sum():,}",
        "an image, mean": f"{objects.mean():.1f}" if len(objects) else "-",
        "an image, most": f"{objects.max():,}" if len(objects) else "-",
    }
    for name, upper in AREAS.items():
        share = ((areas >= lower) & (areas < upper)).mean() if len(areas) else 0.0
        rows[name] = f"{share:.1%}"
        lower = upper
    known = split.sizes[np.isfinite(split.sizes[:, 0])].astype(np.int64)
    if len(known):
        sizes, counts = np.unique(known, axis=0, return_counts=True)
        rows["different sizes"] = f"{len(sizes):,}"
        rows["most often"] = "{} x {}".format(*sizes[counts.argmax()])
        for side, lengths in (("shorter side", known.min(axis=1)), ("longer side", known.max(axis=1))):
            rows[side] = f"{lengths.min()} to {lengths.max()}"
    else:
        rows |= dict.fromkeys(("different sizes", "most often", "shorter side", "longer side"), "-")
    return rows


def class_rows(splits: Sequence[Split]) -> list[tuple[str, ...]]:
    """Of each class its objects, and the images that have some, in each split; a head before them."""
    rows = [("class", *(f"{split.name} {what}" for split in splits for what in ("objects", "images")))]
    names = {category["id"]: str(category["name"]) for split in splits for category in split.categories}
    numbers = []
    for split in splits:
        ids = [category["id"] for category in split.categories]
        labels, images = split.category_of[split.objects], split.image_of[split.objects]
        pairs = np.unique(np.column_stack((labels, images)), axis=0)
        objects_of = np.bincount(labels, minlength=len(ids))
        images_of = np.bincount(pairs[:, 0], minlength=len(ids))
        numbers.append(dict(zip(ids, zip(objects_of, images_of, strict=True), strict=True)))
    width = max((len(str(i)) for i in names), default=0)
    for i in sorted(names):
        cells = [f"{n:,}" if i in own else "-" for own in numbers for n in own.get(i, (0, 0))]
        name = names[i] if len(names[i]) <= 32 else names[i][:29] + "..."
        rows.append((f"{i:>{width}}  {name}", *cells))
    return rows


def table_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width + 3}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(f"  {first:<{widths[0]}}{''.join(cells)}".rstrip())
    return "\n".join(lines)


def findings_text(findings: Sequence[Finding]) -> str:
    """Findings with their first cases, by where they are; each with its severity and its count, if any, before it."""
    blocks = []
    for source in dict.fromkeys(finding.source for finding in findings):
        lines = [source]
        for finding in findings:
            if finding.source != source:
                continue
            count = f"{finding.count:,}" if finding.examples else ""
            head = f"  {finding.severity:<8}{count:>9}  "
            indent = " " * len(head)
            lines.append(textwrap.fill(finding.text, LINE_WIDTH, initial_indent=head, subsequent_indent=indent))
            lines += [f"{indent}- {example}" for example in finding.examples[:EXAMPLES]]
            if finding.examples and finding.count > EXAMPLES:
                lines.append(f"{indent}- and {finding.count - EXAMPLES:,} more")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def verdict_text(findings: Sequence[Finding]) -> str:
    """How many kinds of findings there are of each severity, in one line."""
    counts = Counter(finding.severity for finding in findings)
    kinds = [f"{severity}s: {counts[severity]}" for severity in SEVERITIES if counts[severity]]
    return f"kinds of {', '.join(kinds)}" if set(counts) - {NOTE} else "nothing wrong"


# The command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m enact_common.data.checks",
        description=" ".join(__doc__.split("\n")[0].split()),
        epilog="Exit status: 0, nothing or warnings; 1, faults or errors; 2, the data set cannot be read at all.",
    )
    parser.add_argument(
        "data", nargs="?", metavar="DATA",
        help="folder in COCO's layout, train2017/, val2017/ (or under images/) and "
        "annotations/instances_{train,val}2017.json; or a Roboflow export, train/ and valid/ (or val/), each with "
        "_annotations.coco.json beside the images",
    )  # fmt: skip
    for split in ("train", "val"):
        parser.add_argument(f"--{split}_images", metavar="DIR", help=f"{split} images, in place of DATA's")
        parser.add_argument(f"--{split}_annotations", metavar="FILE", help=f"{split} annotations, in place of DATA's")
    parser.add_argument(
        "--num_queries", type=positive_int, default=100, metavar="N",
        help="queries of the model to train; images with more objects are named (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="do not read the images: no unreadable files, wrong sizes, EXIF orientations or equal pixels are found",
    )  # fmt: skip
    return parser


def find_splits(args: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    """Image folder and annotation file of each split that the command line names.

    Raises:
        UserError: something is missing, on the command line or on the disk.
    """
    splits = {}
    for name in ("train", "val"):
        images, annotations = getattr(args, f"{name}_images"), getattr(args, f"{name}_annotations")
        if bool(images) != bool(annotations):
            raise UserError(f"--{name}_images and --{name}_annotations go together")
        if images:
            splits[name] = Path(images), Path(annotations)
        elif args.data:
            try:
                splits[name] = find_split(args.data, name)
            except UserError as error:
                raise UserError(str(error).removeprefix("--coco_path ")) from error
    if not splits:
        raise UserError(
            "no data: name a folder in COCO's or Roboflow's layout, or pass --train_images and --train_annotations"
        )
    return splits


def main(argv: Sequence[str] | None = None) -> int:
    """Check a data set and print the report.

    Args:
        argv: the command line's words; None for the process's own.

    Returns:
        the exit status: 0; 1 where something is wrong; 2 where the data set cannot be read at all.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Check the data set that the arguments name, and print the report.

    Returns:
        0; 1 where something is wrong.

    Raises:
        UserError: it cannot be read at all.
    """
    splits = [Split(name, *paths) for name, paths in find_splits(args).items()]
    if args.quick:
        findings = check_quickly(splits, args.num_queries)
    else:
        findings = check_fully(splits, args.num_queries, progress=True)
    for split in splits:
        print(f"{split.name:<6} {split.file}, images in {split.folder}")
    print(f"\n{contents_text(splits)}\n")
    if findings:
        print(f"{findings_text(findings)}\n")
    print(verdict_text(findings) + ("; the images themselves were not read (--quick)" if args.quick else ""))
    return int(any(finding.severity in (ERROR, FAULT) for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
