"""What the readers of other annotation formats have in common: what they find, and what they report.

`voc` and `yolo` find a data set and read it; `__main__` makes COCO's layout of it.
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

DRAWN = WARNING, "images drawn at random for val, as the data name none: copies of one picture may be in both splits"
NO_READER = FAULT, f"images of formats that nothing here reads: left out; {WAY_OUT}"
CLOSED = FAULT, "folders that cannot be read: left out"
AGAIN = WARNING, "links to folders that are searched anyway, or that lead in a circle: not followed"
OTHERS = NOTE, "files that are no images by their suffix: passed over"
HIDDEN = NOTE, "hidden files and folders: passed over"

# Files that belong to the formats, and need no mention where images are looked for.
OWN_SUFFIXES = frozenset(".cache .data .names .txt .xml .yaml .yml".split())


class Issues:
    """What was changed or left out, by kind, in the order in which the kinds came up.

    A kind is a severity ("warning", or "fault" for what is lost because it cannot be read) and a text.
    """

    def __init__(self):
        self._cases: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)

    def add(self, kind: tuple[str, str], case: str, count: int = 1) -> None:
        """Note a case, once however often it is met, or a text that stands for several."""
        self._cases[kind][case] = count

    def findings(self, source: str) -> list[Finding]:
        """One finding of each kind, the faults first, with all cases as examples."""
        kinds = sorted(self._cases.items(), key=lambda item: item[0][0] != FAULT)
        return [Finding(severity, source, text, sum(cases.values()), tuple(cases)) for (severity, text), cases in kinds]


@dataclass
class Object:
    """An annotated object.

    Attributes:
        name: of its class.
        box: left, top, right, bottom in pixels, (0, 0) being the image's top left corner; may reach beyond the image.
        where: file and line, or file and number, for messages.
        difficult: whether VOC marks it so.
        polygon: x, y, x, y, ... in pixels, where it has an outline.
    """

    name: str
    box: tuple[float, float, float, float]
    where: str
    difficult: bool = False
    polygon: list[float] = field(default_factory=list)


@dataclass
class Item:
    """An image and how to get at its objects.

    Attributes:
        image: the file.
        read: from the image's width and height in pixels, as stored, to its objects; None where its annotations cannot
            be read.
    """

    image: Path
    read: Callable[[int, int], list[Object] | None]


@dataclass
class Source:
    """A data set that was found.

    Attributes:
        items: of "train" and "val".
        classes: names in the order of their ids; None for those that occur, sorted.
    """

    items: dict[str, list[Item]]
    classes: list[str] | None


def image_files(folder: Path, issues: Issues) -> list[Path]:
    """The image files in a folder and below it, sorted; what is passed over goes to the issues."""
    found = search(folder, image_suffixes())
    note_passed_over(found, issues)
    unreadable = found.unreadable()
    others = [p for p in found.others if p.suffix.lower() not in OWN_SUFFIXES and p not in set(unreadable)]
    for kind, paths in ((NO_READER, unreadable), (OTHERS, others)):
        if paths:
            issues.add(kind, f"{folder}: {count_suffixes(paths)}", len(paths))
    return sorted(found.files)


def visible(folder: Path, pattern: str, issues: Issues) -> list[Path]:
    """The entries of a folder that match a pattern, sorted; hidden ones go to the issues."""
    paths = sorted(folder.glob(pattern))
    for path in paths:
        if is_hidden(path.name):
            issues.add(HIDDEN, str(path))
    return [path for path in paths if not is_hidden(path.name)]


def note_passed_over(found: Found, issues: Issues) -> None:
    """Let the issues have the hidden files, the links that were not followed, and the folders that cannot be read."""
    for kind, cases in ((CLOSED, found.closed), (AGAIN, found.again), (HIDDEN, found.hidden)):
        for case in cases:
            issues.add(kind, str(case))


def divide(items: list[Item], args: argparse.Namespace, issues: Issues) -> dict[str, list[Item]]:
    """Items drawn at random for "train" and "val", each in its old order.

    Args:
        items: two or more.
        args: of the command line: `val_fraction`, the share of "val" in (0, 1), where each split gets one item at
            least, and `seed`, which decides the draw.
        issues: is told of the draw.

    Raises:
        UserError: there is less than one for each.
    """
    if len(items) < 2:
        raise UserError(f"found {len(items)} annotated images: too few to draw train and val from")
    size = min(max(round(len(items) * args.val_fraction), 1), len(items) - 1)
    drawn = set(np.random.default_rng(args.seed).permutation(len(items))[:size].tolist())
    issues.add(DRAWN, f"{size} of {len(items)}, by --val_fraction {args.val_fraction:g} and --seed {args.seed}")
    return {
        "train": [item for i, item in enumerate(items) if i not in drawn],
        "val": [item for i, item in enumerate(items) if i in drawn],
    }


def read_text(file: Path) -> str:
    """A text file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text file in UTF-8 ({error.reason})") from error


def listed_names(file: Path) -> list[str]:
    """The lines of a list that are not empty.

    Raises:
        UserError: it is no text.
    """
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def number_or_none(text: str | None) -> float | None:
    """A finite number; None for anything else."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
