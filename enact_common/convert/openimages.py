"""Read Open Images' tables: `*annotations-bbox.csv` and `*class-descriptions*.csv`.

Boxes are fractions of the image. Boxes of groups (`IsGroupOf`) become crowds, which training ignores.
"""

import argparse
import csv
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

from enact_common.convert.sources import (
    BAD_OBJECT,
    ImageIndex,
    Issues,
    Item,
    Object,
    Source,
    choose_sets,
    number_or_none,
    set_of,
)
from enact_common.data.checks.findings import FAULT, NOTE, WARNING
from enact_common.data.images import search
from enact_common.utils.errors import UserError

SIDES = ("XMin", "YMin", "XMax", "YMax")
NEEDED = {"ImageID", "LabelName", *SIDES}

# Marks of an object that COCO's format has no field for.
MARKS = ("IsOccluded", "IsTruncated", "IsDepiction", "IsInside")

OTHER_CSV = NOTE, "CSV files that are not Open Images' boxes or class names: ignored"
BAD_CSV = FAULT, "CSV files that cannot be read: left out"
NO_FILES = WARNING, "images in the tables without an image file: left out"
NOT_THERE = WARNING, "rows with a confidence of 0, for classes that the image does not show: left out"
LOST_MARKS = NOTE, "marks that are not kept"
GROUPS = WARNING, "boxes of groups (IsGroupOf): written as crowds, which training ignores"
NO_NAME = WARNING, "classes without a name in the tables: the code is used"


def find_openimages(root: Path, args: argparse.Namespace, issues: Issues) -> Source:
    """Find the tables and images in a folder and its sub-folders.

    A table's set is named by its file name or its folders (train, validation, test); see `choose_sets`.
    """
    tables, class_names = read_tables(root, issues)
    if not tables:
        raise UserError(
            f"{root}: no CSV file with the columns {', '.join(sorted(NEEDED))}; pass a folder with Open Images' "
            "*-annotations-bbox.csv, its class descriptions and the images"
        )
    index = ImageIndex(root, issues)
    sets: dict[str, list[Item]] = defaultdict(list)
    for table, rows in tables.items():
        by_image: dict[str, list[tuple[int, dict[str, str]]]] = defaultdict(list)
        for number, row in rows:
            if row["ImageID"]:
                by_image[row["ImageID"]].append((number, row))
            else:
                issues.add(BAD_OBJECT, f"{table}:{number}: without an ImageID")
        without_file = 0
        for image_id, own in by_image.items():
            # The tables list millions of images, of which most people have a part.
            if not index.candidates(image_id):
                without_file += 1
            elif image := index.find(image_id, str(table)):
                read = partial(read_rows, table, own, class_names, issues)
                sets[set_of(table.relative_to(root))].append(Item(image, read))
        if without_file:
            issues.add(NO_FILES, f"{table}: {without_file} of {len(by_image)}", without_file)
    return Source(choose_sets(root, sets, args, issues), args.classes)


def read_tables(root: Path, issues: Issues) -> tuple[dict[Path, list[tuple[int, dict[str, str]]]], dict[str, str]]:
    """The rows of each table of boxes below a folder with their line numbers, and the name of each class code."""
    tables, class_names = {}, {}
    for file in sorted(search(root, [".csv"]).files):
        try:
            with open(file, newline="", encoding="utf-8-sig") as text:
                first = next(csv.reader(text), [])
                text.seek(0)
                if set(first) >= NEEDED:
                    tables[file] = list(enumerate(csv.DictReader(text), start=2))
                elif len(first) == 2:
                    class_names |= {row[0]: row[1] for row in csv.reader(text) if len(row) == 2}
                else:
                    issues.add(OTHER_CSV, str(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            issues.add(BAD_CSV, f"{file}: {error}")
    return tables, class_names


def read_rows(
    table: Path, rows: list[tuple[int, dict[str, str]]], names: dict[str, str], issues: Issues, width: int, height: int
) -> list[Object]:
    """Read the objects of an image from its rows, given with their line numbers."""
    objects, marks = [], Counter()
    for number, row in rows:
        code, sides = (row["LabelName"] or "").strip(), [number_or_none(row[side]) for side in SIDES]
        where = f"{table}:{number}"
        if not code or None in sides:
            issues.add(BAD_OBJECT, f"{where}: {code or 'without a class'}: {', '.join(str(row[s]) for s in SIDES)}")
            continue
        if number_or_none(row.get("Confidence")) == 0:
            issues.add(NOT_THERE, where)
            continue
        if code not in names:
            issues.add(NO_NAME, code)
        marks.update(mark for mark in MARKS if row.get(mark) == "1")
        crowd = row.get("IsGroupOf") == "1"
        if crowd:
            issues.add(GROUPS, where)
        left, top, right, bottom = sides
        box = left * width, top * height, right * width, bottom * height
        name = names.get(code, code)
        objects.append(Object(name, box, f"{where}: {name}", crowd=crowd))
    for mark in marks:
        issues.add(LOST_MARKS, f"{table}: {mark}")
    return objects
