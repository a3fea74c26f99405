"""Read CVAT's own XML format: "CVAT for images 1.1".

Boxes, polygons, ellipses and masks become boxes; polygons keep their outline. Everything else is reported.
"""

import argparse
import math
from collections import defaultdict
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

from enact_common.convert.sources import (
    BAD_OBJECT,
    UPRIGHT,
    ImageIndex,
    Issues,
    Item,
    Object,
    Source,
    box_around,
    choose_sets,
    number_or_none,
    same_size,
    set_of,
)
from enact_common.convert.voc import parse
from enact_common.data.checks.findings import FAULT, NOTE, WARNING
from enact_common.data.images import search
from enact_common.utils.errors import UserError

# The numbers of each shape that becomes a box.
SHAPES = {
    "box": ("xtl", "ytl", "xbr", "ybr"),
    "ellipse": ("cx", "cy", "rx", "ry"),
    "mask": ("left", "top", "width", "height"),
    "polygon": (),
}

OTHER_XML = FAULT, "XML files that are not CVAT for images 1.1: left out"
OTHER_SHAPE = WARNING, "shapes that give no box (polylines, points, cuboids, skeletons, tags): left out"
NO_MASK = WARNING, "masks and ellipses: only their boxes are kept"
ATTRIBUTE = NOTE, "attributes that are not kept"


def find_cvat(root: Path, args: argparse.Namespace, issues: Issues) -> Source:
    """Find the images and shapes of CVAT's XML files in a folder and its sub-folders, or of one XML file.

    An image's set is its subset in CVAT, else the file's name or folder; see `choose_sets`.
    """
    folder = root if root.is_dir() else root.parent
    trees: dict[Path, Element] = {}
    for file in [root] if root.is_file() else sorted(search(root, [".xml"]).files):
        try:
            tree = parse(file, "annotations")
            if tree.find("track") is not None:
                raise ValueError("it is CVAT for video; export the task as CVAT for images 1.1")
            trees[file] = tree
        except ValueError as error:
            issues.add(OTHER_XML, f"{file}: {error}")
    if not trees:
        raise UserError(f"{root}: no annotations.xml of CVAT for images 1.1{issues.likely_causes()}")
    index = ImageIndex(folder, issues)
    sets: dict[str, list[Item]] = defaultdict(list)
    classes: list[str] = []
    for file, tree in trees.items():
        names = [(name.text or "").strip() for name in tree.iterfind("meta//labels/label/name")]
        classes += [name for name in names if name not in classes]
        for image in tree.iterfind("image"):
            where = f"{file}: image {image.get('name')}"
            path = index.find(image.get("name") or "", where)
            if path is not None:
                objects = read_shapes(image, where, issues)
                size = number_or_none(image.get("width")), number_or_none(image.get("height"))
                subset = (image.get("subset") or "").lower()
                named = subset if subset not in ("", "default") else set_of(file.relative_to(folder))
                sets[named].append(Item(path, partial(same_size, objects, size, where, issues)))
    return Source(choose_sets(root, sets, args, issues), args.classes or classes or None)


def read_shapes(image: Element, where: str, issues: Issues) -> list[Object]:
    """The objects of an `image` element."""
    objects = []
    for number, shape in enumerate(image, start=1):
        name = (shape.get("label") or "").strip()
        place = f"{where}: {shape.tag} {number}, {name or 'without a label'}"
        if shape.tag not in SHAPES:
            issues.add(OTHER_SHAPE, place)
            continue
        for attribute in shape.iterfind("attribute"):
            issues.add(ATTRIBUTE, f"{name}: {attribute.get('name')}")
        points = points_of(shape)
        if not name or not points:
            issues.add(BAD_OBJECT, place)
            continue
        if number_or_none(shape.get("rotation")):
            issues.add(UPRIGHT, place)
        if shape.tag in ("mask", "ellipse"):
            issues.add(NO_MASK, place)
        outline = points if shape.tag == "polygon" else []
        objects.append(Object(name, box_around(points), place, polygon=outline))
    return objects


def points_of(shape: Element) -> list[float]:
    """Points x, y, ... of a shape whose box is the shape's box, in pixels; empty if a number is missing or invalid."""
    if shape.tag == "polygon":
        numbers = [number_or_none(word) for word in (shape.get("points") or "").replace(";", ",").split(",")]
        return [] if None in numbers or len(numbers) < 6 or len(numbers) % 2 else numbers
    numbers = [number_or_none(shape.get(key)) for key in SHAPES[shape.tag]]
    if None in numbers:
        return []
    angle = math.radians(number_or_none(shape.get("rotation")) or 0)
    cos, sin = math.cos(angle), math.sin(angle)
    if shape.tag == "ellipse":
        x, y, rx, ry = numbers
        half_width, half_height = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
        return [x - half_width, y - half_height, x + half_width, y + half_height]
    left, top, right, bottom = numbers
    if shape.tag == "mask":
        return [left, top, left + right, top + bottom]
    # CVAT turns a box clockwise about its centre, by degrees.
    x, y, w, h = (left + right) / 2, (top + bottom) / 2, (right - left) / 2, (bottom - top) / 2
    corners = ((-w, -h), (w, -h), (w, h), (-w, h))
    return [value for dx, dy in corners for value in (x + dx * cos - dy * sin, y + dx * sin + dy * cos)]
