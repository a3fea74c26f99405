"""Data sets in the format of YOLO: a text file an image, a line an object.

A line is `class x y width height`, the centre and size of a box, or `class x y x y ...`, the outline of an object, in
fractions of the image's width and height, as Darknet and Ultralytics YOLO have them. In pose data, of which data.yaml
says `kpt_shape`, each box has the numbers of its keypoints behind it, which are left out.
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
    Issues,
    Item,
    Object,
    Source,
    divide,
    image_files,
    listed_names,
    number_or_none,
    read_text,
    visible,
)
from enact_common.data.checks.findings import FAULT, NOTE, WARNING
from enact_common.data.images import PICTURE_SUFFIXES, image_suffixes, is_hidden
from enact_common.utils.errors import UserError

# Names that the validation part goes by.
VAL_NAMES = ("val", "valid", "validation")

# By how much a fraction may leave 0 to 1 and still be one that was rounded.
FRACTION_SLACK = 1e-3

BAD_LINE = FAULT, "lines that are no box and no outline: dropped"
BAD_POSE = FAULT, "lines that are no box with the keypoints of data.yaml's kpt_shape: dropped"
BAD_CLASS = FAULT, "lines with a class number that has no name: dropped"
NO_FRACTION = FAULT, "lines with numbers outside 0 to 1, no fractions of the image: dropped"
BAD_FILE = FAULT, "label files that cannot be read: left out with their images"
NO_LABELS = WARNING, "images without a label file: taken as images without objects"
STRAY_LABELS = WARNING, "label files without an image: left out"
NO_LIST = WARNING, "lists to validate on that are not there: taken as not named"
ELSEWHERE = NOTE, "paths of another machine in lists: the images here that they end like are taken"
NAME_COUNT = WARNING, "class counts that differ from the number of names, which counts"


def find_yolo(root: Path, args: argparse.Namespace, issues: Issues) -> Source:
    """The images and label files of a YOLO folder, by its data.yaml or obj.data, or by its folders.

    Args:
        root: the folder, or the YAML or data file itself.
        args: of the command line.
        issues: takes what is amiss.

    Raises:
        UserError: there are no images, no class names, or a file that the YAML names is missing.
    """
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
    """The file that describes a data set: the path itself; data.yaml, or the only YAML file in the folder; obj.data, or
    the only file in the folder that is called so.

    Raises:
        UserError: there are several.
    """
    if root.is_file():
        return root
    for patterns, stem, kind in ((("*.yaml", "*.yml"), "data", "YAML"), (("*.data",), "obj", "data")):
        files = [file for pattern in patterns for file in visible(root, pattern, issues)]
        named = [file for file in files if file.stem == stem] or files
        if len(named) > 1:
            raise UserError(f"{root}: has several {kind} files ({', '.join(f.name for f in named)}); name one as DIR")
        if named:
            return named[0]
    return None


def load_yaml(config: Path) -> dict:
    """What a YAML file holds.

    Its values are never shown as a whole: aliases can make a few lines into a value without end.

    Raises:
        UserError: it cannot be read, or is no mapping.
    """
    try:
        data = yaml.safe_load(read_text(config))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-02-30, say, which would be a date
        raise UserError(f"{config}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise UserError(f"{config}: does not describe a data set; expected the keys train, val and names")
    return data


def load_darknet(config: Path, issues: Issues) -> dict:
    """The content of Darknet's obj.data, in the form of `load_yaml`; CVAT's "YOLO 1.1" is such an export.

    A line is `key = value`. Keys may be capitalised, as CVAT's subsets are. A list to validate on that is not there
    counts as not named: CVAT names one whether or not it writes it.

    Raises:
        UserError: it cannot be read, or names a file of class names that is not there.
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
    """The images of "train" and, where it is named, of "val".

    Raises:
        UserError: an entry names nothing, or what is not there.
    """
    path = data.get("path")
    base = config.parent / path if isinstance(path, str) else config.parent
    # A path may be another machine's.
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
    """The class names, in a list or numbered from 0; None where there are none.

    Raises:
        UserError: they are something else.
    """
    names = data.get("names")
    if names is None:
        return None
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise UserError(f"{config}: 'names' must be numbered from 0 on without a gap")
        names = [names[i] for i in range(len(names))]
    if isinstance(names, list) and any(isinstance(name, bool) for name in names):
        raise UserError(f"{config}: 'names' has what YAML takes for true or false; quote the names: 'yes', 'no'")
    if not (isinstance(names, list) and names and all(isinstance(name, str | int | float) for name in names)):
        raise UserError(f"{config}: 'names' must be class names, in a list or numbered from 0")
    said = data.get("nc", len(names))
    if isinstance(said, int) and said != len(names):
        issues.add(NAME_COUNT, f"{config}: nc {said}, {len(names)} names")
    return [str(name) for name in names]


def yaml_keypoints(config: Path, data: dict) -> int:
    """How many numbers the keypoints of an object take in a label line; 0 where the data are no poses.

    Raises:
        UserError: kpt_shape is something else than the number of keypoints and of the values of each.
    """
    shape = data.get("kpt_shape")
    if shape is None:
        return 0
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise UserError(f"{config}: 'kpt_shape' must be the numbers of keypoints and of values of each, like [17, 3]")
    return math.prod(shape)


def yaml_images(config: Path, base: Path, entry: str, issues: Issues) -> list[Path]:
    """The images of a folder, or in a list of paths, that an entry of a YAML file names.

    Raises:
        UserError: there is no such folder or file.
    """
    place = find_named(entry, [base, config.parent], Path.exists)
    if place is None:
        raise UserError(f"{config}: names {entry}, but there is no {base / entry}")
    if place.is_dir():
        return image_files(place, issues)
    images = []
    for line in listed_names(place):
        image = find_named(line, [place.parent, base], Path.is_file) or Path(os.path.normpath(place.parent / line))
        # Folders above the data set may be hidden: they are no part of it.
        inside = image.relative_to(base).parts if image.is_relative_to(base) else (image.name,)
        if any(map(is_hidden, inside)):
            issues.add(HIDDEN, str(image))
        else:
            if os.path.isabs(line) and not Path(line).exists():
                issues.add(ELSEWHERE, f"{place}: {line}: {image}")
            images.append(image)
    return images


def find_named(name: str, folders: Sequence[Path], is_there: Callable[[Path], bool]) -> Path | None:
    """The file or folder that a list or a data set's description means by a path; None where nothing fits.

    It is absolute or relative to a folder, perhaps with backslashes. Else its longest tail that is there counts: what
    another machine's path ends with, or `data/obj_train_data/a.jpg` where the export had another folder above.

    Args:
        name: the path.
        folders: that it may be relative to.
        is_there: whether a place has what is looked for.
    """
    plain = name.replace("\\", "/")
    parts = PurePosixPath(plain).parts
    tails = ("/".join(parts[start:]) for start in range(1, len(parts)) if parts[start] != "..")
    for spelling in (name, plain, *tails):
        for folder in folders:
            if is_there(folder / spelling):
                # Not resolved: labels are looked for beside links, not where these lead.
                return Path(os.path.normpath(folder / spelling))
    return None


def yolo_folders(root: Path, args: argparse.Namespace, issues: Issues) -> dict[str, list[Path]]:
    """The images of each split in images/train, images/val or train/images, val/images; else all as "train".

    Raises:
        UserError: there are no such folders, or no images.
    """
    wanted = {
        "train": (args.train_set,) if args.train_set else ("train",),
        "val": (args.val_set,) if args.val_set else VAL_NAMES,
    }
    splits = {}
    for split, names in wanted.items():
        folders = [place for name in names for place in (root / "images" / name, root / name / "images")]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder:
            splits[split] = image_files(folder, issues)
        elif getattr(args, f"{split}_set"):
            raise UserError(f"--{split}_set {names[0]}: there is neither {folders[0]} nor {folders[1]}")
    if "train" not in splits:
        if splits:
            raise UserError(f"{root}: has no training images, in images/train or train/images")
        splits = {"train": image_files(root / "images" if (root / "images").is_dir() else root, issues)}
    return splits


def class_names(root: Path) -> list[str]:
    """The lines of classes.txt, in the folder or among its labels.

    Raises:
        UserError: there is no such file.
    """
    places = [root / "classes.txt", root / "labels" / "classes.txt", root / "labels" / "train" / "classes.txt"]
    file = next((place for place in places if place.is_file()), None)
    names = listed_names(file) if file else []
    if not names:
        raise UserError(f"{root}: no class names, in data.yaml or in classes.txt; pass --classes NAME ...")
    return names


def label_file(image: Path) -> Path:
    """Where an image's label file is: under labels/ in place of the last images/, or beside the image."""
    beside, parts = image.with_suffix(".txt"), list(image.parts)
    if "images" not in parts[:-1] or beside.is_file():
        return beside
    parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def stray_labels(folders: set[tuple[Path, Path]], issues: Issues) -> list[Path]:
    """The label files that belong to no image, whether or not a split has the image.

    Args:
        folders: pairs of a folder of labels and a folder of its images.
        issues: takes hidden label files.
    """
    stems, labels, suffixes = set(), set(), image_suffixes() | PICTURE_SUFFIXES
    for label_folder, image_folder in folders:
        if label_folder.is_dir() and image_folder.is_dir():
            labels |= {path for path in visible(label_folder, "*.txt", issues) if path.name != "classes.txt"}
            images = (path for path in image_folder.iterdir() if path.suffix.lower() in suffixes)
            stems |= {(label_folder, path.stem) for path in images}
    # With labels beside images, lists of images may lie there too.
    own = {folder for folder, image_folder in folders if folder != image_folder}
    return sorted(path for path in labels if path.parent in own and (path.parent, path.stem) not in stems)


def read_yolo(
    label: Path, names: list[str], keypoints: int, issues: Issues, width: int, height: int
) -> list[Object] | None:
    """The objects in a label file.

    Args:
        label: the file; one that is missing means an image without objects.
        names: of the classes.
        keypoints: numbers behind each box; 0 for data that are no poses, where lines may be outlines.
        issues: takes what is amiss.
        width, height: of the image in pixels, as stored.

    Returns:
        the objects, None where the file cannot be read.
    """
    if not label.is_file():
        return []
    try:
        lines = read_text(label).splitlines()
    except UserError as error:
        issues.add(BAD_FILE, str(error))
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
                hint = f" ({len(words)} numbers, for 5 and {keypoints} of keypoints)"
            elif len(words) == 6:
                hint = " (a sixth number: a score, so a detection rather than a label?)"
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
            xs, ys = [x * width for x in fractions[::2]], [y * height for y in fractions[1::2]]
            box = min(xs), min(ys), max(xs), max(ys)
            outline = [value for point in zip(xs, ys, strict=True) for value in point]
        else:
            x, y, w, h = (f * side for f, side in zip(fractions, (width, height) * 2, strict=True))
            box, outline = (x - w / 2, y - h / 2, x + w / 2, y + h / 2), []
        objects.append(Object(names[label_index], box, f"{where}: {names[label_index]}", polygon=outline))
    return objects
