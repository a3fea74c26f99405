"""Generate detection data sets of drawn shapes from a seed, in the layout of COCO 2017.

    python -m enact_common.data.synthetic --output_dir shapes --train 1000 --val 200

makes

    shapes/synthetic_shapes.json                     the parameters of the data set
    shapes/annotations/instances_train2017.json
    shapes/annotations/instances_val2017.json
    shapes/train2017/000000000001.jpg ...
    shapes/val2017/000000000001.jpg ...

Every image shows a few geometric shapes of random colour, size and rotation on a textured ground. Shapes may overlap;
as in COCO, only the visible part is annotated. Image i of a split depends only on the seed, the split and i, not on the
number of images.

Existing files are overwritten only with `force`. A folder with other content is always refused. A data set with other
parameters is refused without `force`. A data set with the same parameters gets its missing files.
"""

import argparse
import json
import operator
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from enact_common.cli.program import Parser, program
from enact_common.data.scenes import MAX_OBJECTS, MIN_VISIBLE, SHAPES, SceneObject, _check_scene, draw_scene
from enact_common.utils.errors import exit_status
from enact_common.utils.files import write_atomically
from enact_common.utils.pool import PARALLEL_FROM, mapped

SPLITS = ("train2017", "val2017")
MARKER = "synthetic_shapes.json"
GENERATOR = "enact_common.data.synthetic"
VERSION = 1  # increment when the same parameters give other images or annotations
JPEG_QUALITY = 95


def _checked_parameters(train, val, size, seed, objects, object_size, classes, min_visible) -> dict:
    """Check the parameters of a data set and return them as recorded in JSON; errors as `make_shapes`."""
    size = list(size) if isinstance(size, Sequence) else [size, size]
    if len(size) != 2:
        raise ValueError(f"size must be one or two lengths in pixels, not {size!r}")
    _check_scene(*size, objects, object_size, classes, min_visible)
    for name, value in (("train", train), ("val", val), ("seed", seed)):
        if operator.index(value) < 0:
            raise ValueError(f"{name} must be 0 or more, not {value}")
    return {
        "train": int(train),
        "val": int(val),
        "size": [int(side) for side in size],
        "seed": int(seed),
        "objects": [int(count) for count in objects],
        "object_size": [float(fraction) for fraction in object_size],
        "classes": list(classes),
        "min_visible": float(min_visible),
    }


def make_shapes(
    output_dir: str | os.PathLike,
    train: int = 1000,
    val: int = 200,
    size: int | tuple[int, int] = (192, 192),
    seed: int = 0,
    objects: tuple[int, int] = (1, 5),
    object_size: tuple[float, float] = (0.15, 0.5),
    classes: Sequence[str] = SHAPES,
    min_visible: float = MIN_VISIBLE,
    progress: bool = False,
    force: bool = False,
    parallel: bool = False,
) -> Path:
    """Make a data set of drawn shapes in the layout of COCO 2017, and return its folder.

    A split with an annotation file is complete, since that file is written after the images. Another call with the same
    parameters adds only missing files.

    Args:
        output_dir: folder of the data set; created if missing.
        train, val: number of images in train2017 and val2017, 0 or more.
        size: (height, width) of the images in pixels, or one length for both.
        seed: 0 or more.
        objects: minimum and maximum number of objects in an image, see `draw_scene`.
        object_size: minimum and maximum object extent as a fraction of the shorter image side, see `draw_scene`. COCO's
            evaluation counts every object below 32 pixels as "small".
        classes: names out of SHAPES; category ids count from 1 in this order.
        min_visible: minimum fraction of an object's area that others leave visible, see `draw_scene`; 1: no overlap.
        progress: show a progress bar on standard error, if that is a terminal.
        force: replace an earlier data set of this function in the folder, whatever its parameters. Only the files of
            that data set are removed.
        parallel: draw many images in one process per CPU core. The calling script then needs the guard
            `if __name__ == "__main__":`, since the processes import it.

    Raises:
        ValueError: a parameter is out of range; nothing was written.
        TypeError: a parameter must be an integer but is not; nothing was written.
        FileExistsError: `output_dir` is a file or has other content, or it holds a data set with other parameters and
            `force` is not set; nothing was changed.
        NotADirectoryError: a parent of `output_dir` is a file.
    """
    parameters = _checked_parameters(train, val, size, seed, objects, object_size, classes, min_visible)
    root = Path(output_dir)
    record = {"generator": GENERATOR, "version": VERSION, "parameters": parameters}
    _claim_folder(root, record, force)
    for split in SPLITS:
        _make_split(root, split, record, progress, parallel)
    return root


def _count(record: dict, split: str) -> int:
    return record["parameters"][split.removesuffix("2017")]


def _annotation_path(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _image_path(root: Path, split: str, image_id: int) -> Path:
    return root / split / f"{image_id:012d}.jpg"


def _files(root: Path, record: dict) -> list[Path]:
    """The paths of all files of the data set of `record`, the annotation files first."""
    images = [_image_path(root, split, index + 1) for split in SPLITS for index in range(_count(record, split))]
    return [_annotation_path(root, split) for split in SPLITS] + images


def _claim_folder(root: Path, record: dict, force: bool) -> None:
    """Make sure that every file of the data set is missing or belongs to it; errors as `make_shapes`."""
    root.mkdir(parents=True, exist_ok=True)
    if not any(root.iterdir()):
        _write(root / MARKER, json.dumps(record).encode())
        return
    previous = _read_record(root / MARKER)
    if previous is None:
        raise FileExistsError(f"{root} is not empty and is not a data set of drawn shapes; choose another folder")
    if not force:
        _refuse_other(root, previous, record)
        return
    own = _files(root, previous)
    foreign = [path for path in set(_files(root, record)) - set(own) if path.exists()]
    if foreign:
        raise FileExistsError(f"{min(foreign)} does not belong to the data set in {root}; move it away first")
    # Remove annotations first: a half-removed data set must not look complete.
    for path in own:
        path.unlink(missing_ok=True)
    _write(root / MARKER, json.dumps(record).encode())


def _refuse_other(root: Path, previous: dict, record: dict) -> None:
    """Raise FileExistsError if the data set in `root` has another record than `record`."""
    if previous != record:
        old, new = ({"version": r["version"], **r["parameters"]} for r in (previous, record))
        changes = [f"{name} {old.get(name)} instead of {new[name]}" for name in new if old.get(name) != new[name]]
        raise FileExistsError(
            f"{root} holds a data set with other parameters ({', '.join(changes)}); choose another folder, or pass "
            "force to replace it"
        )
    for split in SPLITS:
        path = _annotation_path(root, split)
        if path.exists() and _read_record(path) != record:
            raise FileExistsError(
                f"{path} is not the original file of this data set; choose another folder, or pass force to replace it"
            )


def _read_record(path: Path) -> dict | None:
    """The record in the marker file or in an annotation file's `info`; None if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    info = content.get("info", content)
    if not isinstance(info, dict) or info.get("generator") != GENERATOR:
        return None
    if not isinstance(info.get("parameters"), dict):
        return None
    record = {key: info.get(key) for key in ("generator", "version", "parameters")}
    # Data sets of earlier versions do not name this parameter.
    return {**record, "parameters": {"min_visible": MIN_VISIBLE, **info["parameters"]}}


def _make_split(root: Path, split: str, record: dict, progress: bool, parallel: bool) -> None:
    """Write the missing images of a split and its annotation file if missing."""
    parameters = record["parameters"]
    height, width = parameters["size"]
    annotation_path = _annotation_path(root, split)
    annotated = annotation_path.exists()
    (root / split).mkdir(exist_ok=True)
    indices = [i for i in range(_count(record, split)) if not annotated or not _image_path(root, split, i + 1).exists()]
    images, annotations = [], []
    parallel = parallel and len(indices) >= PARALLEL_FROM
    try:
        with mapped(partial(_make_image, root, split, parameters), indices, parallel) as scenes:
            bar = tqdm(scenes, desc=split, unit="image", total=len(indices), disable=None if progress else True)
            for index, objects in zip(indices, bar, strict=True):
                name = _image_path(root, split, index + 1).name
                images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
                for item in objects:
                    owner = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": item.class_index + 1}
                    place = {"bbox": list(item.bbox), "area": item.area, "iscrowd": 0, "segmentation": item.polygons}
                    annotations.append({**owner, **place})
    finally:
        # A process that a signal ends while it writes leaves a partial file.
        for path in (root / split).glob("*.jpg.partial"):
            path.unlink()
    if not annotated:
        annotation_path.parent.mkdir(exist_ok=True)
        names = enumerate(parameters["classes"], start=1)
        content = {
            "info": {"description": f"Drawn shapes, {split}", **record},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in names],
        }
        _write(annotation_path, json.dumps(content).encode())


def _make_image(root: Path, split: str, parameters: dict, index: int) -> list[SceneObject]:
    """Draw image `index`, write it if it is missing, and return its objects."""
    # A separate random stream per image: an image must not depend on earlier ones.
    stream = np.random.SeedSequence(parameters["seed"], spawn_key=(SPLITS.index(split), index))
    scene_options = {key: parameters[key] for key in ("objects", "object_size", "classes", "min_visible")}
    image, objects = draw_scene(np.random.default_rng(stream), *parameters["size"], **scene_options)
    path = _image_path(root, split, index + 1)
    if not path.exists():
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        _write(path, cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes())
    return objects


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically, without sync: a data set damaged by a power cut can be made again."""
    write_atomically(path, lambda file: file.write(content), sync=False)


def build_parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    parser = Parser(
        prog=program(GENERATOR),
        description="Make a detection data set of drawn shapes in the layout of COCO 2017.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output_dir", required=True, default=argparse.SUPPRESS,
        help="folder of the data set: new, empty, or with a data set of the same options, to which only missing files "
        "are added (required)",
    )  # fmt: skip
    parser.add_argument("--train", type=int, default=1000, metavar="N", help="number of training images")
    parser.add_argument("--val", type=int, default=200, metavar="N", help="number of validation images")
    parser.add_argument(
        "--size", type=int, nargs="+", default=[192], metavar="PIXELS",
        help="image height and width in pixels, or one value for both",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness, 0 or more")
    parser.add_argument(
        "--objects", type=int, nargs=2, default=[1, 5], metavar=("MIN", "MAX"),
        help=f"minimum and maximum number of objects per image, 0 to {MAX_OBJECTS}",
    )  # fmt: skip
    parser.add_argument(
        "--object_size", type=float, nargs=2, default=[0.15, 0.5], metavar=("MIN", "MAX"),
        help="minimum and maximum longer side of an object's box as a fraction of the shorter image side, above 0 and "
        "up to 1, drawn log-uniformly",
    )  # fmt: skip
    parser.add_argument(
        "--classes", nargs="+", default=list(SHAPES), choices=SHAPES, metavar="SHAPE",
        help=f"shapes to draw, in the order of their category ids, out of {', '.join(SHAPES)}",
    )  # fmt: skip
    parser.add_argument(
        "--min_visible", type=float, default=MIN_VISIBLE, metavar="FRACTION",
        help="minimum fraction of an object's area that later objects leave visible, from 0 to 1; 1: no overlap",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true",
        help="replace an earlier data set of drawn shapes in the folder; other content is still refused",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; after Ctrl-C or SIGTERM, the same command continues with the missing files.

    Raises:
        SystemExit: 2, for an invalid value or a refused folder.
    """
    parser = build_parser()
    args = parser.parse_args(arguments)
    return exit_status(parser.prog, lambda: run(parser, vars(args)))


def run(parser: argparse.ArgumentParser, options: dict) -> int:
    """Make the data set that the options describe, and print a summary."""
    if len(options["size"]) == 1:
        options["size"] *= 2
    parameters = {key: value for key, value in options.items() if key not in ("output_dir", "force")}
    # Check here: a ValueError from drawing is not a bad option.
    try:
        _checked_parameters(**parameters)
    except ValueError as error:
        parser.error(str(error))
    try:
        root = make_shapes(**options, progress=True, parallel=True)
    except (FileExistsError, NotADirectoryError) as error:
        parser.error(str(error))
    print(f"{options['train']} training and {options['val']} validation images in {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
