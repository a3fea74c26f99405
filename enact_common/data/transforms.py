"""DETR's augmentation and evaluation resize for images, boxes and masks.

Images are `tv_tensors.Image` uint8 (3, h, w). Targets are dicts with `boxes`, `tv_tensors.BoundingBoxes` (n, 4) xyxy
in pixels, `labels` int64 (n,) and optionally `masks`, `tv_tensors.Mask` bool (n, h, w). All randomness comes from
PyTorch's default generator.
"""

from functools import partial

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from enact_common.boxes import box_xyxy_to_cxcywh, boxes_of_masks

# The original augmentation assumes a largest training size of 800 pixels.
REFERENCE_SIZE = 800
SIZES_BEFORE_CROP = (400, 500, 600)
CROP_RANGE = (384, 600)
# The original does not limit the longer side before the crop: a strip of 10 x 5,000 pixels would become 600 x 300,000.
# Only images sixteen times as long as wide come near this limit.
LONGEST_BEFORE_CROP = 10_000


def resized_shape(height: int, width: int, size: int, max_size: int) -> tuple[int, int]:
    """The (height, width) with a shorter side of `size`, or less if the longer side would exceed `max_size`.

    Rounds like the original, because torchvision's rule can differ by a pixel and change evaluation. If the shorter
    side is rounded up, the longer side can exceed `max_size`. If the shorter side of a strip would round to 0, the
    result is 1 by `max_size`.
    """
    shorter, longer = sorted((height, width))
    if longer / shorter * size > max_size:
        size = round(max_size * shorter / longer)
        if size == 0:
            return (1, max_size) if height <= width else (max_size, 1)
    if height <= width:
        return size, max(int(size * width / height), 1)
    return max(int(size * height / width), 1), size


def random_index(count: int) -> int:
    """A random integer in 0..count - 1."""
    return int(torch.randint(count, ()))


def random_resize(
    image: tv_tensors.Image, target: dict, sizes: list[int], max_size: int
) -> tuple[tv_tensors.Image, dict]:
    """Resize the shorter side to one of several lengths in pixels, within a limit of the longer side."""
    size = sizes[random_index(len(sizes))]
    shape = list(resized_shape(*image.shape[-2:], size, max_size))
    target = {**target, "boxes": F.resize(target["boxes"], shape)}
    image = F.resize(image, shape, antialias=True)
    if "masks" not in target:
        return image, target
    # A mask of a few pixels can vanish in a smaller image.
    return image, drop_degenerate({**target, "masks": F.resize(target["masks"], shape)})


def random_crop(image: tv_tensors.Image, target: dict, min_size: int, max_size: int) -> tuple[tv_tensors.Image, dict]:
    """Crop to random sides in a range of pixels at a random place; a shorter side of the image is kept.

    Boxes are clipped to the crop; boxes outside it are dropped. With masks, boxes enclose the remaining part of each
    mask, since a crop may contain only one of two separate parts.
    """
    sides = []
    for length in image.shape[-2:]:
        low, high = min(min_size, length), min(max_size, length)
        sides.append(low + random_index(high - low + 1))
    (h, w), (height, width) = sides, image.shape[-2:]
    top, left = random_index(height - h + 1), random_index(width - w + 1)
    target = {**target, "boxes": F.crop(target["boxes"], top, left, h, w)}
    if "masks" in target:
        masks = F.crop(target["masks"], top, left, h, w)
        boxes = tv_tensors.wrap(boxes_of_masks(masks), like=target["boxes"])
        target = {**target, "masks": masks, "boxes": boxes}
    return F.crop(image, top, left, h, w), drop_degenerate(target)


def drop_degenerate(target: dict) -> dict:
    """Clip boxes to the image, and drop objects whose box has no area or whose mask is empty."""
    boxes = F.clamp_bounding_boxes(target["boxes"])
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    if "masks" in target:
        masks = target["masks"]
        keep &= masks.as_subclass(Tensor).flatten(1).any(dim=1)
        target = {**target, "masks": tv_tensors.wrap(masks[keep], like=masks)}
    return {**target, "boxes": tv_tensors.wrap(boxes[keep], like=boxes), "labels": target["labels"][keep]}


def to_model_input(image: tv_tensors.Image, target: dict) -> tuple[Tensor, dict]:
    """Convert to plain tensors: the image uint8 (3, h, w), boxes as cxcywh fractions of the image, float32 (n, 4).

    Adds `size`, the image's (height, width) in pixels, to the target. The model normalises (`PixelNormalization`).
    """
    height, width = image.shape[-2:]
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = box_xyxy_to_cxcywh(target["boxes"].as_subclass(Tensor).float()) / scale
    target = {**target, "boxes": boxes, "size": torch.tensor([height, width])}
    if "masks" in target:
        target["masks"] = target["masks"].as_subclass(Tensor)
    return image.as_subclass(Tensor), target


def train_transforms(sizes: list[int], max_size: int) -> v2.Compose:
    """DETR's augmentation: a random flip, then for half of the images a resize and crop, then a resize.

    Args:
        sizes: lengths of the shorter side to choose from, in pixels. The crop's sizes scale with the largest (800 in
            the original, which crops 384 to 600 pixels out of a resize to 400, 500 or 600).
        max_size: limit of the longer side in pixels.
    """
    ratio = max(sizes) / REFERENCE_SIZE
    low, high, longest = (max(round(side * ratio), 1) for side in (*CROP_RANGE, LONGEST_BEFORE_CROP))
    before_crop = [max(round(side * ratio), 1) for side in SIZES_BEFORE_CROP]
    enlarge = partial(random_resize, sizes=before_crop, max_size=longest)
    crop = partial(random_crop, min_size=low, max_size=high)
    resize = partial(random_resize, sizes=sizes, max_size=max_size)
    return v2.Compose(
        [v2.RandomHorizontalFlip(), v2.RandomChoice([resize, v2.Compose([enlarge, crop, resize])]), to_model_input]
    )


def eval_transforms(size: int, max_size: int) -> v2.Compose:
    """The evaluation resize: the shorter side to `size` pixels, the longer to at most `max_size` pixels."""
    return v2.Compose([partial(random_resize, sizes=[size], max_size=max_size), to_model_input])
