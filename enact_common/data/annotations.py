"""COCO's annotation files: where they lie, read, checked, and normalised."""

import contextlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from enact_common.data.names import hint, index_files, other_name
from enact_common.data.values import BOX_WANTED, is_area, is_box, is_crowd, is_id, is_set, normalise, shown, wrong_id
from enact_common.utils.errors import UserError

logger = logging.getLogger(__name__)

# Roboflow's exports in COCO's format have this file in each part's folder, beside the images.
ROBOFLOW_FILE = "_annotations.coco.json"
ROBOFLOW_FOLDERS = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}

LAYOUTS = (
    "known layouts: COCO's, <coco_path>/{split}2017 or <coco_path>/images/{split}2017 with <coco_path>/annotations/"
    "{file}; Roboflow's, <coco_path>/{roboflow}/" + ROBOFLOW_FILE + " with the images beside it; for any other, pass "
    "--train_images, --train_annotations, --val_images and --val_annotations"
)

# The test images have no annotations. COCO's server takes results on the smaller list, test-dev.
TEST_FILES = ("image_info_test-dev2017.json", "image_info_test2017.json")


def find_split(coco_path: str, split: str) -> tuple[Path, Path]:
    """The image folder and the annotation file of a split, in COCO's layout or in that of Roboflow's exports.

    COCO's layout has `{split}2017/`, or that folder in `images/`, and `annotations/instances_{split}2017.json`.
    Roboflow's has `train/`, `valid/` (or `val/`) and `test/`, each with `_annotations.coco.json` and the images.

    Args:
        coco_path: `--coco_path`.
        split: "train", "val" or "test".

    Raises:
        UserError: naming what is missing, or that the folder has parts of both layouts.
    """
    root = Path(coco_path)
    if not root.is_dir():
        raise UserError(f"--coco_path {coco_path}: no such folder")
    files = TEST_FILES if split == "test" else (f"instances_{split}2017.json",)
    candidates = [root / "annotations" / file for file in files]
    folders = [root / f"{split}2017", root / "images" / f"{split}2017"]
    layouts = LAYOUTS.format(split=split, file=" or ".join(files), roboflow=" or ".join(ROBOFLOW_FOLDERS[split]))

    exported = roboflow_files(root)
    if exported:
        coco = [path for path in coco_parts(root) if path.exists()]
        if coco:
            raise UserError(
                f"--coco_path {coco_path}: mixes two layouts, {coco[0]} and {exported[0]}; keep one of them in "
                f"this folder ({layouts})"
            )
        own = [path for path in exported if path.parent.name in ROBOFLOW_FOLDERS[split]]
        if len(own) > 1:
            raise UserError(f"--coco_path {coco_path}: {own[0]} and {own[1]} are both there; keep one of them")
        if not own:
            missing = root / ROBOFLOW_FOLDERS[split][0] / ROBOFLOW_FILE
            raise UserError(f"--coco_path {coco_path}: {missing} is missing ({layouts})")
        return own[0].parent, own[0]

    annotations = next((path for path in candidates if path.is_file()), None)
    images = next((folder for folder in folders if folder.is_dir()), None)
    if images is None or annotations is None:
        missing = candidates[0] if images else folders[0]
        raise UserError(f"--coco_path {coco_path}: {missing} is missing ({layouts})")
    return images, annotations


def roboflow_files(root: Path) -> list[Path]:
    """The annotation files of a Roboflow export in COCO's format; none where the folder is no such export."""
    places = [root / folder / ROBOFLOW_FILE for folders in ROBOFLOW_FOLDERS.values() for folder in folders]
    return [path for path in places if path.is_file()]


def coco_parts(root: Path) -> list[Path]:
    """The annotation files of COCO's layout, whether they are there or not."""
    names = (*(f"instances_{split}2017.json" for split in ("train", "val")), *TEST_FILES)
    return [root / "annotations" / name for name in names]


# The files that were parsed in a `parse_once` block; None outside of one.
_parsed: dict[Path, dict] | None = None


@contextlib.contextmanager
def parse_once() -> Iterator[None]:
    """A block in which `read_json` parses no file twice; nobody may change what it returns."""
    global _parsed
    _parsed = {}
    try:
        yield
    finally:
        _parsed = None


def read_json(path: Path) -> dict:
    """A JSON file's object. Callers must not change it: see `parse_once`.

    Raises:
        UserError: the file is missing, is not JSON, or holds something else.
    """
    if _parsed is not None and path in _parsed:
        return _parsed[path]
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a COCO annotation file: it holds a {type(data).__name__}, not an object")
    if _parsed is not None:
        _parsed[path] = data
    return data


def lies_in(folder: Path, name: str) -> bool:
    """Whether a name that a data file gives is that of something in a folder or below it.

    Absolute names may be, too. Names are all that is looked at: a symbolic link in the folder may lead anywhere.
    """
    if "\0" in name:
        return False
    base = os.path.join(os.path.abspath(folder), "")
    place = os.path.abspath(os.path.join(base, name))
    # An empty name is the folder itself.
    return place.startswith(base) and place != base


def check_file_names(images: Iterable[dict], folder: Path, source: Path) -> None:
    """Refuse image files outside the image folder: who hands on an annotation file must not choose what is read.

    Args:
        images: entries of `images`.
        folder: that their names refer to.
        source: the annotation file, for the message.

    Raises:
        UserError: naming the first that is not in the folder or below it, by its name, and the file in the folder that
            it may mean.
    """
    for image in images:
        name = image["file_name"]
        if not lies_in(folder, name):
            there = hint(name, index_files(folder))
            raise UserError(
                f"{source}: image {image['id']} has the file_name {name[:200]!r}, which is no file in {folder} or "
                f"below it{there}; correct the name, or name the folder above all the images as the image folder; "
                "python -m enact_common.data.checks names all such files, and what is there instead"
            )


def stated_size(image: dict) -> tuple[float, float]:
    """Width and height in pixels that an entry of `images` states, as numbers or as text; infinite where it does not.

    A file need not state them, so nothing but two finite numbers above 0 is taken for a size.
    """
    try:
        width, height = float(image["width"]), float(image["height"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return math.inf, math.inf
    return (width, height) if 0 < width < math.inf and 0 < height < math.inf else (math.inf, math.inf)


def missing_files(paths: Iterable[Path]) -> tuple[list[Path], dict[Path, set[str]]]:
    """Which files are not there, by one listing of each folder.

    Returns:
        the missing files, and of each file's folder the names in it, none where it cannot be listed.
    """
    missing, present = [], {}
    for path in paths:
        folder = path.parent
        if folder not in present:
            try:
                present[folder] = set(os.listdir(folder))
            except (OSError, ValueError):  # it is not there, or its name can be none
                present[folder] = set()
        if path.name not in present[folder]:
            missing.append(path)
    return missing, present


def load_lists(path: Path, lists: Sequence[str], log: bool = True) -> dict:
    """A file's object as `normalise` gives it, with the lists that it must have; `images`, `categories` are checked.

    Args:
        path: the file.
        lists: which it must have.
        log: say in one line which values had to be read as numbers.

    Raises:
        UserError: naming the file and the entry at fault.
    """
    original = read_json(path)
    for key in lists:
        if not isinstance(original.get(key), list):
            raise UserError(f"{path}: not a COCO annotation file, it has no list {key!r}")
    data, rewritten = normalise(original)
    if rewritten.counts and log:
        logger.warning("%s: %s", path, rewritten)
    for key, wanted in (("images", ("id", "file_name")), ("categories", ("id", "name"))):
        if not data[key]:
            raise UserError(f"{path}: the list {key!r} is empty")
        for entry in data[key]:
            if not isinstance(entry, dict) or any(name not in entry for name in wanted):
                if key == "images" and (other := other_name(entry)):
                    raise UserError(
                        f"{path}: an entry of 'images' has no file_name but a {other[0]}, {other[1][:200]!r}, as LVIS "
                        "has coco_url: write each file's path below the image folder into file_name"
                    )
                raise UserError(f"{path}: an entry of {key!r} lacks one of {', '.join(wanted)}: {str(entry)[:100]}")
            if not is_id(entry["id"]):
                raise UserError(f"{path}: an id in {key!r} is {wrong_id(entry['id'])}: {str(entry)[:100]}")
            if not isinstance(entry.get("file_name", ""), str):
                raise UserError(f"{path}: a file_name in {key!r} is no text: {str(entry)[:100]}")
        number, count = Counter(entry["id"] for entry in data[key]).most_common(1)[0]
        if count > 1:
            # They may be written in two ways, "1" and 1.
            both = zip(original[key], data[key], strict=True)
            written = dict.fromkeys(repr(old["id"]) for old, new in both if new["id"] == number)
            raise UserError(f"{path}: an id stands twice in {key!r}: {' and '.join(written)}")
    return data


def load_annotations(path: Path, annotated: bool = True, remove_difficult: bool = False, log: bool = True) -> dict:
    """A COCO-format annotation file, checked.

    Ids and numbers that are written as text, and ids written as floats, are read as `normalise` says. Annotations are
    numbered anew from 1: pycocotools takes an id of 0 for "not matched" and overlooks repeated ones, both without a
    word. What COCO's evaluation needs and some files lack or have as something else than numbers (`iscrowd`, `area`)
    is filled in. Annotations with `"ignore": 1` become crowds.

    Args:
        path: the file.
        annotated: False for a list of test images: it need not have `annotations`, and none are taken from it.
        remove_difficult: make crowds of the annotations with `"difficult": 1`, which converters write for those that
            Pascal VOC leaves out of training and of its figures.
        log: say which values had to be read as numbers and how many annotations are ignored; False where the file was
            read before.

    Returns:
        a dict with `images`, `annotations` and `categories`.

    Raises:
        UserError: naming the file and the entry at fault.
    """
    data = load_lists(path, ("images", "annotations", "categories") if annotated else ("images", "categories"), log)
    images = {image["id"] for image in data["images"]}
    categories = {category["id"] for category in data["categories"]}
    annotations, ignored = [], 0
    for number, annotation in enumerate(data["annotations"] if annotated else (), start=1):
        if not isinstance(annotation, dict):
            raise UserError(f"{path}: annotation {number} is no object: {str(annotation)[:100]}")
        where = f"{path}: annotation {annotation.get('id', number)}"
        for key, words, ids, name in (
            ("image_id", "belongs to image", images, "images"),
            ("category_id", "has category", categories, "categories"),
        ):
            value = annotation.get(key)
            if not is_id(value):
                raise UserError(f"{where} {words} {wrong_id(value)}, the id of an entry of {name!r}")
            if value not in ids:
                raise UserError(f"{where} {words} {value}, which is not in {name!r}")
        box = annotation.get("bbox")
        if not is_box(box):
            raise UserError(f"{where} has bbox {shown(box)}: {BOX_WANTED}")
        area, crowd = annotation.get("area"), is_crowd(annotation)
        ignored += crowd and not is_set(annotation.get("iscrowd"))
        # pycocotools computes with both, and ends a training at its first evaluation where they are no numbers.
        completed = {
            "iscrowd": int(crowd or (remove_difficult and is_set(annotation.get("difficult")))),
            "area": area if is_area(area) else max(box[2], 0) * max(box[3], 0),
        }
        annotations.append({**annotation, **completed, "id": number})
    if ignored and log:
        logger.warning('%s: %d annotations have "ignore": 1 and count as crowds, like "iscrowd": 1', path, ignored)
    return {"images": data["images"], "annotations": annotations, "categories": data["categories"]}
