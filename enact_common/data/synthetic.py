"""Detection data sets of drawn shapes, in the layout of COCO 2017, made from a seed.

Every image shows a few geometric shapes of random colour, size and rotation on a textured
ground. Shapes may overlap; what is annotated is, as in COCO, the part that can be seen. Size,
count, number of objects and object size are free, so a set can be made for a quick demo, for a
test, or for a study that needs objects of one of COCO's area ranges ("small" is a visible area
below 32 x 32 pixels, "large" one above 96 x 96).

    python -m enact_common.data.synthetic --output_dir shapes --train 1000 --val 200

makes

    shapes/synthetic_shapes.json                     what the set was made with
    shapes/annotations/instances_train2017.json
    shapes/annotations/instances_val2017.json
    shapes/train2017/000000000001.jpg ...
    shapes/val2017/000000000001.jpg ...

Image i of a split depends on the seed, the split and i, never on how many images are made.

No file that exists is written over unless `force` asks for it: a folder that holds anything but a
set of this module is always refused, a set made with other parameters is refused without `force`,
and a set made with the same parameters is completed where files are missing.
"""

import argparse
import json
import math
import operator
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from enact_common.errors import exit_status
from enact_common.files import write_atomically

SHAPES = ("circle", "square", "triangle", "star", "crescent", "cross")
SPLITS = ("train2017", "val2017")
MARKER = "synthetic_shapes.json"
GENERATOR = "enact_common.data.synthetic"
VERSION = 1  # to be raised whenever the same parameters give other images or annotations

MIN_VISIBLE = 0.6  # least fraction of an object's area that later objects leave to be seen
MIN_EXTENT = 6  # pixels; below this the shapes cannot be told apart at all
MAX_OBJECTS = 255  # the id map has 8 bits, and 0 is the ground

SUPERSAMPLING = 4  # id-map cells per pixel and axis
SIZE_DRAWS = 5  # sizes tried for an object before it is left out
PLACE_DRAWS = 10  # places tried for each of these sizes
MIN_PIECE = 1.0  # square pixels; smaller slivers and holes of the visible part are not outlined
GROUND_CONTRAST = 35.0  # least distance of an object's colour from the ground, CIE Lab units
OBJECT_CONTRAST = 25.0  # least distance between two objects' colours, CIE Lab units
JPEG_QUALITY = 95


@dataclass(frozen=True)
class SceneObject:
    """An object of a scene; everything but `extent` describes its visible part.

    Attributes:
        class_index: index into the classes that the scene was drawn with.
        bbox: (x, y, width, height) in pixels; x and y are the left and top edges.
        polygons: outlines of the visible pieces, each a flat list x0, y0, x1, y1, ... in pixels
            with at least three points. A piece with a hole is cut in two, since COCO's polygons
            have no holes.
        area: square pixels.
        visible_fraction: visible area / area of the whole object, from MIN_VISIBLE to 1.
        extent: longer side in pixels of the box around the whole object.
    """

    class_index: int
    bbox: tuple[float, float, float, float]
    polygons: list[list[float]]
    area: float
    visible_fraction: float
    extent: float


@dataclass
class _Placed:
    """An object's place in the id map while the scene is being composed."""

    class_index: int
    extent: float
    rows: slice  # whole pixels around the object
    cols: slice
    whole: int  # id-map cells of the object before anything hid it
    visible: int  # id-map cells that are still its own


def _unit_outline(shape: str) -> np.ndarray:
    """Corner points (N, 2) of an upright shape within the unit circle."""
    if shape == "circle":
        return _on_circle(np.linspace(0, 2 * np.pi, 96, endpoint=False))
    if shape == "square":
        return _on_circle(np.pi / 4 + np.arange(4) * np.pi / 2)
    if shape == "triangle":
        return _on_circle(-np.pi / 2 + np.arange(3) * 2 * np.pi / 3)
    if shape == "star":
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        return _on_circle(-np.pi / 2 + np.arange(10) * np.pi / 5) * radii[:, None]
    if shape == "crescent":
        # The unit disc less a disc of radius r around (d, 0); the two circles meet at x = meet.
        r, d = 0.85, 0.55
        meet = (1 - r**2 + d**2) / (2 * d)
        outer = math.acos(meet)
        inner = math.acos((meet - d) / r)
        bite = _on_circle(np.linspace(2 * np.pi - inner, inner, 48)) * r + (d, 0)
        return np.concatenate([_on_circle(np.linspace(outer, 2 * np.pi - outer, 72)), bite[1:-1]])
    if shape == "cross":
        arm = [(1.0, -0.33), (1.0, 0.33), (0.33, 0.33)]
        quarter_turns = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)]
        return np.array([(a * x + b * y, c * x + d * y) for a, b, c, d in quarter_turns for x, y in arm])
    raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")


def _on_circle(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


_OUTLINES = {shape: _unit_outline(shape) for shape in SHAPES}


def _rotated_outline(rng: np.random.Generator, shape: str) -> np.ndarray:
    """Outline (N, 2) turned by a random angle; its box starts at (0, 0), longer side 1."""
    # A turned circle is the same circle, so it needs no case of its own.
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    points = _OUTLINES[shape] @ np.array([[cos, sin], [-sin, cos]])
    points -= points.min(axis=0)
    return points / points.max()


def _add_object(rng, id_map, placed, class_index, shape, extents) -> None:
    """Draw one more object into `id_map` and `placed`, unless no place is found for it.

    A place is good when every object drawn before keeps MIN_VISIBLE of its area.

    Args:
        id_map: (H * SUPERSAMPLING, W * SUPERSAMPLING) uint8, 1 + index in `placed`, 0 = ground.
        extents: smallest and largest extent in pixels; drawn log-uniformly.
    """
    height, width = (side // SUPERSAMPLING for side in id_map.shape)
    hideable = np.array([0] + [p.visible - math.ceil(MIN_VISIBLE * p.whole) for p in placed])
    for draw in range(SIZE_DRAWS * PLACE_DRAWS):
        # The size is kept over several places, or crowded scenes would lose their large objects.
        if draw % PLACE_DRAWS == 0:
            extent = math.exp(rng.uniform(math.log(extents[0]), math.log(extents[1])))
            outline = _rotated_outline(rng, shape) * extent
        corner = rng.uniform(0, 1, 2) * np.maximum((width, height) - outline.max(axis=0), 0)
        points = outline + corner
        left, top = np.floor(points.min(axis=0)).astype(int)
        right, bottom = np.ceil(points.max(axis=0)).astype(int)
        rows, cols = slice(top, min(bottom, height)), slice(left, min(right, width))

        patch = id_map[_cells(rows), _cells(cols)]
        mask = np.zeros(patch.shape, np.uint8)
        # Cell i of the map spans [i, i + 1), its centre is at i + 0.5.
        cells = np.rint((points - (left, top)) * SUPERSAMPLING - 0.5).astype(np.int32)
        cv2.fillPoly(mask, [cells], 1)
        mask = mask.view(bool)
        hidden = np.bincount(patch[mask], minlength=len(hideable))
        if (hidden[1:] > hideable[1:]).any():
            continue

        for earlier, count in zip(placed, hidden[1:], strict=True):
            earlier.visible -= int(count)
        whole = int(mask.sum())
        placed.append(_Placed(class_index, extent, rows, cols, whole, whole))
        patch[mask] = len(placed)
        return


def _cells(pixels: slice) -> slice:
    return slice(pixels.start * SUPERSAMPLING, pixels.stop * SUPERSAMPLING)


def _outer_contours(mask: np.ndarray) -> list[np.ndarray]:
    """Contours, (N, 1, 2) cells as x, y, that cover `mask` (h, w) uint8 but none of its holes.

    Slivers and holes below MIN_PIECE are passed over, but one contour at least is returned.
    """
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    least = MIN_PIECE * SUPERSAMPLING**2
    pieces = []
    for contour, (_, _, _, parent) in zip(contours, hierarchy[0], strict=True):
        if cv2.contourArea(contour) < least:
            continue
        if parent >= 0:
            # A cut through the middle opens the hole to both halves.
            x, _, w, _ = cv2.boundingRect(contour)
            first, second = mask.copy(), mask.copy()
            first[:, x + w // 2 :] = 0
            second[:, : x + w // 2] = 0
            return _outer_contours(first) + _outer_contours(second)
        pieces.append(contour)
    return pieces or [max(contours, key=cv2.contourArea)]


def _annotate(id_map: np.ndarray, placed: _Placed, index: int) -> SceneObject:
    """What is visible of the object that has number `index` + 1 in the id map."""
    mask = (id_map[_cells(placed.rows), _cells(placed.cols)] == index + 1).view(np.uint8)
    contours = _outer_contours(mask)
    offset = np.array([placed.cols.start, placed.rows.start])
    polygons = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, 0.75, True)[:, 0]  # (N, 2)
        polygon = (points + 0.5) / SUPERSAMPLING + offset
        if len(polygon) >= 3:
            polygons.append(polygon.ravel().tolist())  # (2 * N,)
    # Contours run through the centres of the outermost cells. As fillPoly also fills the cells
    # that an edge only touches, that is where the edge of the shape lies.
    x, y, w, h = cv2.boundingRect(np.concatenate(contours))
    left, top = (np.array([x, y]) + 0.5) / SUPERSAMPLING + offset
    return SceneObject(
        class_index=placed.class_index,
        bbox=(float(left), float(top), (w - 1) / SUPERSAMPLING, (h - 1) / SUPERSAMPLING),
        polygons=polygons,
        area=sum(map(cv2.contourArea, contours)) / SUPERSAMPLING**2,
        visible_fraction=placed.visible / placed.whole,
        extent=placed.extent,
    )


def _ground(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth noise of several scales: image (H, W, 3) float32 and its mean colour (3,), RGB."""
    colour = rng.uniform(50, 205, 3).astype(np.float32)
    texture = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 6):
        cells = 2**octave
        grid = (max(2, round(cells * height / min(height, width))), max(2, round(cells * width / min(height, width))))
        # Mostly light and dark: three free channels would give a rainbow.
        noise = rng.standard_normal((*grid, 1), np.float32) + 0.4 * rng.standard_normal((*grid, 3), np.float32)
        texture += 0.75**octave * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    texture -= texture.mean(axis=(0, 1))
    texture *= rng.uniform(4, 12) / texture.std()
    # Bounded, so that no spot of the ground comes near an object's colour.
    return colour + np.clip(texture, -25, 25), colour


def _to_lab(colours: np.ndarray) -> np.ndarray:
    """CIE Lab of RGB colours (N, 3) in 0..255."""
    rgb = np.asarray(colours, np.float32)[None] / 255  # (1, N, 3)
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[0]


def _contrasting_colour(rng, ground_colour, others) -> np.ndarray:
    """A random RGB colour (3,) apart from the ground and, as far as there is room, the others."""
    candidates = rng.uniform(15, 240, (32, 3)).astype(np.float32)
    taken = _to_lab(np.stack([ground_colour, *others]))  # (1 + len(others), 3)
    distances = np.linalg.norm(_to_lab(candidates)[:, None] - taken, axis=2)
    needed = np.array([GROUND_CONTRAST] + [OBJECT_CONTRAST] * len(others))
    margin = (distances / needed).min(axis=1)  # (32,)
    good = np.flatnonzero(margin >= 1)
    return candidates[good[0] if len(good) else margin.argmax()]


def _paint(rng, id_map: np.ndarray, placed: list[_Placed]) -> np.ndarray:
    """The image (H, W, 3) uint8 RGB of an id map."""
    height, width = (side // SUPERSAMPLING for side in id_map.shape)
    ground, ground_colour = _ground(rng, height, width)
    image = ground.copy()
    light = rng.uniform(0, 2 * np.pi)
    colours = []
    for index, spot in enumerate(placed):
        colour = _contrasting_colour(rng, ground_colour, colours)
        colours.append(colour)
        own = (id_map[_cells(spot.rows), _cells(spot.cols)] == index + 1).astype(np.float32)
        h, w = own.shape[0] // SUPERSAMPLING, own.shape[1] // SUPERSAMPLING
        coverage = cv2.resize(own, (w, h), interpolation=cv2.INTER_AREA)[..., None]  # (h, w, 1)
        shade = math.sin(light) * np.linspace(-1, 1, h, dtype=np.float32)[:, None] + math.cos(light) * np.linspace(
            -1, 1, w, dtype=np.float32
        )  # (h, w)
        lit = colour * (1 + 0.12 * shade[..., None])  # (h, w, 3)
        # The coverages of a pixel sum to at most 1 over all objects; the ground has the rest.
        image[spot.rows, spot.cols] += coverage * (lit - ground[spot.rows, spot.cols])
    image += rng.uniform(1, 5) * rng.standard_normal((height, width, 1), np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def draw_scene(
    rng: np.random.Generator,
    height: int,
    width: int,
    objects: tuple[int, int] = (1, 5),
    object_size: tuple[float, float] = (0.15, 0.5),
    classes: Sequence[str] = SHAPES,
) -> tuple[np.ndarray, list[SceneObject]]:
    """Draw one scene; the same state of `rng` gives the same scene.

    Every object lies wholly within the image. A later object may hide part of an earlier one, but
    at least MIN_VISIBLE of every object's area stays visible. An object for which no place is
    found is left out, so a scene can hold fewer than `objects[0]` where they hardly fit.

    Args:
        rng: source of all randomness.
        height: of the image in pixels.
        width: of the image in pixels.
        objects: least and greatest number of objects, both inclusive, within 0..MAX_OBJECTS.
        object_size: least and greatest extent (longer side of the box around the whole object)
            as a fraction of the shorter image side, within (0, 1]; drawn log-uniformly.
        classes: shapes to draw from, each as likely as the other; a subset of SHAPES.

    Returns:
        The image, (H, W, 3) uint8 RGB, and its objects from the back to the front.

    Raises:
        ValueError: a value is out of range, or the smallest object is below MIN_EXTENT pixels.
        TypeError: a count or a length is not an integer.
    """
    _check_scene(height, width, objects, object_size, classes)
    extents = [fraction * min(height, width) for fraction in object_size]
    id_map = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    placed = []
    for _ in range(rng.integers(objects[0], objects[1], endpoint=True)):
        class_index = int(rng.integers(len(classes)))
        _add_object(rng, id_map, placed, class_index, classes[class_index], extents)
    image = _paint(rng, id_map, placed)
    return image, [_annotate(id_map, spot, index) for index, spot in enumerate(placed)]


def _check_scene(height, width, objects, object_size, classes) -> None:
    if min(operator.index(height), operator.index(width)) < 1:
        raise ValueError(f"size must be at least 1 pixel each way, not {height} x {width}")
    least, most = (operator.index(count) for count in _pair("objects", objects))
    if not 0 <= least <= most <= MAX_OBJECTS:
        raise ValueError(f"objects must be 0 <= MIN <= MAX <= {MAX_OBJECTS}, not {least} {most}")
    smallest, largest = _pair("object_size", object_size)
    if not 0 < smallest <= largest <= 1:
        raise ValueError(f"object_size must be 0 < MIN <= MAX <= 1, not {smallest} {largest}")
    if smallest * min(height, width) < MIN_EXTENT:
        raise ValueError(
            f"object_size {smallest} of the shorter image side, {min(height, width)} pixels, is "
            f"{smallest * min(height, width):.3g} pixels; objects need at least {MIN_EXTENT}"
        )
    unknown = [name for name in classes if name not in SHAPES]
    if isinstance(classes, str) or unknown or not classes or len(set(classes)) != len(classes):
        raise ValueError(f"classes must be one or more different names of {', '.join(SHAPES)}, not {classes!r}")


def _pair(name, values) -> tuple:
    if len(values) != 2:
        raise ValueError(f"{name} must be two values, MIN and MAX, not {values!r}")
    return tuple(values)


def _checked_parameters(train, val, size, seed, objects, object_size, classes) -> dict:
    """The parameters of a data set as they are recorded in JSON.

    Raises:
        ValueError, TypeError: as `make_shapes`.
    """
    size = list(size) if isinstance(size, Sequence) else [size, size]
    if len(size) != 2:
        raise ValueError(f"size must be one or two lengths in pixels, not {size!r}")
    _check_scene(*size, objects, object_size, classes)
    for name, value in (("train", train), ("val", val), ("seed", seed)):
        if operator.index(value) < 0:
            raise ValueError(f"{name} must not be negative, but is {value}")
    return {
        "train": int(train),
        "val": int(val),
        "size": [int(side) for side in size],
        "seed": int(seed),
        "objects": [int(count) for count in objects],
        "object_size": [float(fraction) for fraction in object_size],
        "classes": list(classes),
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
    progress: bool = False,
    force: bool = False,
) -> Path:
    """Make a data set of drawn shapes in the layout of COCO 2017.

    The annotation file of a split is written after its images, so a split that has one is
    complete. Called again with the same parameters, the function adds what is missing, which for
    a complete set is nothing.

    Args:
        output_dir: folder of the data set; made if need be.
        train: number of images in train2017, 0 or more.
        val: number of images in val2017, 0 or more.
        size: (height, width) of the images in pixels, or one length for both.
        seed: 0 or more.
        objects: least and greatest number of objects in an image, see `draw_scene`.
        object_size: least and greatest object extent as a fraction of the shorter image side, see
            `draw_scene`. An object below 32 pixels is always "small" to COCO's evaluation.
        classes: names out of SHAPES; category ids count from 1 in this order.
        progress: show a progress bar on standard error, where that is a terminal.
        force: replace the set that this function made here before, whatever its parameters. Only
            the files of that set are removed.

    Returns:
        `output_dir` as a Path.

    Raises:
        ValueError: a parameter is out of range; nothing was written.
        TypeError: a parameter that must be an integer is none; nothing was written.
        FileExistsError: `output_dir` is a file, or holds something else, or holds a set made with
            other parameters and `force` is not given; nothing was changed.
        NotADirectoryError: a parent of `output_dir` is a file.
    """
    parameters = _checked_parameters(train, val, size, seed, objects, object_size, classes)
    root = Path(output_dir)
    record = {"generator": GENERATOR, "version": VERSION, "parameters": parameters}
    _claim_folder(root, record, force)
    for split in SPLITS:
        _make_split(root, split, record, progress)
    return root


def _count(record: dict, split: str) -> int:
    return record["parameters"][split.removesuffix("2017")]


def _annotation_path(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _image_path(root: Path, split: str, image_id: int) -> Path:
    return root / split / f"{image_id:012d}.jpg"


def _files(root: Path, record: dict) -> list[Path]:
    """All files of the data set of `record`, the annotation files first."""
    images = [_image_path(root, split, index + 1) for split in SPLITS for index in range(_count(record, split))]
    return [_annotation_path(root, split) for split in SPLITS] + images


def _claim_folder(root: Path, record: dict, force: bool) -> None:
    """Make sure that every file of the set in `root` is missing or belongs to this very set.

    Raises:
        FileExistsError, NotADirectoryError: as `make_shapes`.
    """
    root.mkdir(parents=True, exist_ok=True)
    if not any(root.iterdir()):
        _write(root / MARKER, _to_json(record))
        return
    previous = _read_record(root / MARKER)
    if previous is None:
        raise FileExistsError(f"{root} is not empty and holds no data set of drawn shapes; choose another folder")
    if not force:
        _refuse_other(root, previous, record)
        return
    own = _files(root, previous)
    foreign = [path for path in set(_files(root, record)) - set(own) if path.exists()]
    if foreign:
        raise FileExistsError(f"{min(foreign)} is no part of the data set in {root}; move it away first")
    # Annotations go first: without them no half-removed set looks complete.
    for path in own:
        path.unlink(missing_ok=True)
    _write(root / MARKER, _to_json(record))


def _refuse_other(root: Path, previous: dict, record: dict) -> None:
    """Raise FileExistsError if the set in `root` was not made with `record`."""
    if previous != record:
        old, new = ({"version": r["version"], **r["parameters"]} for r in (previous, record))
        changes = [f"{name} {old.get(name)} instead of {new[name]}" for name in new if old.get(name) != new[name]]
        raise FileExistsError(
            f"{root} holds a data set made with other parameters "
            f"({', '.join(changes)}); choose another folder, or force to "
            "replace it"
        )
    for split in SPLITS:
        path = _annotation_path(root, split)
        if path.exists() and _read_record(path) != record:
            raise FileExistsError(
                f"{path} is not the file that was made with this data set; "
                "choose another folder, or force to replace it"
            )


def _read_record(path: Path) -> dict | None:
    """The record in a marker or in the info of an annotation file, None if there is none."""
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
    return {key: info.get(key) for key in ("generator", "version", "parameters")}


def _make_split(root: Path, split: str, record: dict, progress: bool) -> None:
    """Add the images and the annotation file of a split as far as they are missing."""
    parameters = record["parameters"]
    height, width = parameters["size"]
    scene_options = {key: parameters[key] for key in ("objects", "object_size", "classes")}
    annotation_path = _annotation_path(root, split)
    annotated = annotation_path.exists()
    (root / split).mkdir(exist_ok=True)
    images, annotations = [], []
    for index in tqdm(range(_count(record, split)), desc=split, unit="image", disable=None if progress else True):
        image_path = _image_path(root, split, index + 1)
        written = image_path.exists()
        if written and annotated:
            continue
        # A stream of its own for every image, so that it does not depend on the images before.
        stream = np.random.SeedSequence(parameters["seed"], spawn_key=(SPLITS.index(split), index))
        image, objects = draw_scene(np.random.default_rng(stream), height, width, **scene_options)
        if not written:
            _write(image_path, _to_jpeg(image))
        images.append({"id": index + 1, "file_name": image_path.name, "height": height, "width": width})
        for item in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": item.class_index + 1,
                    "bbox": list(item.bbox),
                    "area": item.area,
                    "iscrowd": 0,
                    "segmentation": item.polygons,
                }
            )
    if not annotated:
        annotation_path.parent.mkdir(exist_ok=True)
        _write(
            annotation_path,
            _to_json(
                {
                    "info": {"description": f"Drawn shapes, {split}", **record},
                    "licenses": [],
                    "images": images,
                    "annotations": annotations,
                    "categories": [
                        {"id": index + 1, "name": name, "supercategory": "shape"}
                        for index, name in enumerate(parameters["classes"])
                    ],
                }
            ),
        )


def _to_jpeg(image: np.ndarray) -> bytes:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def _to_json(content: dict) -> bytes:
    return json.dumps(content).encode()


def _write(path: Path, content: bytes) -> None:
    """Write a file in one step. A set that a power cut damages can be made again."""
    write_atomically(path, lambda file: file.write(content), sync=False)


def build_parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {GENERATOR}",
        description="Make a detection data set of drawn shapes in the layout of COCO 2017.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        default=argparse.SUPPRESS,
        help="folder of the data set: new, empty, or a set made before with the "
        "same options, to which only missing files are added (required)",
    )
    parser.add_argument("--train", type=int, default=1000, metavar="N", help="number of training images")
    parser.add_argument("--val", type=int, default=200, metavar="N", help="number of validation images")
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        default=[192],
        metavar="PIXELS",
        help="image height and width in pixels; one value for both",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness, 0 or more")
    parser.add_argument(
        "--objects",
        type=int,
        nargs=2,
        default=[1, 5],
        metavar=("MIN", "MAX"),
        help=f"objects in an image, both ends included, 0 to {MAX_OBJECTS}",
    )
    parser.add_argument(
        "--object_size",
        type=float,
        nargs=2,
        default=[0.15, 0.5],
        metavar=("MIN", "MAX"),
        help="longer side of an object's box as a fraction of the shorter image "
        "side, above 0 and up to 1, drawn log-uniformly",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        default=list(SHAPES),
        choices=SHAPES,
        metavar="SHAPE",
        help=f"shapes to draw, in the order of their category ids, out of {', '.join(SHAPES)}",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace a set of drawn shapes made in the folder before; any other content is refused all the same",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 143 after SIGTERM, 130 after Ctrl-C: the same command goes on with what is missing then.

    Raises:
        SystemExit: 2, for a bad value or a folder that is refused.
    """
    parser = build_parser()
    args = parser.parse_args(arguments)
    return exit_status(parser.prog, lambda: run(parser, vars(args)))


def run(parser: argparse.ArgumentParser, options: dict) -> int:
    """Make the data set that the options describe, and say so."""
    if len(options["size"]) == 1:
        options["size"] *= 2
    parameters = {key: value for key, value in options.items() if key not in ("output_dir", "force")}
    # Checked on its own, so that no ValueError of the work itself is taken for a bad option.
    try:
        _checked_parameters(**parameters)
    except ValueError as error:
        parser.error(str(error))
    try:
        root = make_shapes(**options, progress=True)
    except (FileExistsError, NotADirectoryError) as error:
        parser.error(str(error))
    print(f"{options['train']} training and {options['val']} validation images in {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
