"""Data types and helpers that the readers of other annotation formats share.

`voc` and `yolo` find and read a data set; `__main__` writes it in the COCO layout.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from enact_common.data.checks.findings import FAULT, NOTE, WARNING, Finding
from enact_common.data.images import WAY_OUT, Found, count_suffixes, image_suffixes, is_hidden, search
from enact_common.utils.errors import UserError

DRAWN = WARNING, "images drawn at random for val, as the data define no val: near-duplicates may be in both splits"
NO_READER = FAULT, f"images in unsupported formats: left out; {WAY_OUT}"
CLOSED = FAULT, "folders that cannot be read: left out"
AGAIN = WARNING, "links to folders that are already searched, or that lead in a circle: not followed"
OTHERS = NOTE, "files without an image suffix: ignored"
HIDDEN = NOTE, "hidden files and folders: ignored"

# Suffixes of the formats' own files, which are not reported as ignored.
OWN_SUFFIXES = frozenset(".cache .data .names .txt .xml .yaml .yml".split())


class Issues:
    """The changes and omissions of a conversion, by kind, in order of first occurrence.

    A kind is a severity ("note", "warning", or "fault" for data that is lost because it cannot be read) and a text.
    """

    def __init__(self):
        self._cases: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)

    def add(self, kind: tuple[str, str], case: str, count: int = 1) -> None:
        """Add a case, or a text that stands for `count` cases. Repeated cases count once."""
        self._cases[kind][case] = count

    def findings(self, source: str) -> list[Finding]:
        """Return one finding per kind, faults first, with all cases as examples."""
        kinds = sorted(self._cases.items(), key=lambda item: item[0][0] != FAULT)
        return [Finding(severity, source, text, sum(cases.values()), tuple(cases)) for (severity, text), cases in kinds]


@dataclass
class Object:
    """An annotated object.

    Attributes:
        name: class name.
        box: left, top, right, bottom in pixels from the image's top left corner; may reach beyond the image.
        where: file and line, or file and object number, for messages.
        difficult: VOC's flag.
        polygon: the outline x, y, x, y, ... in pixels; empty without an outline.
    """

    name: str
    box: tuple[float, float, float, float]
    where: str
    difficult: bool = False
    polygon: list[float] = field(default_factory=list)


@dataclass
class Item:
    """An image and the function that reads its objects.

    Attributes:
        image: the image file.
        read: takes the stored image's width and height in pixels and returns its objects; None if its annotations
            cannot be read.
    """

    image: Path
    read: Callable[[int, int], list[Object] | None]


@dataclass
class Source:
    """A data set to convert.

    Attributes:
        items: the images of "train" and "val".
        classes: class names in the order of their ids; None for the names in the annotations, sorted.
    """

    items: dict[str, list[Item]]
    classes: list[str] | None


def image_files(folder: Path, issues: Issues) -> list[Path]:
    """Return the image files in a folder and its sub-folders, sorted. Ignored files are added to the issues."""
    search_result = search(folder, image_suffixes())
    note_passed_over(search_result, issues)
    unreadable = search_result.unreadable()
    other_files = [p for p in search_result.others if p.suffix.lower() not in OWN_SUFFIXES and p not in set(unreadable)]
    for kind, paths in ((NO_READER, unreadable), (OTHERS, other_files)):
        if paths:
            issues.add(kind, f"{folder}: {count_suffixes(paths)}", len(paths))
    return sorted(search_result.files)


def visible(folder: Path, pattern: str, issues: Issues) -> list[Path]:
    """Return the entries of a folder that match a pattern, sorted. Hidden entries are added to the issues."""
    paths = sorted(folder.glob(pattern))
    for path in paths:
        if is_hidden(path.name):
            issues.add(HIDDEN, str(path))
    return [path for path in paths if not is_hidden(path.name)]


def note_passed_over(search_result: Found, issues: Issues) -> None:
    """Add hidden files, links that were not followed and unreadable folders to the issues."""
    for kind, cases in ((CLOSED, search_result.closed), (AGAIN, search_result.again), (HIDDEN, search_result.hidden)):
        for case in cases:
            issues.add(kind, str(case))


def divide(items: list[Item], args: argparse.Namespace, issues: Issues) -> dict[str, list[Item]]:
    """Split items at random into "train" and "val", without changing their order.

    Args:
        items: at least two.
        args: `val_fraction`, the fraction of "val" in (0, 1), and `seed`. Each split gets at least one item.
        issues: collects a warning about the random split.

    Raises:
        UserError: there are fewer than two items.
    """
    if len(items) < 2:
        raise UserError(f"found {len(items)} annotated images: too few to draw train and val from; add images")
    size = min(max(round(len(items) * args.val_fraction), 1), len(items) - 1)
    val_indices = set(np.random.default_rng(args.seed).permutation(len(items))[:size].tolist())
    issues.add(DRAWN, f"{size} of {len(items)}, by --val_fraction {args.val_fraction:g} and --seed {args.seed}")
    return {
        "train": [item for i, item in enumerate(items) if i not in val_indices],
        "val": [item for i, item in enumerate(items) if i in val_indices],
    }


def read_text(file: Path) -> str:
    """Read a text file.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text file in UTF-8 ({error.reason})") from error


def listed_names(file: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def number_or_none(text: str | None) -> float | None:
    """Parse a finite number; None for anything else."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
