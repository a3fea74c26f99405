"""Objects' masks in COCO's format: polygons or run-length codes, checked, packed and decoded."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from enact_common.errors import UserError

# A polygon has three corners, two numbers each. Of four numbers, pycocotools would make a box.
FEWEST_NUMBERS = 6

WAYS_OUT = "take annotations that have masks, or leave --masks out"


def check_segmentations(images: Iterable[dict], annotations: Iterable[dict], source: Path) -> None:
    """Refuse annotations that masks cannot be learned from or evaluated on.

    Args:
        images: their entries: the size must be stated, since evaluation draws the masks without the image.
        annotations: of the file. Those of other images are passed over.
        source: the file, for the message.

    Raises:
        UserError: naming the file and the first entry at fault.
    """
    sizes = {}
    for image in images:
        size = [image.get("height"), image.get("width")]
        if not all(isinstance(side, int) and side > 0 for side in size):
            raise UserError(
                f"{source}: image {image['id']} lacks its height and width in pixels, which --masks needs; state "
                "them, or leave --masks out"
            )
        sizes[image["id"]] = size
    for annotation in annotations:
        if annotation["image_id"] not in sizes:
            continue
        fault = fault_of(annotation.get("segmentation"), sizes[annotation["image_id"]])
        if fault:
            raise UserError(
                f"{source}: annotation {annotation['id']} of image {annotation['image_id']}, counted from 1, {fault}; "
                f"{WAYS_OUT}"
            )


def fault_of(segmentation: Any, size: list[int]) -> str | None:
    """What is wrong with a segmentation of an image of this (height, width), in words; None for nothing."""
    if not segmentation:
        return "has no segmentation, and --masks needs one of each object"
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if segmentation.get("size") != size:
            return f"has a run-length code of size {segmentation.get('size')}, its image is {size} (height, width)"
        if isinstance(counts, str):
            return None if counts else "has an empty run-length code"
        if not isinstance(counts, list) or not all(isinstance(run, int) and run >= 0 for run in counts):
            return "has a segmentation whose counts are neither a text nor whole numbers"
        return None if sum(counts) == size[0] * size[1] else "has a run-length code that does not cover its image"
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        return "has a segmentation that is neither a list of polygons nor a run-length code"
    for polygon in segmentation:
        if len(polygon) < FEWEST_NUMBERS or len(polygon) % 2:
            return f"has a polygon of {len(polygon)} numbers: expected x, y of three corners or more"
        if not all(isinstance(number, int | float) and abs(number) < 2**31 for number in polygon):
            return "has a polygon with something else than finite numbers"
    return None


class PackedMasks:
    """The segmentations of many objects in one piece of memory, which worker processes share.

    Args:
        segmentations: polygons, lists of x, y, x, y, ... in pixels, or run-length codes; as `check_segmentations` lets
            them pass.
    """

    def __init__(self, segmentations: Iterable[list | dict]):
        # As text: polygons and codes alike, and parsed in a fraction of the time that decoding an image takes.
        texts = [json.dumps(segmentation, separators=(",", ":")).encode() for segmentation in segmentations]
        self._ends = torch.tensor([0, *map(len, texts)]).cumsum(0)
        self._text = torch.frombuffer(bytearray(b"".join(texts) or b"\0"), dtype=torch.uint8)

    def decode(self, objects: slice, height: int, width: int, image: str) -> Tensor:
        """The masks of some objects of one image of this size: bool (n, height, width).

        Args:
            objects: from which to which.
            height, width: of the image, in pixels.
            image: its name, for the message.

        Raises:
            UserError: a run-length code is damaged, or of another size than the image.
        """
        masks = torch.zeros(objects.stop - objects.start, height, width, dtype=torch.bool)
        for mask, number in zip(masks, range(objects.start, objects.stop), strict=True):
            segmentation = json.loads(self._text[self._ends[number] : self._ends[number + 1]].numpy().tobytes())
            mask.copy_(torch.from_numpy(decode_mask(segmentation, height, width, image)))
        return masks


def decode_mask(segmentation: list | dict, height: int, width: int, image: str) -> np.ndarray:
    """A segmentation as uint8 (height, width), 0 or 1.

    Raises:
        UserError: as `PackedMasks.decode`.
    """
    if isinstance(segmentation, list):
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
    code = segmentation
    if isinstance(code["counts"], list):
        code = coco_mask.frPyObjects(code, *code["size"])
    try:
        mask = coco_mask.decode({"size": code["size"], "counts": code["counts"]})
    except ValueError as error:
        raise UserError(f"{image}: an object's run-length code is damaged ({error}); {WAYS_OUT}") from error
    if mask.shape != (height, width):
        raise UserError(
            f"{image}: is {height} x {width} pixels (height, width), an object's run-length code "
            f"{mask.shape[0]} x {mask.shape[1]}; {WAYS_OUT}"
        )
    return mask
