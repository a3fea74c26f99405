"""The study's images, held on the device, and the drawing of shapes."""

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert

from enact_common.data.scenes import SceneObject, draw_scene
from enact_common.nested_tensor import NestedTensor
from enact_common.utils.pool import PARALLEL_FROM, mapped

TRAIN, VAL = "train", "val"

# An image, its original width, its objects and their labels.
DrawnImage = tuple[np.ndarray, int, list[SceneObject], list[int]]

# An image, uint8 (height, width, 3); the height and width that boxes are measured in; labels, from 0; boxes: left, top,
# width, height in pixels of these; areas in square pixels of these.
Row = tuple[np.ndarray, tuple[int, int], Sequence[int], Sequence[Sequence[float]], Sequence[float]]

SHAPES = ("circle", "triangle", "cross")

# Grey level of the dots of each class; spacing and radius of the dots in pixels.
DOTS = {"dark": 5, "light": 250}
DOT_SPACING, DOT_RADIUS = 7, 2


@dataclass(frozen=True)
class Shapes:
    """Settings of a data set of drawn images.

    Attributes:
        train, val: number of images.
        height: pixels.
        widths: pixels; each image's width is chosen from these at random, so that batches have padding.
        scale: size of the model's input relative to the drawn image, in which boxes are measured; 0.5 halves each side,
            as resizing does for photographs.
        objects: minimum and maximum number in an image.
        object_size: minimum and maximum extent as fractions of the height, log-uniform: many small, some large.
        name: name in results.
        dotted: source of an object's class. None: its shape. "some": random for each object; every second object shows
            it by dots. "one": the same for all objects; only the smallest object shows it by dots. "each": the same for
            all objects of a shape; only the smallest of each shape shows it by dots.
    """

    train: int
    val: int
    height: int
    widths: tuple[int, ...]
    scale: float
    objects: tuple[int, int] = (2, 6)
    object_size: tuple[float, float] = (0.1, 0.85)
    name: str = "shapes"
    dotted: str | None = None

    @property
    def classes(self) -> list[str]:
        """Class names."""
        return list(DOTS if self.dotted else SHAPES)


@dataclass
class Images:
    """One split of a data set.

    Attributes:
        pixels: uint8 (n, 3, H, W), padded with zeros at the right and the bottom; or a frozen backbone's features,
            float16 (n, channels, h, w).
        sizes: int64 (n, 2), each image's height and width in `pixels`, in pixels or cells, without padding.
        original: int64 (n, 2), height and width that boxes are measured in.
        labels: int64 (objects,) of each image, from 0.
        boxes: float (objects, 4) of each image, centre x, centre y, width, height as fractions of the image's sides.
        areas: float (objects,) of each image, in square pixels of the original, which set COCO's size of an object.
    """

    pixels: Tensor
    sizes: Tensor
    original: Tensor
    labels: list[Tensor]
    boxes: list[Tensor]
    areas: list[Tensor]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device) -> "Images":
        """Return a copy with all training data on a device."""
        boxes, labels = ([part.to(device) for part in parts] for parts in (self.boxes, self.labels))
        return Images(self.pixels.to(device), self.sizes, self.original, labels, boxes, self.areas, self.classes)

    def batch(self, indices: Tensor) -> tuple[NestedTensor, list[dict[str, Tensor]]]:
        """Return images by their indices, int64 (batch,) on the CPU, in the form that detectors and criteria take."""
        device = self.pixels.device
        height, width = self.pixels.shape[-2:]
        sizes = self.sizes[indices].to(device)
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        mask = (rows >= sizes[:, :1]).unsqueeze(2) | (columns >= sizes[:, 1:]).unsqueeze(1)  # (batch, H, W)
        targets = [{"labels": self.labels[i], "boxes": self.boxes[i]} for i in indices.tolist()]
        return NestedTensor(self.pixels[indices.to(device)], mask), targets

    def truth(self) -> COCO:
        """Return the ground truth for pycocotools. Image ids start at 0, category ids at 1."""
        annotations = []
        for i, (labels, boxes, areas) in enumerate(zip(self.labels, self.boxes, self.areas, strict=True)):
            height, width = self.original[i].tolist()
            corners = box_convert(boxes.cpu(), "cxcywh", "xywh") * torch.tensor([width, height, width, height])
            for label, box, area in zip(labels.tolist(), corners.tolist(), areas.tolist(), strict=True):
                ids = {"id": len(annotations) + 1, "image_id": i, "category_id": label + 1}
                annotations.append({**ids, "bbox": box, "area": area, "iscrowd": 0})
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(self.original.tolist())],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(self.classes)],
            "annotations": annotations,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def on_object(self, indices: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return two masks bool (batch, h, w) of a map's cells: centre in an object's box, and padding."""
        samples, targets = self.batch(indices)
        height, width = samples.mask.shape[1:]
        mask = F.interpolate(samples.mask.unsqueeze(1).float(), size=size).squeeze(1).bool().cpu()
        y = (torch.arange(size[0]) + 0.5) / size[0] * height
        x = (torch.arange(size[1]) + 0.5) / size[1] * width
        inside = torch.zeros(len(indices), *size, dtype=torch.bool)
        for i, target in zip(range(len(indices)), targets, strict=True):
            own = self.sizes[indices[i]].flip(0).repeat(2)  # width, height, width, height
            for left, top, right, bottom in (box_convert(target["boxes"].cpu(), "cxcywh", "xyxy") * own).tolist():
                inside[i] |= ((y >= top) & (y < bottom)).unsqueeze(1) & ((x >= left) & (x < right))
        return inside, mask


def collected(rows: Iterable[Row], count: int, height: int, width: int, classes: list[str]) -> Images:
    """Return a split of a data set, of `count` images; `height` and `width` are the largest image's, in pixels."""
    pixels = torch.zeros(count, 3, height, width, dtype=torch.uint8)
    images = Images(pixels, *torch.zeros(2, count, 2, dtype=torch.int64), [], [], [], classes)
    for i, (image, original, labels, boxes, areas) in enumerate(rows):
        own = image.shape[:2]
        pixels[i, :, : own[0], : own[1]] = torch.from_numpy(image).permute(2, 0, 1)
        images.sizes[i] = torch.tensor(own)
        images.original[i] = torch.tensor(original)
        sides = torch.tensor(original).flip(0).repeat(2)  # width, height, width, height
        corners = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
        images.labels.append(torch.tensor(labels, dtype=torch.int64))
        images.boxes.append(box_convert(corners, "xywh", "cxcywh") / sides)
        images.areas.append(torch.tensor(areas, dtype=torch.float32))
    return images


def draw_images(source: Shapes, part: str) -> Images:
    """Draw one split. Image i depends only on the split and i."""
    count = getattr(source, part)
    height, width = round(source.height * source.scale), round(max(source.widths) * source.scale)
    with mapped(partial(draw_one, source, part), range(count), count >= PARALLEL_FROM) as drawn:
        rows = (
            (image, (source.height, own), labels, [o.bbox for o in objects], [o.area for o in objects])
            for image, own, objects, labels in drawn
        )
        return collected(rows, count, height, width, source.classes)


def draw_one(source: Shapes, part: str, index: int) -> DrawnImage:
    """Draw an image and return it as the model sees it, uint8 (height, width, 3), with its original width, its objects
    and their labels, from 0."""
    rng = np.random.default_rng([(TRAIN, VAL).index(part), index])
    width = int(rng.choice(source.widths))
    image, objects = draw_scene(rng, source.height, width, source.objects, source.object_size, SHAPES)
    labels = [scene_object.class_index for scene_object in objects]
    if source.dotted and objects:
        labels = rng.integers(len(DOTS), size=len(objects)).tolist()
        bearers = rng.permutation(len(objects))[::2].tolist()
        if source.dotted in ("one", "each"):
            groups = [o.class_index * (source.dotted == "each") for o in objects]
            by_area = sorted(range(len(objects)), key=lambda i: objects[i].area, reverse=True)
            bearers = list({groups[i]: i for i in by_area}.values())
            labels = [labels[groups.index(group)] for group in groups]
        for bearer in bearers:
            add_dots(rng, image, objects[bearer], list(DOTS.values())[labels[bearer]])
    own = (round(width * source.scale), round(source.height * source.scale))
    return cv2.resize(image, own, interpolation=cv2.INTER_AREA), width, objects, labels


def add_dots(rng: np.random.Generator, image: np.ndarray, scene_object: SceneObject, level: int) -> None:
    """Draw dots of a grey level over the visible part of an object, into an image uint8 (height, width, 3)."""
    visible = np.zeros(image.shape[:2], np.uint8)
    for polygon in scene_object.polygons:
        cv2.fillPoly(visible, [np.rint(np.reshape(polygon, (-1, 2)) - 0.5).astype(np.int32)], 1)
    # Distance of each row and column from the nearest dot centre, on a grid with a random origin.
    y, x = ((np.arange(side) + rng.integers(DOT_SPACING)) % DOT_SPACING - DOT_SPACING // 2 for side in image.shape[:2])
    image[(visible > 0) & (y[:, None] ** 2 + x**2 <= DOT_RADIUS**2)] = level
