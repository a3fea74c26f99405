"""Convert data sets of other formats to the COCO layout that `--coco_path` takes.

    python -m enact_common.convert voc DIR --output_dir OUT
    python -m enact_common.convert yolo|cvat|coco|openimages|dota DIR --output_dir OUT

write OUT/train2017, OUT/val2017 and OUT/annotations/instances_{train,val}2017.json. Everything is read and checked
before anything is written, the annotations are written last, and a failed conversion leaves no files. Changes and
omissions are printed with their first cases; OUT/conversion.txt lists all cases.

`enact_common.convert.voc` and the other modules of that folder read the formats.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from enact_common.cli.program import Parser, enact, program
from enact_common.convert.coco import find_coco
from enact_common.convert.cvat import find_cvat
from enact_common.convert.dota import find_dota
from enact_common.convert.openimages import find_openimages
from enact_common.convert.sources import Issues, Item, Object, Source, number_or_none
from enact_common.convert.voc import find_voc
from enact_common.convert.yolo import find_yolo
from enact_common.data.checks.findings import FAULT, WARNING
from enact_common.data.checks.report import findings_text
from enact_common.data.exif import exif_orientation
from enact_common.data.images import image_size
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import write_atomically

FINDERS = {
    "voc": find_voc,
    "yolo": find_yolo,
    "cvat": find_cvat,
    "coco": find_coco,
    "openimages": find_openimages,
    "dota": find_dota,
}

# Formats whose DIR may also be a single file.
OF_ONE_FILE = ("yolo", "cvat", "coco")

# The help names the source of the class names.
CLASS_NAMES = {
    "yolo": "from data.yaml, obj.names or classes.txt)",
    "cvat": "the labels of the task)",
    "coco": "the categories, by id)",
}

# The help names the source of the other formats' sets.
NAMED_SETS = (
    "{} (default: train and val, valid or validation; else trainval and test; else train and test; else a random split)"
)

SPLITS = ("train", "val")

# The list of all changes and omissions, in the output folder.
REPORT = "conversion.txt"

# Boxes that reach at most this many pixels beyond the image are clipped without a warning, as rounding explains it.
EDGE_SLACK = 0.5

# Decimals of the written coordinates, in pixels.
DECIMALS = 3

STATUS = "Exit status: 0; 1 if images or annotations could not be read and were left out; 2 if nothing was written."

BEYOND = WARNING, "boxes that reach beyond the image: clipped"
NO_AREA = WARNING, "boxes without area inside the image: dropped"
OTHER_CLASS = WARNING, "objects of classes that --classes does not list: left out"
UNUSED_CLASS = WARNING, "classes without objects"
TURNED = WARNING, "images with an EXIF orientation that is not upright: boxes are assumed to refer to the stored pixels"
IN_BOTH = WARNING, "images that are in train and in val"
UNREADABLE = FAULT, "images that cannot be read: left out"

# To COCO -------------------------------------------------------------------------------------------------------------


@dataclass
class Conversion:
    """A converted data set that is not yet written.

    Attributes:
        annotations: the content of the annotation file, for "train" and "val".
        images: the source file of each `file_name`, for "train" and "val".
        issues: the changes and omissions.
    """

    annotations: dict[str, dict]
    images: dict[str, dict[str, Path]]
    issues: Issues


def to_coco(source: Source, issues: Issues, description: str) -> Conversion:
    """Read all annotations of a data set and the headers of all its images. The text is for the files' `info`.

    Raises:
        UserError: a split has no images, or train has no objects.
    """
    read: dict[str, list[tuple[Path, tuple[int, int], list[Object]]]] = {}
    for split in SPLITS:
        items = tqdm(source.items[split], f"read {split}", unit="image", disable=None)
        rows = [(item.image, *read_item(item, issues)) for item in items]
        read[split] = [row for row in rows if row[1] and row[2] is not None]
        if not read[split]:
            raise UserError(f"no annotated images are left for {split}{issues.likely_causes()}")
    in_train = {os.path.realpath(image) for image, *_ in read["train"]}
    for image, *_ in read["val"]:
        if os.path.realpath(image) in in_train:
            issues.add(IN_BOTH, str(image))

    used = {thing.name for rows in read.values() for *_, objects in rows for thing in objects}
    classes = source.classes or sorted(used)
    category_ids = {name: i for i, name in enumerate(classes, start=1)}
    image_ids, annotations, images = count(1), {}, {}
    for split, rows in read.items():
        names = file_names([image for image, *_ in rows])
        content = {
            "info": {"description": description},
            "licenses": [],
            "images": [],
            "annotations": [],
            "categories": [{"id": i, "name": name, "supercategory": ""} for name, i in category_ids.items()],
        }
        for (_, (width, height), objects), name in zip(rows, names, strict=True):
            image_id = next(image_ids)
            content["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
            for thing in objects:
                if thing.name not in category_ids:
                    issues.add(OTHER_CLASS, thing.where)
                    continue
                entry = to_annotation(thing, width, height, issues)
                if entry:
                    number = len(content["annotations"]) + 1
                    owner = {"id": number, "image_id": image_id, "category_id": category_ids[thing.name]}
                    content["annotations"].append({**owner, **entry})
        annotations[split] = content
        images[split] = dict(zip(names, (image for image, *_ in rows), strict=True))
    for name in classes:
        if name not in used:
            issues.add(UNUSED_CLASS, name)
    if not annotations["train"]["annotations"]:
        raise UserError(f"no objects are left to train on{issues.likely_causes()}")
    return Conversion(annotations, images, issues)


def read_item(item: Item, issues: Issues) -> tuple[tuple[int, int] | None, list[Object] | None]:
    """Return an image's size, from its header, and its objects; None for an unreadable image or annotation."""
    try:
        size = image_size(item.image)
    except UserError as error:
        issues.add(UNREADABLE, str(error))
        return None, None
    if exif_orientation(item.image) != 1:
        issues.add(TURNED, str(item.image))
    return size, item.read(*size)


def file_names(images: Sequence[Path]) -> list[str]:
    """Unique names for the images of a split: their paths relative to their common folder."""
    absolute = [Path(os.path.abspath(image)) for image in images]
    base = os.path.commonpath([image.parent for image in absolute])
    return [image.relative_to(base).as_posix() for image in absolute]


def to_annotation(thing: Object, width: int, height: int, issues: Issues) -> dict[str, Any] | None:
    """Return an object's part of a COCO annotation, clipped to the image; None if no area is left."""
    bounds = (width, height) * 2
    box = [min(max(value, 0.0), bound) for value, bound in zip(thing.box, bounds, strict=True)]
    left, top, right, bottom = (round(value, DECIMALS) for value in box)
    sides = zip(("left", "top", "right", "bottom"), thing.box, strict=True)
    shown = f"{thing.where}: {', '.join(f'{side} {value:g}' for side, value in sides)} in {width} x {height}"
    if right <= left or bottom <= top:
        issues.add(NO_AREA, shown)
        return None
    if max(abs(value - clipped) for value, clipped in zip(thing.box, box, strict=True)) > EDGE_SLACK:
        issues.add(BEYOND, shown)
    w, h = round(right - left, DECIMALS), round(bottom - top, DECIMALS)
    entry = {"bbox": [left, top, w, h], "area": round(w * h, DECIMALS), "iscrowd": int(thing.crowd)}
    if thing.polygon:
        points = np.reshape(thing.polygon, (-1, 2)).clip(0, (width, height)).round(DECIMALS)  # (n, 2)
        x, y = points.T
        entry["segmentation"] = [points.ravel().tolist()]
        # The shoelace formula.
        entry["area"] = round(abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2, DECIMALS)
    else:
        entry["segmentation"] = []
    if thing.difficult:
        entry["difficult"] = 1
    return entry


# Writing -------------------------------------------------------------------------------------------------------------


def check_output(output_dir: Path, seed: int) -> None:
    """Refuse an output folder that is a file or is not empty, and a negative seed."""
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(f"--output_dir {output_dir}: the folder is not empty; choose a new or an empty folder")
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; choose a new or an empty folder")


def write_coco(conversion: Conversion, output_dir: Path, mode: str) -> None:
    """Write a data set in the COCO layout, the annotations last. On failure, all written files are removed.

    The folder is empty or missing; the mode is "link", "copy" or "symlink".

    Raises:
        UserError: a file cannot be written.
    """
    new_folders = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    try:
        for split, images in conversion.images.items():
            folder = output_dir / f"{split}2017"
            folder.mkdir(parents=True)
            for name, image in tqdm(images.items(), f"write {split}", unit="image", disable=None):
                place = folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                put_image(image.resolve(), place, mode)
        findings = conversion.issues.findings("conversion")
        text = "".join(f"{f.text}: {f.count}\n" + "".join(f"  {case}\n" for case in f.examples) for f in findings)
        text = text or "Nothing was changed or left out.\n"
        write_atomically(output_dir / REPORT, lambda file: file.write(text.encode(errors="replace")))
        (output_dir / "annotations").mkdir()
        for split, content in conversion.annotations.items():
            encoded = dumps(content).encode()
            path = output_dir / "annotations" / f"instances_{split}2017.json"
            write_atomically(path, lambda file, encoded=encoded: file.write(encoded))
    except BaseException as error:  # Ctrl-C and SystemExit too
        for name in ("train2017", "val2017", "annotations"):
            shutil.rmtree(output_dir / name, ignore_errors=True)
        (output_dir / REPORT).unlink(missing_ok=True)
        for folder in new_folders:
            # Another process may have written to the folder.
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"--output_dir {output_dir}: cannot be written ({error})") from error
        raise


def put_image(image: Path, place: Path, mode: str) -> None:
    """Put a file at a place: "link" makes a hard link, or a copy where that fails; "copy"; or "symlink"."""
    if mode == "symlink":
        place.symlink_to(image)
        return
    if mode == "link":
        try:
            os.link(image, place)
            return
        except OSError:
            # Copy instead. If the copy fails too, its error says why.
            place.unlink(missing_ok=True)
    shutil.copyfile(image, place)


def summary_text(conversion: Conversion, output_dir: Path) -> str:
    """The printed summary: counts, changes and omissions, and the next commands."""
    rows = [f"{'':<8}{'images':>9}{'objects':>9}"]
    counts = {}
    for split, content in conversion.annotations.items():
        rows.append(f"{split:<8}{len(content['images']):>9,}{len(content['annotations']):>9,}")
        counts[split] = Counter(annotation["category_id"] for annotation in content["annotations"])
    categories = conversion.annotations["train"]["categories"]
    width = max(len(str(category["name"])) for category in categories)
    rows += ["", f"{'class':<{width + 5}}" + "".join(f"{split:>9}" for split in counts)]
    for category in categories:
        numbers = "".join(f"{own[category['id']]:>9,}" for own in counts.values())
        rows.append(f"{category['id']:>3}  {category['name']:<{width}}{numbers}")
    findings = conversion.issues.findings("changed or left out")
    if findings:
        rows += ["", findings_text(findings), "", f"{output_dir / REPORT} lists all cases."]
    folder = shlex.quote(str(output_dir))
    rows += [
        "",
        f"Written to {output_dir}. Next:",
        f"  {enact()} check {folder}",
        f"  {enact()} train conditional --coco_path {folder} --output_dir outputs/run",
    ]
    return "\n".join(rows)


# The command line ----------------------------------------------------------------------------------------------------


def split_fraction(text: str) -> float:
    """Parse a number in (0, 1)."""
    value = number_or_none(text)
    if value is None or not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the output folder and of a random split."""
    parser.add_argument(
        "--output_dir", required=True, metavar="OUT", help="new or empty folder, for --coco_path in training"
    )
    parser.add_argument(
        "--val_fraction", type=split_fraction, default=0.2, metavar="F",
        help="fraction of the images for val, for data without splits, in (0, 1) (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random split's seed, 0 or more (default: %(default)s)"
    )
    parser.add_argument(
        "--images", choices=("link", "copy", "symlink"), default="link",
        help="write the images as hard links, which take no space (copies where links are impossible), copies, or "
        "symbolic links (default: %(default)s)",
    )  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog=program("enact_common.convert"), description=__doc__.splitlines()[0], epilog=STATUS)
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, text, folder, sets in (
        (
            "voc", "Pascal VOC: one XML file per image",
            "VOC2007 or a folder like it (Annotations/, JPEGImages/, ImageSets/Main/), a folder of such folders, or "
            "any folder with XML files and images",
            NAMED_SETS.format("a list in ImageSets/Main, or a folder"),
        ),
        (
            "yolo", "YOLO: one text file per image, with boxes or polygons",
            "folder with data.yaml, with obj.data (Darknet, CVAT's \"YOLO 1.1\"), or with images/, labels/ and "
            "classes.txt; or the YAML or data file",
            "a key in data.yaml or obj.data, or a folder in images/ (default: train and val; else a random split)",
        ),
        (
            "cvat", "CVAT for images 1.1: annotations.xml",
            "folder with the XML files and the images, or one XML file next to them",
            NAMED_SETS.format("a subset in CVAT, or the name of an XML file or its folder"),
        ),
        (
            "coco", "COCO's format as Label Studio, Roboflow, CVAT and others export it",
            "folder with the JSON files and the images, or one JSON file next to them",
            NAMED_SETS.format("the name of a JSON file or its folder"),
        ),
        (
            "openimages", "Open Images: CSV tables of boxes and class names",
            "folder with *-annotations-bbox.csv, *class-descriptions*.csv and the images",
            NAMED_SETS.format("the name of a table or its folder"),
        ),
        (
            "dota", "DOTA: oriented boxes, one text file per image",
            "folder with images/ and labelTxt/, or with folders such as train/ and val/ of both",
            NAMED_SETS.format("a folder"),
        ),
    ):  # fmt: skip
        command = formats.add_parser(name, help=text, description=text, epilog=STATUS)
        command.add_argument("data", metavar="DIR", help=folder)
        add_output_flags(command)
        command.add_argument("--train_set", metavar="NAME", help=f"training images: {sets}")
        command.add_argument("--val_set", metavar="NAME", help="validation images, named like --train_set")
        command.add_argument(
            "--classes", nargs="+", metavar="NAME",
            help="class names in the order of their ids, from 1 (default: "
            + CLASS_NAMES.get(name, "all names in the data, sorted)"),
        )  # fmt: skip
        if name == "voc":
            command.add_argument(
                "--zero_based", action="store_true",
                help="coordinates start at 0 and xmax, ymax are the box's edges: width = xmax - xmin (default: VOC's "
                "convention, from 1 with the last pixel included: x = xmin - 1, width = xmax - xmin + 1)",
            )  # fmt: skip
    return parser


def convert(args: argparse.Namespace) -> Conversion:
    """Read a data set; a UserError says which argument or data are not usable."""
    root, output_dir = Path(args.data), Path(args.output_dir)
    if not (root.is_dir() or (args.format in OF_ONE_FILE and root.is_file())):
        raise UserError(f"{root}: no such folder")
    check_output(output_dir, args.seed)
    if root.is_dir() and output_dir.resolve().is_relative_to(root.resolve()):
        # A second conversion would convert the output's images too.
        raise UserError(f"--output_dir {output_dir}: is inside the source {root}; choose a folder outside")
    if bool(args.train_set) != bool(args.val_set):
        raise UserError("--train_set and --val_set go together: pass both or neither")
    repeated = [name for name, times in Counter(args.classes or ()).items() if times > 1]
    if repeated:
        raise UserError(f"--classes: {repeated[0]} is listed twice; list each class once")
    issues = Issues()
    source = FINDERS[args.format](root, args, issues)
    repeated = [name for name, times in Counter(source.classes or ()).items() if times > 1]
    if repeated:
        raise UserError(f"{root}: the class name {repeated[0]} is listed twice; pass --classes NAME ...")
    return to_coco(source, issues, f"Converted from {args.format.upper()}: {root.name}")


def finish(conversion: Conversion, args: argparse.Namespace) -> int:
    """Write a data set to `--output_dir` and print its summary; return 1 if something could not be read, else 0."""
    output_dir = Path(args.output_dir)
    write_coco(conversion, output_dir, args.images)
    print(summary_text(conversion, output_dir))
    return int(any(finding.severity == FAULT for finding in conversion.issues.findings("")))


def main(argv: Sequence[str] | None = None) -> int:
    """Convert a data set; return 0, 1 if images or annotations were left out as unreadable, 2 for user errors."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: finish(convert(args), args))


if __name__ == "__main__":
    sys.exit(main())
