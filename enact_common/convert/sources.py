"""Data types and helpers that the readers of other annotation formats share.

The module of each format has a function `find_NAME(root, args, issues)`, which returns the `Source` at a path and adds
to the issues what it changes or leaves out, and a function that reads the objects of one image. A UserError says that
there is nothing to read, or what is missing. `__main__` writes the data set in the COCO layout.
"""

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from enact_common.data.checks.findings import FAULT, NOTE, WARNING, Finding
from enact_common.data.images import WAY_OUT, Found, count_suffixes, image_suffixes, is_hidden, search
from enact_common.data.names import index_files, matches
from enact_common.utils.errors import UserError

DRAWN = WARNING, "images drawn at random for val, as the data define no val: near-duplicates may be in both splits"
NO_READER = FAULT, f"images in unsupported formats: left out; {WAY_OUT}"
CLOSED = FAULT, "folders that cannot be read: left out"
AGAIN = WARNING, "links to folders that are already searched, or that lead in a circle: not followed"
OTHERS = NOTE, "files without an image suffix: ignored"
HIDDEN = NOTE, "hidden files and folders: ignored"
IN_NEITHER = WARNING, "folders and sets with images that are in neither split: left out"
BAD_FILE = FAULT, "label files that cannot be read: left out with their images"
NO_LABELS = WARNING, "images without a label file: kept as images without objects"
NO_FILE = FAULT, "annotated images without an image file: left out"
AMBIGUOUS_NAME = FAULT, "image names that fit several files: left out"
OTHER_SIZE = WARNING, "images whose size differs from the annotated one: boxes are taken as pixels of the file"
BAD_OBJECT = FAULT, "objects without a class or a box of finite numbers: dropped"
UPRIGHT = WARNING, "rotated boxes: replaced by the upright boxes around them"

# Names of the train and val sets. The first pair that the data have is used.
SETS = (("train", "val"), ("train", "valid"), ("train", "validation"), ("trainval", "test"), ("train", "test"))

# A set's name in the name of a file or folder, such as train2017 or oidv6-train-annotations-bbox.
SET_NAME = re.compile(r"(?<![a-z])(trainval|train|validation|valid|val|test)(?![a-z])")

# Suffixes of the formats' own files, which are not reported as ignored.
OWN_SUFFIXES = frozenset(".cache .csv .data .json .names .txt .xml .yaml .yml".split())


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

    def likely_causes(self) -> str:
        """Return the first issues, each with its first case, to end an error message; empty if there are none."""
        return "".join(f"; {f.text}: {f.examples[0]}{', ...' if f.count > 1 else ''}" for f in self.findings("")[:3])


@dataclass
class Object:
    """An annotated object.

    Attributes:
        name: class name.
        box: left, top, right, bottom in pixels from the image's top left corner; may reach beyond the image.
        where: file and line, or file and object number, for messages.
        difficult: VOC's flag.
        polygon: the outline x, y, x, y, ... in pixels; empty without an outline.
        crowd: the box holds a group of objects, which training ignores.
    """

    name: str
    box: tuple[float, float, float, float]
    where: str
    difficult: bool = False
    polygon: list[float] = field(default_factory=list)
    crowd: bool = False


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


class ImageIndex:
    """The images below a folder, found by the names that annotations have for them.

    The issues collect ignored files, and names without exactly one image.
    """

    def __init__(self, root: Path, issues: Issues):
        self.root = root
        self.issues = issues
        image_files(root, issues)
        self._by_key = index_files(root)

    def candidates(self, name: str) -> list[str]:
        """The images that a name may mean, as paths below the root."""
        return matches(name, self._by_key)

    def find(self, name: str, where: str, nearby: Path | None = None) -> Path | None:
        """Return the image that a name, path, URL or stem means, also with another suffix or an upload's prefix.

        None, and an issue that names the annotation (`where`), if that is not one image. Images in the folder `nearby`
        come first.
        """
        if nearby is not None:
            name = f"{nearby.relative_to(self.root).as_posix()}/{name}"
        files = self.candidates(name)
        if len(files) == 1:
            return self.root / files[0]
        case = f"{where}: {name}" + (f" ({', '.join(files[:2])}{', ...' if len(files) > 2 else ''})" if files else "")
        self.issues.add(AMBIGUOUS_NAME if files else NO_FILE, case)
        return None


def set_of(path: Path) -> str:
    """The name of the set that a file belongs to: a `SET_NAME` in its stem or its folders, else its stem."""
    found = (SET_NAME.search(part.lower()) for part in (path.stem, *reversed(path.parts[:-1])))
    return next((match[1] for match in found if match), path.stem.lower())


def choose_sets(
    root: Path, sets: dict[str, list[Item]], args: argparse.Namespace, issues: Issues
) -> dict[str, list[Item]]:
    """Make "train" and "val" of the named sets of a data set, or draw them at random if it has no such pair.

    Raises:
        UserError: a requested set is missing, or there are too few images.
    """
    if not sets:
        raise UserError(f"{root}: none of the annotated images is in this folder{issues.likely_causes()}")
    requested = tuple(name.lower() for name in (args.train_set, args.val_set) if name)
    missing = next((name for name in requested if name not in sets), None)
    if missing is not None:
        raise UserError(f"{root}: has no set {missing} (--train_set, --val_set); its sets are {', '.join(sets)}")
    names = requested or next((pair for pair in SETS if all(name in sets for name in pair)), None)
    if not names:
        return divide([item for items in sets.values() for item in items], args, issues)
    for name, items in sets.items():
        if name not in names:
            issues.add(IN_NEITHER, f"{root}: {name}: {len(items)} images")
    return dict(zip(("train", "val"), (sets[name] for name in names), strict=True))


def same_size(
    objects: list[Object], declared: tuple[float | None, ...], where: str, issues: Issues, width: int, height: int
) -> list[Object]:
    """Return the objects, and report an image whose file differs from the declared width and height."""
    if declared != (width, height):
        stated = " x ".join("?" if side is None else f"{side:g}" for side in declared)
        issues.add(OTHER_SIZE, f"{where}: {stated}, the image is {width} x {height}")
    return objects


def box_around(points: list[float]) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) around points x, y, x, y, ..."""
    xs, ys = points[::2], points[1::2]
    return min(xs), min(ys), max(xs), max(ys)


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
    """Split items at random into "train" and "val", at least one in each, without changing their order.

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
    """Read a text file; a UserError if it cannot be read, or is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text file in UTF-8 ({error.reason})") from error


def label_lines(label: Path, issues: "Issues") -> list[str] | None:
    """The lines of an image's label file; None, and an issue, if it cannot be read."""
    try:
        return read_text(label).splitlines()
    except UserError as error:
        issues.add(BAD_FILE, str(error))
        return None


def listed_names(file: Path) -> list[str]:
    """The lines of a text file that are not empty; errors as `read_text`."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def number_or_none(text: str | None) -> float | None:
    """Parse a finite number; None for anything else."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
