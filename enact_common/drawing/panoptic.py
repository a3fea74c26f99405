"""Drawing of a panoptic segmentation over its image: each segment tinted, outlined and named."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from enact_common.drawing.detections import as_array, as_picture, colour_of, draw_label, fit_labels, ink_on, overlaps

# Opacity of a segment's colour, and width of its outline as a fraction of the font's height.
TINT, OUTLINE = 0.5, 0.12

# Number of places to try for a name.
PLACES = 24


def draw_panoptic(
    pixels: Tensor | np.ndarray,
    id_map: Tensor | np.ndarray,
    segments: Sequence[dict],
    names: Sequence[str],
    enlarge: bool = True,
) -> np.ndarray:
    """Tint the segments of a copy of an image in their categories' colours, and write their names into them.

    Instances of a category share a colour and are separated by outlines. Names are placed where a segment is widest.
    Large segments choose first, and a name that would cover another is left out.

    Args:
        pixels: RGB uint8, a tensor (3, height, width) or an array (height, width, 3).
        id_map: int (height, width), each pixel's segment id; pixels outside all segments are not changed.
        segments: dicts with `id`, `category_id` and optionally `score`.
        names: names by label, which is the category id.
        enlarge: whether to repeat the pixels of a small image a whole number of times, to make room for text.

    Returns:
        RGB uint8 (height, width, 3), of the image's size or a whole multiple of it.

    Raises:
        ValueError: `pixels` has another shape or type, or the map has another size.
    """
    (image, factor), ids = as_picture(pixels, enlarge), as_array(id_map)
    if ids.shape != image.shape[:2]:
        raise ValueError(f"the map has {ids.shape} pixels, the image {image.shape[:2]}; pass a map of the image's size")
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
    """Return a free place, float64 (4,) xyxy, for a name around a segment's deepest pixel; None if there is none."""
    height, width = mask.shape
    # Pad, so that the picture's edge is an edge of the segment.
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
        # Pixels near by have no room either.
        depth[max(y - label_height // 2, 0) : y + label_height // 2 + 1,
              max(x - label_width // 2, 0) : x + label_width // 2 + 1] = 0  # fmt: skip
    return None
