"""The study's photographs: a data set in COCO's layout, or its objects pasted into its photographs.

Pasting follows Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation", CVPR
2021, and makes thousands of training images out of a few hundred photographs.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import cv2
import numpy as np
from torchvision.transforms.v2 import functional as transforms

from enact_common.data.annotations import load_annotations
from enact_common.data.images import decode_image
from enact_common.data.masks import decode_mask
from enact_common.study.images import TRAIN, VAL, Images, Row, collected
from enact_common.utils.errors import UserError
from enact_common.utils.pool import PARALLEL_FROM, mapped

# Number of classes without a cue: the most frequent categories.
MOST_FREQUENT = 10

# COCO's supercategories whose objects show their own class, and the one whose objects show no class.
CUES, NEUTRAL = ("animal", "vehicle"), "person"

# Number of photographs of each split that are read, so that all of COCO does not fill the memory.
MOST_PHOTOGRAPHS = 1000

# Shortest longer and shorter side of an object that is cut out, in pixels.
LEAST_SIDES = (64, 24)

# Least part of a photograph's sides that a background shows; number of places to try for an object.
LEAST_CROP, PLACES = 0.6, 20


@dataclass(frozen=True)
class Photographs:
    """A data set in COCO's layout.

    Attributes:
        folder: contains `train2017/`, `val2017/` and `annotations/`.
        height, width: pixels; every image is resized to fit into these.
    """

    name: str
    folder: str
    height: int
    width: int


@dataclass(frozen=True)
class Pasted:
    """Photographs with objects pasted into them, both from a data set in COCO's layout with masks.

    Backgrounds contain no objects of the kinds that are pasted. Each split is made from the photographs of its own
    split.

    Attributes:
        name, folder, height, width: as in `Photographs`.
        train, val: number of images.
        objects: minimum and maximum number in an image.
        object_size: minimum and maximum of an object's longer side as fractions of the height, log-uniform.
        cue: source of an object's class. None: its category. "some": every second object is an animal or a vehicle,
            which is its class; the others are people, whose class is random. "one": all objects have the same class,
            that of the smallest object, an animal or a vehicle; the others are people.
    """

    name: str
    folder: str
    height: int
    width: int
    train: int
    val: int
    objects: tuple[int, int]
    object_size: tuple[float, float]
    cue: str | None


@dataclass(frozen=True)
class Cutout:
    """An object cut out of a photograph.

    Attributes:
        pixels: uint8 (h, w, 3), RGB, its bounding box.
        mask: float32 (h, w), 1 on the object and 0 elsewhere.
    """

    pixels: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Material:
    """Parts that images are pasted together from.

    Attributes:
        backgrounds: photographs, uint8 (h, w, 3), RGB.
        cutouts: objects by kind.
    """

    backgrounds: list[np.ndarray]
    cutouts: Mapping[str, list[Cutout]]
    classes: list[str]


def annotation_file(folder: str, part: str) -> Path:
    """Return the path of a split's annotations."""
    return Path(folder) / "annotations" / f"instances_{part}2017.json"


def image_file(folder: str, part: str, image: Mapping) -> Path:
    """Return the path of an image by its entry in the annotations."""
    return Path(folder) / f"{part}2017" / image["file_name"]


def read_photographs(source: Photographs, part: str) -> Images:
    """Read one split without crowds; refuse one that is missing, or has no objects."""
    path = annotation_file(source.folder, part)
    content = load_annotations(path)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    label = {category["id"]: i for i, category in enumerate(categories)}
    by_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        if not annotation.get("iscrowd") and w > 0 and h > 0:
            by_image[annotation["image_id"]].append(annotation)
    if not any(by_image.values()):
        raise UserError(f"{path}: has no objects (crowds do not count); pass another data set")

    def row(image: dict) -> Row:
        whole = decode_image(image_file(source.folder, part, image))
        scale = min(source.height / whole.shape[1], source.width / whole.shape[2])
        own = [max(round(side * scale), 1) for side in whole.shape[1:]]
        small = transforms.resize(whole, own, antialias=True).permute(1, 2, 0).numpy()
        objects = by_image[image["id"]]
        labels, boxes, areas = ([a[key] for a in objects] for key in ("category_id", "bbox", "area"))
        return small, tuple(whole.shape[1:]), [label[number] for number in labels], boxes, areas

    names = [category["name"] for category in categories]
    return collected(map(row, content["images"]), len(content["images"]), source.height, source.width, names)


def can_be_cut_out(annotation: Mapping) -> bool:
    """Return whether an object has a mask and is large enough to be cut out."""
    shorter, longer = sorted(annotation["bbox"][2:])
    masked = annotation.get("segmentation") and not annotation["iscrowd"]
    return bool(masked) and longer >= LEAST_SIDES[0] and shorter >= LEAST_SIDES[1]


@lru_cache(maxsize=1)
def read_material(source: Pasted, part: str) -> Material:
    """Read the first `MOST_PHOTOGRAPHS` photographs of a split and cut out their objects.

    Raises:
        UserError: there are no objects of a kind, or no photographs without all kinds.
    """
    key = "supercategory" if source.cue else "name"

    def read(split: str) -> tuple[Path, dict, dict[int, str]]:
        path = annotation_file(source.folder, split)
        content = load_annotations(path)
        return path, content, {category["id"]: str(category.get(key)) for category in content["categories"]}

    if source.cue:
        kinds = [*CUES, NEUTRAL]
    else:
        _, content, kind_of = read(TRAIN)
        counts = Counter(kind_of[a["category_id"]] for a in content["annotations"] if can_be_cut_out(a))
        kinds = [kind for kind, _ in counts.most_common(MOST_FREQUENT)]
    path, content, kind_of = read(part)
    by_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        if kind_of[annotation["category_id"]] in kinds:
            by_image[annotation["image_id"]].append(annotation)
    backgrounds: list[np.ndarray] = []
    cutouts: dict[str, list[Cutout]] = {kind: [] for kind in kinds}
    for entry in content["images"][:MOST_PHOTOGRAPHS]:
        image = decode_image(image_file(source.folder, part, entry)).permute(1, 2, 0).numpy()  # (height, width, 3)
        if not by_image[entry["id"]]:
            backgrounds.append(image)
        for annotation in filter(can_be_cut_out, by_image[entry["id"]]):
            mask = decode_mask(annotation["segmentation"], *image.shape[:2], entry["file_name"])
            x, y, w, h = cv2.boundingRect(mask)
            if min(w, h):
                box = slice(y, y + h), slice(x, x + w)
                # Copies, so that the photographs are not kept in memory.
                cutout = Cutout(image[box].copy(), mask[box].astype(np.float32))
                cutouts[kind_of[annotation["category_id"]]].append(cutout)
    missing = next((kind for kind, made in cutouts.items() if not made), None)
    if missing or not backgrounds:
        lacking = f"objects of the kind {missing}" if missing else f"photographs without {', '.join(kinds)}"
        raise UserError(f"{path}: has no {lacking}, which pasting needs; pass COCO, or a part of it")
    return Material(backgrounds, cutouts, list(CUES) if source.cue else kinds)


def paste_images(source: Pasted, part: str) -> Images:
    """Make one split. Image i depends only on the data set, the split and i."""
    count = getattr(source, part)
    with mapped(partial(paste_one, source, part), range(count), count >= PARALLEL_FROM) as rows:
        return collected(rows, count, source.height, source.width, read_material(source, part).classes)


def paste_one(source: Pasted, part: str, index: int) -> Row:
    """Make one image."""
    rng = np.random.default_rng([(TRAIN, VAL).index(part), index])
    material = read_material(source, part)
    image = crop(rng, material.backgrounds[rng.integers(len(material.backgrounds))], source.height, source.width)
    count = int(rng.integers(*source.objects, endpoint=True))
    labels = rng.integers(len(material.classes), size=count)
    telling = set(range(count))  # the objects that show their class
    if source.cue == "some":
        telling = set(rng.permutation(count)[::2].tolist())
    elif source.cue == "one":
        labels[:] = labels[-1]
        telling = {count - 1}
    # Paste the largest first: it could hide others.
    sides = np.sort(np.exp(rng.uniform(*np.log(source.object_size), size=count)))[::-1] * source.height
    owner = np.zeros(image.shape[:2], np.int64)  # 1 + number of the object that a pixel shows, 0 for the background
    for number, (label, side) in enumerate(zip(labels, sides, strict=True)):
        choice = material.cutouts[material.classes[label] if number in telling else NEUTRAL]
        paste(rng, image, owner, choice[rng.integers(len(choice))], side, number + 1)
    visible = [number for number in range(count) if (owner == number + 1).any()]
    masks = [(owner == number + 1).astype(np.uint8) for number in visible]
    boxes = [cv2.boundingRect(mask) for mask in masks]
    return image, image.shape[:2], labels[visible].tolist(), boxes, [int(mask.sum()) for mask in masks]


def crop(rng: np.random.Generator, photograph: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a random part of a photograph, mirrored at random: uint8 (height, width, 3)."""
    scale = min(photograph.shape[0] / height, photograph.shape[1] / width) * rng.uniform(LEAST_CROP, 1)
    own = [max(math.floor(side * scale), 1) for side in (height, width)]
    top, left = (int(rng.integers(side - part + 1)) for side, part in zip(photograph.shape[:2], own, strict=True))
    part = photograph[top : top + own[0], left : left + own[1]]
    if rng.integers(2):
        part = part[:, ::-1]
    return resized(np.ascontiguousarray(part), height, width)


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return an image or a mask of another size, without aliasing."""
    method = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=method)


def paste(
    rng: np.random.Generator, image: np.ndarray, owner: np.ndarray, cutout: Cutout, side: float, number: int
) -> None:
    """Paste an object into an image, mirrored at random, where the most hidden earlier object keeps most.

    That is the best of `PLACES` places. `image` uint8 (height, width, 3) and `owner` int64 (height, width), the number
    of the object that a pixel shows, 0 for none, are changed in place. `side` is the object's longer side in pixels.
    """
    scale = min(side / max(cutout.mask.shape), *(a / b for a, b in zip(owner.shape, cutout.mask.shape, strict=True)))
    h, w = (max(math.floor(old * scale), 1) for old in cutout.mask.shape)
    pixels, mask = (resized(part, h, w) for part in (cutout.pixels, cutout.mask))
    if rng.integers(2):
        pixels, mask = pixels[:, ::-1], mask[:, ::-1]
    shown = mask > 0.5
    before = np.bincount(owner.ravel(), minlength=number + 1)[1:]
    least_kept, box = -1.0, (slice(h), slice(w))
    for _ in range(PLACES):
        top, left = (int(rng.integers(a - b + 1)) for a, b in zip(owner.shape, (h, w), strict=True))
        place = slice(top, top + h), slice(left, left + w)
        hidden = np.bincount(owner[place][shown], minlength=number + 1)[1:]
        kept = float((1 - hidden / np.maximum(before, 1)).min())
        if kept > least_kept:
            least_kept, box = kept, place
    alpha = mask[..., None]
    image[box] = np.rint(alpha * pixels + (1 - alpha) * image[box]).astype(np.uint8)
    owner[box][shown] = number
