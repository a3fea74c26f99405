"""Find, read, check and normalise COCO annotation files."""

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

# Roboflow's COCO exports keep this file in each split's folder, next to the images.
ROBOFLOW_FILE = "_annotations.coco.json"
ROBOFLOW_FOLDERS = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}

LAYOUTS = (
    "known layouts: COCO's, <coco_path>/{split}2017 or <coco_path>/images/{split}2017 with <coco_path>/annotations/"
    "{file}; Roboflow's, <coco_path>/{roboflow}/" + ROBOFLOW_FILE + " next to the images; for any other layout, pass "
    "--train_images, --train_annotations, --val_images and --val_annotations"
)

# The test images have no annotations. COCO's server accepts results on the smaller list, test-dev.
TEST_FILES = ("image_info_test-dev2017.json", "image_info_test2017.json")


def find_split(coco_path: str, split: str) -> tuple[Path, Path]:
    """The image folder and the annotation file of a split: "train", "val" or "test", in COCO's or Roboflow's layout.

    COCO's layout has `{split}2017/` or `images/{split}2017/`, and `annotations/instances_{split}2017.json`. Roboflow's
    has `train/`, `valid/` (or `val/`) and `test/`, each with `_annotations.coco.json` and the images.

    Raises:
        UserError: a file or folder is missing, or the folder mixes both layouts.
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
                f"--coco_path {coco_path}: mixes two layouts, {coco[0]} and {exported[0]}; keep only one layout in "
                f"this folder ({layouts})"
            )
        own = [path for path in exported if path.parent.name in ROBOFLOW_FOLDERS[split]]
        if len(own) > 1:
            raise UserError(f"--coco_path {coco_path}: {own[0]} and {own[1]} both exist; keep only one")
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
    """The annotation files of a Roboflow export in COCO's format; empty if the folder is not a Roboflow export."""
    places = [root / folder / ROBOFLOW_FILE for folders in ROBOFLOW_FOLDERS.values() for folder in folders]
    return [path for path in places if path.is_file()]


def coco_parts(root: Path) -> list[Path]:
    """The paths of all annotation files of COCO's layout, existing or not."""
    names = (*(f"instances_{split}2017.json" for split in ("train", "val")), *TEST_FILES)
    return [root / "annotations" / name for name in names]


# The files parsed in a `parse_once` block; None outside such a block.
_parsed: dict[Path, dict] | None = None


@contextlib.contextmanager
def parse_once() -> Iterator[None]:
    """Within this block, `read_json` parses each file only once; callers must not change its results."""
    global _parsed
    _parsed = {}
    try:
        yield
    finally:
        _parsed = None


def read_json(path: Path) -> dict:
    """Return the object in a JSON file. Callers must not change it: see `parse_once`.

    Raises:
        UserError: the file is missing, is not JSON, or does not hold an object.
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
    """Whether a file name, relative or absolute, lies below a folder.

    Only the name is checked: a symbolic link in the folder may lead anywhere.
    """
    if "\0" in name:
        return False
    base = os.path.join(os.path.abspath(folder), "")
    place = os.path.abspath(os.path.join(base, name))
    # An empty name is the folder itself.
    return place.startswith(base) and place != base


def check_file_names(images: Iterable[dict], folder: Path, source: Path) -> None:
    """Refuse image files outside the image folder: an annotation file from elsewhere must not choose what is read.

    Raises:
        UserError: a name leads out of the folder. The message gives the first such name and the file in the folder that
            it may mean.
    """
    for image in images:
        name = image["file_name"]
        if not lies_in(folder, name):
            there = hint(name, index_files(folder))
            raise UserError(
                f"{source}: image {image['id']} has the file_name {name[:200]!r}, which is not a file below "
                f"{folder}{there}; correct the name, or pass a folder that contains all images as the image folder; "
                "python -m enact_common.data.checks lists all such names and the files they may mean"
            )


def stated_size(image: dict) -> tuple[float, float]:
    """The width and height in pixels that an entry of `images` states, as numbers or as text; else infinite.

    Annotation files may omit the size. A size is two finite numbers above 0; anything else counts as not stated.
    """
    try:
        width, height = float(image["width"]), float(image["height"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return math.inf, math.inf
    return (width, height) if 0 < width < math.inf and 0 < height < math.inf else (math.inf, math.inf)


def missing_files(paths: Iterable[Path]) -> tuple[list[Path], dict[Path, set[str]]]:
    """The missing files, and the names in each file's folder, none if it cannot be listed; lists a folder once."""
    missing, present = [], {}
    for path in paths:
        folder = path.parent
        if folder not in present:
            try:
                present[folder] = set(os.listdir(folder))
            except (OSError, ValueError):  # the folder is missing, or its name is invalid
                present[folder] = set()
        if path.name not in present[folder]:
            missing.append(path)
    return missing, present


def load_lists(path: Path, lists: Sequence[str], log: bool = True) -> dict:
    """Read an annotation file, normalise it, and check that it has these lists, and its `images` and `categories`.

    Logs in one line which values had to be converted to numbers, unless `log` is False.

    Raises:
        UserError: a list or entry is invalid. The message names the file and the entry.
    """
    original = read_json(path)
    for key in lists:
        if not isinstance(original.get(key), list):
            raise UserError(f"{path}: not a COCO annotation file: it has no list {key!r}")
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
                        f"{path}: an entry of 'images' has no file_name, only {other[0]} {other[1][:200]!r}, as in "
                        "LVIS (coco_url); write each file's path below the image folder into file_name"
                    )
                raise UserError(f"{path}: an entry of {key!r} lacks one of {', '.join(wanted)}: {str(entry)[:100]}")
            if not is_id(entry["id"]):
                raise UserError(f"{path}: an id in {key!r} is {wrong_id(entry['id'])}: {str(entry)[:100]}")
            if not isinstance(entry.get("file_name", ""), str):
                raise UserError(f"{path}: a file_name in {key!r} is not a string: {str(entry)[:100]}")
        number, count = Counter(entry["id"] for entry in data[key]).most_common(1)[0]
        if count > 1:
            # Show each spelling of the id, such as "1" and 1.
            both = zip(original[key], data[key], strict=True)
            spellings = dict.fromkeys(repr(old["id"]) for old, new in both if new["id"] == number)
            raise UserError(f"{path}: duplicate id in {key!r}: {' and '.join(spellings)}")
    return data


def load_annotations(path: Path, annotated: bool = True, remove_difficult: bool = False, log: bool = True) -> dict:
    """Load and check a COCO-format annotation file: its `images`, `annotations` and `categories`.

    `normalise` converts numbers written as text, and ids written as floats. Annotations are renumbered from 1, because
    pycocotools silently takes an id of 0 for "not matched" and miscounts repeated ids. Missing or invalid values of
    `iscrowd` and `area` are filled in, because COCO's evaluation needs them. Annotations with `"ignore": 1` become
    crowds.

    Args:
        path: the file.
        annotated: False for a list of test images: `annotations` is optional and not read.
        remove_difficult: turn annotations with `"difficult": 1` into crowds. Converters from Pascal VOC write this
            mark; VOC excludes such objects from training and from its metrics.
        log: log which values were converted to numbers, and how many annotations are ignored.

    Raises:
        UserError: a list or entry is invalid. The message names the file and the entry.
    """
    data = load_lists(path, ("images", "annotations", "categories") if annotated else ("images", "categories"), log)
    images = {image["id"] for image in data["images"]}
    categories = {category["id"] for category in data["categories"]}
    annotations, ignored = [], 0
    for number, annotation in enumerate(data["annotations"] if annotated else (), start=1):
        if not isinstance(annotation, dict):
            raise UserError(f"{path}: annotation {number} is not a JSON object: {str(annotation)[:100]}")
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
        # pycocotools computes with both: other values would end training at its first evaluation.
        completed = {
            "iscrowd": int(crowd or (remove_difficult and is_set(annotation.get("difficult")))),
            "area": area if is_area(area) else max(box[2], 0) * max(box[3], 0),
        }
        annotations.append({**annotation, **completed, "id": number})
    if ignored and log:
        logger.warning('%s: %d annotations have "ignore": 1 and count as crowds, like "iscrowd": 1', path, ignored)
    return {"images": data["images"], "annotations": annotations, "categories": data["categories"]}
