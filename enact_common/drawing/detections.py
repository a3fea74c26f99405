"""Drawing of boxes, masks, class names and scores into an image, legible at any image size. Needs only Pillow.

`torchvision.utils.draw_bounding_boxes` also draws by Pillow, but puts every name at the box's upper left corner, even
over other names or beyond the picture's edge.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from enact_common.drawing.fonts import FONT_MIN, FONT_OF_AREA, FONT_OF_SHORTER, open_font, readable_name

logger = logging.getLogger("enact")

Colour = tuple[int, int, int]

# Okabe and Ito's palette, which colour-blind readers can tell apart, without black, which is common in images.
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
# For more labels, each next round of the palette is mixed with this fraction of white (above 0) or black (below).
SHADES = (0.0, 0.5, -0.4)

# Pictures are enlarged to at least this longer side, width and height in pixels, but not beyond LARGE.
SMALL_LONGER, SMALL_WIDTH, SMALL_HEIGHT, LARGE = 480, 120, 48, 16384
# Labels shrink, to at least FONT_CROWDED of their size, if they would cover more than CROWDED of the picture.
CROWDED, FONT_CROWDED = 0.15, 0.75

# Opacity of a mask's colour over its object.
FILM = 0.4

# Costs of a label's place: per fraction of the label over other labels, over other boxes, and per fraction of its own
# box that it hides. Each next candidate costs a little more, so the first free one wins.
OVER_LABEL, OVER_BOX, OVER_OWN, NEXT_PLACE = 100.0, 0.25, 1.0, 0.02


@dataclass
class Label:
    """The text at a box.

    Attributes:
        text: one line.
        font: a font that has all characters of the text.
        width, height: size in pixels, including the background.
    """

    text: str
    font: ImageFont.FreeTypeFont
    width: int
    height: int


def draw_detections(
    pixels: Tensor | np.ndarray,
    boxes: Tensor | np.ndarray | Sequence[Sequence[float]],
    names: Sequence[str],
    scores: Tensor | np.ndarray | Sequence[float] | None,
    labels: Tensor | np.ndarray | Sequence[int],
    enlarge: bool = True,
    masks: Tensor | np.ndarray | None = None,
) -> np.ndarray:
    """Draw boxes with their names and scores into a copy of an image.

    Boxes with higher scores are drawn over those with lower ones, and labels over all boxes. Labels stay inside the
    picture and avoid each other if there is room. A label too large for the picture is left out. Line width and text
    size grow with the picture.

    Args:
        pixels: RGB uint8, a tensor (3, height, width) or an array (height, width, 3).
        boxes: (n, 4), left, top, right, bottom in pixels of the image.
        names: class name of each box.
        scores: score of each box; None, e.g. for annotations, draws no scores, and small boxes over large ones.
        labels: label of each box, from 0, which sets its colour.
        enlarge: whether to repeat the pixels of a small image a whole number of times, to make room for text.
        masks: bool (n, height, width), the mask of each box, drawn as a film with an outline; None for none.

    Returns:
        RGB uint8 (height, width, 3), of the image's size or a whole multiple of it.

    Raises:
        ValueError: `pixels` has another shape or type, or the lengths differ.
    """
    image, factor = as_picture(pixels, enlarge)
    canvas = Image.fromarray(np.ascontiguousarray(image.repeat(factor, axis=0).repeat(factor, axis=1)))
    width, height = canvas.size
    corners = as_array(boxes).astype(np.float64).reshape(-1, 4) * factor
    corners = corners.clip(0, [width, height, width, height])
    numbers = as_array(labels).astype(np.int64).tolist()
    if scores is None:
        # Without scores, draw small boxes last.
        rank = -(corners[:, 2:] - corners[:, :2]).prod(axis=1)
        texts = [(name, "") for name in names]
    else:
        rank = as_array(scores).astype(np.float64)
        texts = [(name, f"{score:.2f}") for name, score in zip(names, rank, strict=True)]
    if not len(corners) == len(texts) == len(numbers):
        raise ValueError(f"need as many names and labels as boxes: got {len(texts)}, {len(numbers)} and {len(corners)}")

    order = np.argsort(-rank, kind="stable")
    corners, numbers, texts = corners[order], [numbers[i] for i in order], [texts[i] for i in order]
    fitted_labels, size = fit_labels(texts, numbers, width, height)
    places = place_labels(corners, fitted_labels, width, height)
    if masks is not None:
        masked_pixels = np.array(canvas)
        for i in reversed(order.tolist()):
            mask = as_array(masks[i]).repeat(factor, axis=0).repeat(factor, axis=1)
            draw_mask(masked_pixels, mask, colour_of(int(as_array(labels)[i])), max(round(size / 10), 1))
        canvas = Image.fromarray(masked_pixels)
    draw = ImageDraw.Draw(canvas)
    for box, number in reversed(list(zip(corners, numbers, strict=True))):
        draw_box(draw, box, colour_of(number), max(round(size / 5), 2))
    for place, label, number in reversed(list(zip(places, fitted_labels, numbers, strict=True))):
        if label is not None:
            draw_label(draw, place, label, colour_of(number))
    return np.array(canvas)


def as_array(values: Tensor | np.ndarray | Sequence) -> np.ndarray:
    """Return a tensor on any device, an array or a sequence as an array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def as_picture(pixels: Tensor | np.ndarray, enlarge: bool) -> tuple[np.ndarray, int]:
    """Return an image as RGB uint8 (height, width, 3), and its `enlargement`, 1 unless `enlarge`.

    Raises:
        ValueError: the image has another shape or type.
    """
    image = as_array(pixels).transpose(1, 2, 0) if isinstance(pixels, Tensor) else pixels
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"expected RGB uint8, (height, width, 3) or a tensor (3, height, width), got {pixels.shape}")
    return image, enlargement(*image.shape[:2]) if enlarge else 1


def enlargement(height: int, width: int) -> int:
    """Return how often to repeat each pixel of an image in both directions to make room for labels."""
    longer = max(height, width)
    wanted = max(SMALL_LONGER / longer, SMALL_WIDTH / width, SMALL_HEIGHT / height)
    return max(min(math.ceil(wanted), LARGE // longer), 1)


def colour_of(label: int) -> Colour:
    """Return the colour of a label; the first 21 labels have different ones."""
    shade = SHADES[label // len(PALETTE) % len(SHADES)]
    towards = 255 if shade > 0 else 0
    red, green, blue = (round(part + (towards - part) * abs(shade)) for part in PALETTE[label % len(PALETTE)])
    return red, green, blue


def ink_on(colour: Colour) -> Colour:
    """Return black or white, whichever contrasts more with a colour (relative luminance, WCAG 2.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 0.05 * 1.05 else (255, 255, 255)


def fit_labels(
    texts: Sequence[tuple[str, str]], numbers: Sequence[int], width: int, height: int
) -> tuple[list[Label | None], int]:
    """Return labels that fit into a picture, smaller if there are many, and the font's height in pixels.

    Args:
        texts: name and score of each label; the result has None for a label that does not fit.
        numbers: class of each label, for names that no font can draw.
        width, height: size of the picture in pixels.
    """
    size = max(min(FONT_OF_AREA * math.sqrt(width * height), FONT_OF_SHORTER * min(width, height)), FONT_MIN)
    readable = [(*readable_name(name, number), score) for (name, score), number in zip(texts, numbers, strict=True)]
    labels = [fit_label(*text, round(size), width, height) for text in readable]
    area = sum(label.width * label.height for label in labels if label is not None)
    crowded = area / (CROWDED * width * height)
    if crowded > 1:
        size *= max(crowded**-0.5, FONT_CROWDED)
        labels = [fit_label(*text, round(size), width, height) for text in readable]
    return labels, round(size)


def fit_label(name: str, source: str, score: str, size: int, width: int, height: int) -> Label | None:
    """Return the longest form of a label that fits into a picture: the name is cut first, then left out; else None."""
    font = open_font(source, size)
    margin = max(round(size * 0.3), 3)
    tall = sum(font.getmetrics()) + margin
    shorter = (f"{name[:end].rstrip()}..." for end in range(len(name) - 1, 0, -1))
    for text in (name, *shorter, ""):
        text = f"{text}  {score}".strip()
        wide = math.ceil(font.getlength(text)) + 2 * margin
        if text and wide <= width and tall <= height:
            return Label(text, font, wide, tall)
    return None


def place_labels(boxes: np.ndarray, labels: Sequence[Label | None], width: int, height: int) -> np.ndarray:
    """Return the place of each label, float64 (n, 4) xyxy in pixels: at its box, inside the picture, hiding little.

    Earlier labels choose first. The place of a missing label is undefined.
    """
    places = np.zeros((len(boxes), 4))
    taken = np.zeros((0, 4))
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        if label is None:
            continue
        (left, top, right, bottom), (w, h) = box, (label.width, label.height)
        # Above, below, then inside the box from the top, each at the left, right and middle. Last, next to the box.
        rows = [top - h, bottom, top, bottom - h, *(top + h * step for step in range(1, 5) if top + h * step < bottom)]
        columns = (left, right - w, (left + right - w) / 2)
        options = np.array([(x, y) for y in rows for x in columns] + [(x, y) for y in rows for x in (right, left - w)])
        options = options.clip(0, [width - w, height - h]).round()
        options = np.concatenate((options, options + [w, h]), axis=1)  # (places, 4) xyxy
        area, own_area = w * h, max((right - left) * (bottom - top), 1)
        own = overlaps(options, box[None])[:, 0]
        cost = OVER_LABEL * overlaps(options, taken).sum(axis=1) / area
        cost += OVER_BOX * (overlaps(options, boxes).sum(axis=1) - own) / area
        cost += OVER_OWN * own / own_area + NEXT_PLACE * np.arange(len(options))
        places[i] = options[cost.argmin()]
        taken = np.concatenate((taken, places[i : i + 1]))
    return places


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the intersection areas of boxes (n, 4) and (m, 4), xyxy: (n, m), in square pixels."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return (high - low).clip(min=0).prod(axis=-1)


def draw_box(draw: ImageDraw.ImageDraw, box: np.ndarray, colour: Colour, line: int) -> None:
    """Draw a box's outline, (4,) xyxy, between two thin lines that set it off from an image of the same colour."""
    left, top = np.floor(box[:2]).astype(int).tolist()
    right, bottom = (np.ceil(box[2:]).astype(int) - 1).tolist()
    right, bottom = max(left, right), max(top, bottom)
    # A line may not fill the box that it surrounds.
    line = max(min(line, (min(right - left, bottom - top) + 1) // 4), 1)
    edge = max(line // 4, 1)
    outside = (left - edge, top - edge, right + edge, bottom + edge)
    draw.rectangle(outside, outline=ink_on(colour), width=line + 2 * edge)
    draw.rectangle((left, top, right, bottom), outline=colour, width=line)


def draw_mask(picture: np.ndarray, mask: np.ndarray, colour: Colour, line: int) -> None:
    """Draw a translucent film over an object's pixels, in place, with an outline along their inside."""
    inside = mask
    for _ in range(line):
        # Keep pixels with all four neighbours; edge padding avoids an outline at the picture's edge.
        padded = np.pad(inside, 1, mode="edge")
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    picture[inside] = (picture[inside] * (1 - FILM) + np.array(colour) * FILM).round().astype(np.uint8)
    picture[mask & ~inside] = colour


def draw_label(draw: ImageDraw.ImageDraw, place: np.ndarray, label: Label, colour: Colour) -> None:
    """Draw a label at (4,) xyxy on its box's colour, with an edge that separates it from its neighbours."""
    left, top, right, bottom = place.astype(int).tolist()
    ink = ink_on(colour)
    draw.rectangle((left, top, right - 1, bottom - 1), fill=colour, outline=ink)
    draw.text(((left + right) / 2, (top + bottom) / 2), label.text, fill=ink, font=label.font, anchor="mm")
