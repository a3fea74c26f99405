"""Read data sets in the YOLO format of Darknet and Ultralytics: one text file per image, one line per object.

A line is `class x y width height`, the centre and size of a box, or `class x y x y ...`, the outline of an object, in
fractions of the image's width and height. In pose data (data.yaml has `kpt_shape`), keypoint numbers follow each box
and are ignored.
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import yaml

from enact_common.convert.sources import (
    HIDDEN,
    NO_LABELS,
    Issues,
    Item,
    Object,
    Source,
    box_around,
    divide,
    image_files,
    label_lines,
    listed_names,
    number_or_none,
    read_text,
    visible,
)
from enact_common.data.checks.findings import FAULT, NOTE, WARNING
from enact_common.data.images import PICTURE_SUFFIXES, image_suffixes, is_hidden
from enact_common.utils.errors import UserError

# Names of the validation split.
VAL_NAMES = ("val", "valid", "validation")

# Rounded fractions may exceed 0 to 1 by this much.
FRACTION_SLACK = 1e-3

BAD_LINE = FAULT, "lines that are neither a box nor an outline: dropped"
BAD_POSE = FAULT, "lines that do not match a box with data.yaml's kpt_shape: dropped"
BAD_CLASS = FAULT, "lines with a class number that has no name: dropped"
NO_FRACTION = FAULT, "lines with coordinates outside 0 to 1: dropped"
STRAY_LABELS = WARNING, "label files without an image: left out"
NO_LIST = WARNING, "validation lists that do not exist: ignored"
ELSEWHERE = NOTE, "paths of another machine in lists: replaced by images here with the same ending"
NAME_COUNT = WARNING, "class counts that differ from the number of names: the names are used"


def find_yolo(root: Path, args: argparse.Namespace, issues: Issues) -> Source:
    """Find the images and label files of a YOLO data set by its data.yaml or obj.data, or by its folders."""
    config, names, keypoints = find_config(root, issues), args.classes, 0
    if config:
        root, data = config.parent, load_darknet(config, issues) if config.suffix == ".data" else load_yaml(config)
        splits, own_names = yaml_splits(config, data, args, issues), yaml_names(config, data, issues)
        names, keypoints = names or own_names, yaml_keypoints(config, data)
    else:
        splits = yolo_folders(root, args, issues)
    names = names or class_names(root)

    items: dict[str, list[Item]] = {}
    folders = set()
    for split, images in splits.items():
        items[split] = []
        for image in dict.fromkeys(images):
            label = label_file(image)
            folders.add((label.parent, image.parent))
            if image.is_file() and not label.is_file():
                issues.add(NO_LABELS, str(image))
            items[split].append(Item(image, partial(read_yolo, label, names, keypoints, issues)))
    for path in stray_labels(folders, issues):
        issues.add(STRAY_LABELS, str(path))
    if "val" not in items:
        items = divide(items["train"], args, issues)
    return Source(items, names)


def find_config(root: Path, issues: Issues) -> Path | None:
    """The file that describes a data set: `root` if it is a file; data.yaml or the folder's only YAML file; obj.data or
    the folder's only .data file."""
    if root.is_file():
        return root
    for patterns, stem, kind in ((("*.yaml", "*.yml"), "data", "YAML"), (("*.data",), "obj", "data")):
        files = [file for pattern in patterns for file in visible(root, pattern, issues)]
        candidates = [file for file in files if file.stem == stem] or files
        if len(candidates) > 1:
            raise UserError(f"{root}: several {kind} files ({', '.join(f.name for f in candidates)}); pass one as DIR")
        if candidates:
            return candidates[0]
    return None


def load_yaml(config: Path) -> dict:
    """Read a YAML file's mapping. Values are never printed in full: aliases can expand a few lines without end."""
    try:
        data = yaml.safe_load(read_text(config))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an invalid date, such as 2024-02-30
        raise UserError(f"{config}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise UserError(f"{config}: does not describe a data set; expected the keys train, val and names")
    return data


def load_darknet(config: Path, issues: Issues) -> dict:
    """Read Darknet's obj.data, as CVAT exports it ("YOLO 1.1"), in the form of `load_yaml`.

    A line is `key = value`. Keys may be capitalised, like CVAT's subsets. A missing validation list is ignored, because
    CVAT names one even if it does not write it.
    """
    pairs = (line.partition("=") for line in listed_names(config) if "=" in line)
    data: dict = {}
    for key, _, value in pairs:
        data[key.strip()] = data[key.strip().lower()] = value.strip()
    for key in (key for key in data if key.lower() in VAL_NAMES):
        if find_named(data[key], [config.parent], Path.exists) is None:
            issues.add(NO_LIST, f"{config}: {key} = {data[key]}")
            data[key] = ""
    if data.get("names"):
        file = find_named(data["names"], [config.parent], Path.is_file)
        if file is None:
            raise UserError(f"{config}: names {data['names']}, but there is no such file; pass --classes NAME ...")
        data["names"] = listed_names(file)
        count = number_or_none(data.get("classes"))
        data["nc"] = len(data["names"]) if count is None else int(count)
    else:
        data.pop("names", None)
    return data


def yaml_splits(config: Path, data: dict, args: argparse.Namespace, issues: Issues) -> dict[str, list[Path]]:
    """The images of "train", and of "val" if the file has it."""
    path = data.get("path")
    base = config.parent / path if isinstance(path, str) else config.parent
    # The path may be from another machine.
    base = base if base.is_dir() else config.parent
    val_key = args.val_set or next((key for key in VAL_NAMES if data.get(key)), None)
    splits = {}
    for split, key in (("train", args.train_set or "train"), ("val", val_key)):
        if key is None:
            continue
        entries = data.get(key)
        entries = entries if isinstance(entries, list) else [entries]
        if not all(isinstance(entry, str) and entry for entry in entries):
            raise UserError(f"{config}: {key!r} names no images; the file has the keys {', '.join(map(str, data))}")
        splits[split] = [image for entry in entries for image in yaml_images(config, base, entry, issues)]
    return splits


def yaml_names(config: Path, data: dict, issues: Issues) -> list[str] | None:
    """The class names, from a list or a mapping numbered from 0; None if the file has none."""
    names = data.get("names")
    if names is None:
        return None
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise UserError(f"{config}: 'names' must be numbered from 0 without gaps")
        names = [names[i] for i in range(len(names))]
    if isinstance(names, list) and any(isinstance(name, bool) for name in names):
        raise UserError(f"{config}: 'names' has values that YAML reads as true or false; quote the names: 'yes', 'no'")
    if not (isinstance(names, list) and names and all(isinstance(name, str | int | float) for name in names)):
        raise UserError(f"{config}: 'names' must be class names, in a list or numbered from 0")
    class_count = data.get("nc", len(names))
    if isinstance(class_count, int) and class_count != len(names):
        issues.add(NAME_COUNT, f"{config}: nc {class_count}, {len(names)} names")
    return [str(name) for name in names]


def yaml_keypoints(config: Path, data: dict) -> int:
    """How many keypoint numbers a label line has; 0 if the data have no keypoints."""
    shape = data.get("kpt_shape")
    if shape is None:
        return 0
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise UserError(
            f"{config}: 'kpt_shape' must be the numbers of keypoints and of values per keypoint, like [17, 3]"
        )
    return math.prod(shape)


def yaml_images(config: Path, base: Path, entry: str, issues: Issues) -> list[Path]:
    """The images in the folder, or in the list of paths, that an entry of a YAML file names."""
    place = find_named(entry, [base, config.parent], Path.exists)
    if place is None:
        raise UserError(f"{config}: names {entry}, but there is no {base / entry}; correct the path")
    if place.is_dir():
        return image_files(place, issues)
    images = []
    for line in listed_names(place):
        image = find_named(line, [place.parent, base], Path.is_file) or Path(os.path.normpath(place.parent / line))
        # Hidden folders above the data set do not count.
        inside = image.relative_to(base).parts if image.is_relative_to(base) else (image.name,)
        if any(map(is_hidden, inside)):
            issues.add(HIDDEN, str(image))
        else:
            if os.path.isabs(line) and not Path(line).exists():
                issues.add(ELSEWHERE, f"{place}: {line}: {image}")
            images.append(image)
    return images


def find_named(name: str, folders: Sequence[Path], is_there: Callable[[Path], bool]) -> Path | None:
    """Resolve a path from a list or a description, absolute or relative to a folder; None if nothing matches.

    The path may have backslashes. If it does not exist, its longest existing tail counts, for paths from another
    machine, or `data/obj_train_data/a.jpg` from another parent folder.
    """
    plain = name.replace("\\", "/")
    parts = PurePosixPath(plain).parts
    tails = ("/".join(parts[start:]) for start in range(1, len(parts)) if parts[start] != "..")
    for spelling in (name, plain, *tails):
        for folder in folders:
            if is_there(folder / spelling):
                # Keep symbolic links: label files are next to the link, not next to its target.
                return Path(os.path.normpath(folder / spelling))
    return None


def yolo_folders(root: Path, args: argparse.Namespace, issues: Issues) -> dict[str, list[Path]]:
    """The images of each split in images/train, images/val or train/images, val/images; else all images as "train"."""
    folder_names = {
        "train": (args.train_set,) if args.train_set else ("train",),
        "val": (args.val_set,) if args.val_set else VAL_NAMES,
    }
    splits = {}
    for split, names in folder_names.items():
        folders = [place for name in names for place in (root / "images" / name, root / name / "images")]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder:
            splits[split] = image_files(folder, issues)
        elif getattr(args, f"{split}_set"):
            raise UserError(f"--{split}_set {names[0]}: neither {folders[0]} nor {folders[1]} is a folder")
    if "train" not in splits:
        if splits:
            raise UserError(f"{root}: no folder images/train or train/images; pass --train_set and --val_set")
        splits = {"train": image_files(root / "images" if (root / "images").is_dir() else root, issues)}
    return splits


def class_names(root: Path) -> list[str]:
    """The class names in classes.txt, in the folder or among its labels."""
    places = [root / "classes.txt", root / "labels" / "classes.txt", root / "labels" / "train" / "classes.txt"]
    file = next((place for place in places if place.is_file()), None)
    names = listed_names(file) if file else []
    if not names:
        raise UserError(f"{root}: no class names in data.yaml or classes.txt; pass --classes NAME ...")
    return names


def label_file(image: Path) -> Path:
    """The path of an image's label file: next to the image, or with labels/ instead of the last images/."""
    beside, parts = image.with_suffix(".txt"), list(image.parts)
    if "images" not in parts[:-1] or beside.is_file():
        return beside
    parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def stray_labels(folders: set[tuple[Path, Path]], issues: Issues) -> list[Path]:
    """The label files without an image in their image folder, whether or not a split has the image."""
    stems, labels, suffixes = set(), set(), image_suffixes() | PICTURE_SUFFIXES
    for label_folder, image_folder in folders:
        if label_folder.is_dir() and image_folder.is_dir():
            labels |= {path for path in visible(label_folder, "*.txt", issues) if path.name != "classes.txt"}
            images = (path for path in image_folder.iterdir() if path.suffix.lower() in suffixes)
            stems |= {(label_folder, path.stem) for path in images}
    # If labels are next to images, the folder may also have lists of images.
    label_only = {folder for folder, image_folder in folders if folder != image_folder}
    return sorted(path for path in labels if path.parent in label_only and (path.parent, path.stem) not in stems)


def read_yolo(
    label: Path, names: list[str], keypoints: int, issues: Issues, width: int, height: int
) -> list[Object] | None:
    """Read the objects in a label file: none if it is missing, None if it cannot be read.

    Lines have that many keypoint numbers after the box; without any, lines may be outlines.
    """
    if not label.is_file():
        return []
    lines = label_lines(label, issues)
    if lines is None:
        return None
    objects = []
    for number, line in enumerate(lines, start=1):
        words, where = line.split(), f"{label}:{number}"
        if not words:
            continue
        numbers = [number_or_none(word) for word in words]
        shown = f"{where}: {line.strip()[:80]}"
        polygon = not keypoints and len(words) >= 7 and len(words) % 2 == 1
        if None in numbers or not (len(words) == 5 + keypoints or polygon) or numbers[0] != int(numbers[0]):
            hint = ""
            if keypoints:
                hint = f" ({len(words)} numbers instead of 5 and {keypoints} of keypoints)"
            elif len(words) == 6:
                hint = " (is the sixth number a score, and the line a detection, not a label?)"
            issues.add(BAD_POSE if keypoints else BAD_LINE, shown + hint)
            continue
        label_index, fractions = int(numbers[0]), numbers[1:] if polygon else numbers[1:5]
        if not 0 <= label_index < len(names):
            issues.add(BAD_CLASS, f"{shown} (there are {len(names)} names)")
            continue
        if not all(-FRACTION_SLACK <= fraction <= 1 + FRACTION_SLACK for fraction in fractions):
            issues.add(NO_FRACTION, shown)
            continue
        if polygon:
            outline = [f * (height if i % 2 else width) for i, f in enumerate(fractions)]
            box = box_around(outline)
        else:
            x, y, w, h = (f * side for f, side in zip(fractions, (width, height) * 2, strict=True))
            box, outline = (x - w / 2, y - h / 2, x + w / 2, y + h / 2), []
        objects.append(Object(names[label_index], box, f"{where}: {names[label_index]}", polygon=outline))
    return objects
