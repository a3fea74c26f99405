"""Read COCO-format exports of other tools, such as Label Studio's result.json and Roboflow's _annotations.coco.json.

Training reads COCO's layout directly. This module is for exports that it cannot read: other folders, several files,
image names with a prefix or a path of another machine.
"""

import argparse
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from enact_common.convert.sources import (
    BAD_OBJECT,
    ImageIndex,
    Issues,
    Item,
    Object,
    Source,
    box_around,
    choose_sets,
    same_size,
    set_of,
)
from enact_common.data.annotations import load_lists, parse_once, read_json, stated_size
from enact_common.data.checks.findings import NOTE, WARNING
from enact_common.data.images import search
from enact_common.data.values import is_box, is_crowd, is_id, is_set
from enact_common.utils.errors import UserError

LISTS = ("images", "annotations", "categories")

# Fields of an annotation that the written file has too.
KEPT = frozenset("id image_id category_id bbox area iscrowd ignore difficult segmentation".split())

OTHER_JSON = NOTE, "JSON files that are not COCO annotations: ignored"
NO_OUTLINE = WARNING, "outlines of several parts and run-length masks: only their boxes are kept"
OTHER_FIELDS = NOTE, "fields of annotations that are not kept"
PROJECT = NOTE, "categories without objects that only name the project, as Roboflow writes them: left out"


def find_coco(root: Path, args: argparse.Namespace, issues: Issues) -> Source:
    """Find the images and annotations of COCO-format files in a folder and its sub-folders, or of one JSON file.

    A file's set is named by its file name or its folders (train, valid, ...); see `choose_sets`.
    """
    folder = root if root.is_dir() else root.parent
    contents = read_files(root, issues)
    if not contents:
        raise UserError(
            f"{root}: no COCO annotations (a JSON object with the lists {', '.join(LISTS)}); export the data as COCO"
        )
    index = ImageIndex(folder, issues)
    sets: dict[str, list[Item]] = defaultdict(list)
    classes: list[str] = []
    for file, data in contents.items():
        names = category_names(file, data, issues)
        classes += [name for name in names.values() if name not in classes]
        objects = read_objects(file, data, names, issues)
        for image in data["images"]:
            where = f"{file}: image {image['id']}"
            path = index.find(image["file_name"], where, nearby=file.parent)
            if path is not None:
                read = partial(same_size, objects[image["id"]], stated_size(image), where, issues)
                sets[set_of(file.relative_to(folder))].append(Item(path, read))
    return Source(choose_sets(root, sets, args, issues), args.classes or classes)


def read_files(root: Path, issues: Issues) -> dict[Path, dict]:
    """The content of the COCO files; other JSON files in a folder are reported."""
    if root.is_file():
        return {root: load_lists(root, LISTS)}
    contents = {}
    for file in sorted(search(root, [".json"]).files):
        with parse_once():
            try:
                data = read_json(file)
            except UserError as error:
                issues.add(OTHER_JSON, str(error))
                continue
            if all(isinstance(data.get(key), list) for key in LISTS):
                contents[file] = load_lists(file, LISTS)
            else:
                issues.add(OTHER_JSON, str(file))
    return contents


def category_names(file: Path, data: dict, issues: Issues) -> dict[int, str]:
    """The class name of each category id, by id, without Roboflow's category 0, which only names the project."""
    categories = sorted(data["categories"], key=lambda category: category["id"])
    ids = [annotation.get("category_id") for annotation in data["annotations"] if isinstance(annotation, dict)]
    used = set(filter(is_id, ids))
    first, others = categories[0], categories[1:]
    if others and first["id"] not in used and all(other.get("supercategory") == first["name"] for other in others):
        issues.add(PROJECT, f"{file}: {first['id']} {first['name']}")
        categories = others
    return {category["id"]: str(category["name"]) for category in categories}


def read_objects(file: Path, data: dict, names: dict[int, str], issues: Issues) -> dict[int, list[Object]]:
    """The objects of each image id of a file."""
    objects = defaultdict(list)
    images = {image["id"] for image in data["images"]}
    for number, annotation in enumerate(data["annotations"], start=1):
        if not isinstance(annotation, dict):
            issues.add(BAD_OBJECT, f"{file}: annotation {number}: {str(annotation)[:80]}")
            continue
        where = f"{file}: annotation {annotation.get('id', number)}"
        category, image = annotation.get("category_id"), annotation.get("image_id")
        outline, box = outline_of(annotation, where, issues), annotation.get("bbox")
        name = names.get(category) if is_id(category) else None
        if is_box(box):
            x, y, w, h = box
            box = x, y, x + w, y + h
        else:
            box = box_around(outline) if outline else None
        if name is None or box is None or not is_id(image) or image not in images:
            shown = ", ".join(f"{key} {str(annotation.get(key))[:40]}" for key in ("image_id", "category_id", "bbox"))
            issues.add(BAD_OBJECT, f"{where}: {shown}")
            continue
        for key in annotation.keys() - KEPT:
            if annotation[key] not in (None, [], {}):
                issues.add(OTHER_FIELDS, f"{file}: {key}")
        difficult, crowd = is_set(annotation.get("difficult")), is_crowd(annotation)
        objects[image].append(Object(name, box, f"{where}: {name}", difficult, outline, crowd))
    return objects


def outline_of(annotation: dict[str, Any], where: str, issues: Issues) -> list[float]:
    """The outline of an annotation with one polygon; empty for other segmentations, which are reported."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return []
    if isinstance(segmentation, list) and len(segmentation) == 1 and isinstance(segmentation[0], list):
        points = segmentation[0]
        numbers = all(isinstance(value, int | float) and value == value for value in points)
        if numbers and len(points) >= 6 and len(points) % 2 == 0:
            return points
    issues.add(NO_OUTLINE, where)
    return []
