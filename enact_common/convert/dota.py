"""Read DOTA's text files: one per image, a line per object, with the four corners of its oriented box.

A line is `x1 y1 x2 y2 x3 y3 x4 y4 class difficult`, in pixels. The detectors find upright boxes, so each object gets
the upright box around its corners, and keeps the corners as its outline.
"""

import argparse
from collections import defaultdict
from functools import partial
from pathlib import Path

from enact_common.convert.sources import (
    NO_LABELS,
    UPRIGHT,
    Issues,
    Item,
    Object,
    Source,
    box_around,
    choose_sets,
    image_files,
    label_lines,
    number_or_none,
    set_of,
)
from enact_common.data.checks.findings import FAULT, WARNING
from enact_common.data.images import search
from enact_common.utils.errors import UserError

# First words of the lines before the objects.
HEADERS = ("imagesource", "gsd")

BAD_LINE = FAULT, "lines that are not four corners, a class and a mark for difficult objects: dropped"
NO_IMAGE = WARNING, "label files without an image: left out"
TWO_LABELS = FAULT, "images with several label files: left out"


def find_dota(root: Path, args: argparse.Namespace, issues: Issues) -> Source:
    """Find the images and label files (labelTxt/) in a folder and its sub-folders.

    An image and its label file have the same stem and set; the set is named by a folder (train, val), see
    `choose_sets`.
    """
    labels: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in search(root, [".txt"]).files:
        labels[folder_set(root, path), path.stem].append(path)
    sets: dict[str, list[Item]] = defaultdict(list)
    paired, images = set(), image_files(root, issues)
    for image in images:
        key = folder_set(root, image), image.stem
        if len(labels.get(key, ())) > 1:
            issues.add(TWO_LABELS, f"{image}: {labels[key][0]}, {labels[key][1]}")
            paired.add(key)
            continue
        label = next(iter(labels.get(key, ())), None)
        if label is None:
            issues.add(NO_LABELS, str(image))
        else:
            paired.add(key)
        sets[key[0]].append(Item(image, partial(read_dota, label, issues)))
    if not paired:
        raise UserError(
            f"{root}: {len(images)} images and {sum(map(len, labels.values()))} text files, but no pair of the same "
            "name; pass a folder with images/ and labelTxt/"
        )
    for key, files in labels.items():
        if key not in paired:
            for file in files:
                issues.add(NO_IMAGE, str(file))
    return Source(choose_sets(root, sets, args, issues), args.classes)


def folder_set(root: Path, path: Path) -> str:
    """The set that the folders of a file below the root name; "all" if they name none."""
    return set_of(Path("all") if path.parent == root else path.relative_to(root).parent / "all")


def read_dota(label: Path | None, issues: Issues, width: int, height: int) -> list[Object] | None:
    """Read the objects in a label file, in pixels; none without a file, and None if the file cannot be read."""
    if label is None:
        return []
    lines = label_lines(label, issues)
    if lines is None:
        return None
    objects = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].split(":")[0].lower() in HEADERS:
            continue
        corners = [number_or_none(word) for word in words[:8]]
        if len(words) not in (9, 10) or None in corners or words[9:] not in ([], ["0"], ["1"], ["2"]):
            issues.add(BAD_LINE, f"{label}:{number}: {line.strip()[:80]}")
            continue
        where, box = f"{label}:{number}: {words[8]}", box_around(corners)
        left, top, right, bottom = box
        if any(x not in (left, right) for x in corners[::2]) or any(y not in (top, bottom) for y in corners[1::2]):
            issues.add(UPRIGHT, where)
        objects.append(Object(words[8], box, where, difficult=words[9:] not in ([], ["0"]), polygon=corners))
    return objects
