"""Boxes, masks, class names and scores drawn into an image, legible whatever its size. Needs nothing but Pillow.

Pillow rather than `torchvision.utils.draw_bounding_boxes`, which draws by Pillow too: there, every name stands at the
box's upper left corner, over its neighbours' names and beyond the picture's edge.
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

# Okabe and Ito's colours, which the colour-blind tell apart too (without black, which many images are full of).
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
# Where there are more labels, each next round of the palette is mixed with so much white (above 0) or black.
SHADES = (0.0, 0.5, -0.4)

# Pictures are enlarged until their longer side, width and height have so many pixels, but not beyond the last of these.
SMALL_LONGER, SMALL_WIDTH, SMALL_HEIGHT, LARGE = 480, 120, 48, 16384
# Where labels would cover more than this part of the picture, they are smaller, but not below that part of their size.
CROWDED, FONT_CROWDED = 0.15, 0.75

# Part of a mask's colour in what is drawn over its object.
FILM = 0.4

# A label's place costs, per part of it that lies over another label, over another box, and per part of its own box that
# it hides. Each next place that is tried costs a little more, so that the first is taken where nothing is in the way.
OVER_LABEL, OVER_BOX, OVER_OWN, NEXT_PLACE = 100.0, 0.25, 1.0, 0.02


@dataclass
class Label:
    """What is written at a box.

    Attributes:
        text: in one line.
        font: has all of its characters.
        width, height: pixels that it takes, with its background.
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

    The likeliest are drawn over the others, all labels over all boxes. Labels keep within the picture, and out of each
    other's way where there is room; one that has no room in the picture at all is left out. Lines and text grow with
    the picture.

    Args:
        pixels: RGB uint8, a tensor (3, height, width) or an array (height, width, 3).
        boxes: (n, 4), left, top, right, bottom in pixels of the image.
        names: of each box.
        scores: of each box; None, for annotations say, writes none and draws small boxes over large ones.
        labels: of each box, from 0: they decide the colours.
        enlarge: repeat the pixels of a small image, a whole number of times, so that the text has room.
        masks: bool (n, height, width), each box's object, drawn as a film of its colour with an outline; None for none.

    Returns:
        RGB uint8 (height, width, 3), of the image's size, or a whole multiple of it.

    Raises:
        ValueError: `pixels` is no such image, or the lengths differ.
    """
    image = as_array(pixels).transpose(1, 2, 0) if isinstance(pixels, Tensor) else pixels
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"expected RGB uint8, (height, width, 3) or a tensor (3, height, width), got {pixels.shape}")
    factor = enlargement(*image.shape[:2]) if enlarge else 1
    canvas = Image.fromarray(np.ascontiguousarray(image.repeat(factor, axis=0).repeat(factor, axis=1)))
    width, height = canvas.size
    corners = as_array(boxes).astype(np.float64).reshape(-1, 4) * factor
    corners = corners.clip(0, [width, height, width, height])
    numbers = as_array(labels).astype(np.int64).tolist()
    if scores is None:
        # Small boxes stand in the place of likely ones.
        rank = -(corners[:, 2:] - corners[:, :2]).prod(axis=1)
        texts = [(name, "") for name in names]
    else:
        rank = as_array(scores).astype(np.float64)
        texts = [(name, f"{score:.2f}") for name, score in zip(names, rank, strict=True)]
    if not len(corners) == len(texts) == len(numbers):
        raise ValueError(f"as many boxes, names and labels: got {len(corners)}, {len(texts)} and {len(numbers)}")

    order = np.argsort(-rank, kind="stable")
    corners, numbers, texts = corners[order], [numbers[i] for i in order], [texts[i] for i in order]
    written, size = fit_labels(texts, numbers, width, height)
    places = place_labels(corners, written, width, height)
    if masks is not None:
        filmed = np.array(canvas)
        for i in reversed(order.tolist()):
            mask = as_array(masks[i]).repeat(factor, axis=0).repeat(factor, axis=1)
            draw_mask(filmed, mask, colour_of(int(as_array(labels)[i])), max(round(size / 10), 1))
        canvas = Image.fromarray(filmed)
    draw = ImageDraw.Draw(canvas)
    for box, number in reversed(list(zip(corners, numbers, strict=True))):
        draw_box(draw, box, colour_of(number), max(round(size / 5), 2))
    for place, label, number in reversed(list(zip(places, written, numbers, strict=True))):
        if label is not None:
            draw_label(draw, place, label, colour_of(number))
    return np.array(canvas)


def as_array(values: Tensor | np.ndarray | Sequence) -> np.ndarray:
    """An array of what a tensor, on any device, an array or a sequence holds."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def enlargement(height: int, width: int) -> int:
    """How many times each pixel of an image is repeated in both directions, so that a label has room in it."""
    longer = max(height, width)
    wanted = max(SMALL_LONGER / longer, SMALL_WIDTH / width, SMALL_HEIGHT / height)
    return max(min(math.ceil(wanted), LARGE // longer), 1)


def colour_of(label: int) -> Colour:
    """The colour of a label; 21 labels have different ones."""
    shade = SHADES[label // len(PALETTE) % len(SHADES)]
    towards = 255 if shade > 0 else 0
    red, green, blue = (round(part + (towards - part) * abs(shade)) for part in PALETTE[label % len(PALETTE)])
    return red, green, blue


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever has more contrast to a colour (relative luminance, WCAG 2.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 0.05 * 1.05 else (255, 255, 255)


def fit_labels(
    texts: Sequence[tuple[str, str]], numbers: Sequence[int], width: int, height: int
) -> tuple[list[Label | None], int]:
    """Labels that fit into a picture, smaller where they are many; None for one that has no room.

    Args:
        texts: name and score of each.
        numbers: the class of each, for names that cannot be written.
        width, height: of the picture, in pixels.

    Returns:
        the labels, and the font's height in pixels.
    """
    size = max(min(FONT_OF_AREA * math.sqrt(width * height), FONT_OF_SHORTER * min(width, height)), FONT_MIN)
    readable = [(*readable_name(name, number), score) for (name, score), number in zip(texts, numbers, strict=True)]
    written = [fit_label(*text, round(size), width, height) for text in readable]
    area = sum(label.width * label.height for label in written if label is not None)
    crowded = area / (CROWDED * width * height)
    if crowded > 1:
        size *= max(crowded**-0.5, FONT_CROWDED)
        written = [fit_label(*text, round(size), width, height) for text in readable]
    return written, round(size)


def fit_label(name: str, source: str, score: str, size: int, width: int, height: int) -> Label | None:
    """The longest form of a label that fits into a picture: the name is cut first, then left out; None if none does.

    Args:
        name, source: of `readable_name`.
        score: as written; may be empty.
        size: the font's height in pixels.
        width, height: of the picture, in pixels.
    """
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
    """Where each label stands: at its box, inside the picture, and as little as possible over what matters.

    Those that come first choose first.

    Args:
        boxes: (n, 4) xyxy, in pixels of the picture.
        labels: of each box.
        width, height: of the picture, in pixels.

    Returns:
        float64 (n, 4) xyxy, in pixels; without meaning where there is no label.
    """
    places = np.zeros((len(boxes), 4))
    taken = np.zeros((0, 4))
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        if label is None:
            continue
        (left, top, right, bottom), (w, h) = box, (label.width, label.height)
        # Above and below the box, then inside it from the top: at its left, its right, its middle. Last, beside it.
        rows = [top - h, bottom, top, bottom - h, *(top + h * step for step in range(1, 5) if top + h * step < bottom)]
        columns = (left, right - w, (left + right - w) / 2)
        tried = np.array([(x, y) for y in rows for x in columns] + [(x, y) for y in rows for x in (right, left - w)])
        tried = tried.clip(0, [width - w, height - h]).round()
        tried = np.concatenate((tried, tried + [w, h]), axis=1)  # (places, 4) xyxy
        area, own_area = w * h, max((right - left) * (bottom - top), 1)
        own = overlaps(tried, box[None])[:, 0]
        cost = OVER_LABEL * overlaps(tried, taken).sum(axis=1) / area
        cost += OVER_BOX * (overlaps(tried, boxes).sum(axis=1) - own) / area
        cost += OVER_OWN * own / own_area + NEXT_PLACE * np.arange(len(tried))
        places[i] = tried[cost.argmin()]
        taken = np.concatenate((taken, places[i : i + 1]))
    return places


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Areas that boxes (n, 4) and (m, 4), xyxy, have in common: (n, m), in square pixels."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return (high - low).clip(min=0).prod(axis=-1)


def draw_box(draw: ImageDraw.ImageDraw, box: np.ndarray, colour: Colour, line: int) -> None:
    """A box's outline, between two thin lines that set it off from an image of the same colour.

    Args:
        draw: into the picture.
        box: (4,) xyxy, in pixels of the picture.
        colour: of the line.
        line: its width in pixels.
    """
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
    """An object's pixels under a film of a colour, with an outline inside of them.

    Args:
        picture: uint8 (height, width, 3), changed in place.
        mask: bool (height, width).
        colour: of both.
        line: width of the outline in pixels.
    """
    inside = mask
    for _ in range(line):
        # What has all four neighbours; the picture's edge is no outline.
        padded = np.pad(inside, 1, mode="edge")
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    picture[inside] = (picture[inside] * (1 - FILM) + np.array(colour) * FILM).round().astype(np.uint8)
    picture[mask & ~inside] = colour


def draw_label(draw: ImageDraw.ImageDraw, place: np.ndarray, label: Label, colour: Colour) -> None:
    """A label on a background of its box's colour, with an edge that keeps it apart from its neighbours.

    Args:
        draw: into the picture.
        place: (4,) xyxy, in pixels of the picture.
        label: what to write.
        colour: of the background.
    """
    left, top, right, bottom = place.astype(int).tolist()
    ink = ink_on(colour)
    draw.rectangle((left, top, right - 1, bottom - 1), fill=colour, outline=ink)
    draw.text(((left + right) / 2, (top + bottom) / 2), label.text, fill=ink, font=label.font, anchor="mm")
