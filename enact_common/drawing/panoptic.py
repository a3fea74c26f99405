"""A panoptic segmentation drawn over its image: every segment tinted, outlined and named."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from enact_common.drawing.detections import as_array, colour_of, draw_label, enlargement, fit_labels, ink_on, overlaps

# How much of a segment's colour its pixels get, and how wide its outline is, as a part of the font's height.
TINT, OUTLINE = 0.5, 0.12

# How many places are tried for a name.
PLACES = 24


def draw_panoptic(
    pixels: Tensor | np.ndarray,
    id_map: Tensor | np.ndarray,
    segments: Sequence[dict],
    names: Sequence[str],
    enlarge: bool = True,
) -> np.ndarray:
    """Tint the segments of a copy of an image in their categories' colours, and write their names into them.

    Instances of a category have the same colour, and an outline that keeps them apart. Names stand where a segment is
    widest; large segments choose first, and a name that would cover another is left out.

    Args:
        pixels: RGB uint8, a tensor (3, height, width) or an array (height, width, 3).
        id_map: int (height, width), each pixel's segment; what is no segment stays as it is.
        segments: dicts with `id` and `category_id`, and a `score` where there is one.
        names: by label, which is the category id.
        enlarge: repeat the pixels of a small image, a whole number of times, so that the text has room.

    Returns:
        RGB uint8 (height, width, 3), of the image's size, or a whole multiple of it.

    Raises:
        ValueError: `pixels` is no such image, or the map is of another size.
    """
    image = as_array(pixels).transpose(1, 2, 0) if isinstance(pixels, Tensor) else pixels
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"expected RGB uint8, (height, width, 3) or a tensor (3, height, width), got {pixels.shape}")
    ids = as_array(id_map)
    if ids.shape != image.shape[:2]:
        raise ValueError(f"the map has {ids.shape} pixels, the image {image.shape[:2]}")
    factor = enlargement(*image.shape[:2]) if enlarge else 1
    image, ids = (array.repeat(factor, axis=0).repeat(factor, axis=1) for array in (image, ids))
    height, width = ids.shape
    masks = [ids == segment["id"] for segment in segments]
    order = sorted((i for i, mask in enumerate(masks) if mask.any()), key=lambda i: -np.count_nonzero(masks[i]))
    masks, segments = [masks[i] for i in order], [segments[i] for i in order]
    categories = [int(segment["category_id"]) for segment in segments]
    texts = [
        (names[category], f"{segment['score']:.2f}" if "score" in segment else "")
        for segment, category in zip(segments, categories, strict=True)
    ]
    labels, size = fit_labels(texts, categories, width, height)

    tinted = image.astype(np.float32)
    for mask, category in zip(masks, categories, strict=True):
        tinted[mask] += TINT * (np.array(colour_of(category), dtype=np.float32) - tinted[mask])
    canvas = tinted.round().astype(np.uint8)
    reach = max(round(size * OUTLINE), 1)
    for mask, category in zip(masks, categories, strict=True):
        inner = cv2.erode(mask.astype(np.uint8), np.ones((2 * reach + 1,) * 2, np.uint8)) > 0
        edge = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) == 0
        canvas[mask & ~inner] = colour_of(category)
        canvas[mask & edge] = ink_on(colour_of(category))

    picture = Image.fromarray(canvas)
    draw, taken = ImageDraw.Draw(picture), np.zeros((0, 4))
    for mask, category, label in zip(masks, categories, labels, strict=True):
        place = None if label is None else free_place(mask, label.width, label.height, taken)
        if place is not None:
            taken = np.concatenate((taken, place[None]))
            draw_label(draw, place, label, colour_of(category))
    return np.array(picture)


def free_place(mask: np.ndarray, label_width: int, label_height: int, taken: np.ndarray) -> np.ndarray | None:
    """Where a segment's name can stand: around the deepest of its pixels, and over no other name.

    Args:
        mask: bool (height, width), with a pixel.
        label_width, label_height: in pixels.
        taken: (n, 4) xyxy, where names stand.

    Returns:
        float64 (4,) xyxy inside the picture; None where no place that was tried is free.
    """
    height, width = mask.shape
    # A border, so that the picture's edge is one of the segment's.
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    for _ in range(PLACES):
        deepest = np.argwhere(depth == depth.max())
        y, x = deepest[len(deepest) // 2]
        if depth[y, x] <= 0:
            return None
        left = np.clip(x - label_width // 2, 0, width - label_width)
        top = np.clip(y - label_height // 2, 0, height - label_height)
        place = np.array([left, top, left + label_width, top + label_height], dtype=np.float64)
        if overlaps(place[None], taken).sum() == 0:
            return place
        # Nor is there room near by.
        depth[max(y - label_height // 2, 0) : y + label_height // 2 + 1,
              max(x - label_width // 2, 0) : x + label_width // 2 + 1] = 0  # fmt: skip
    return None
