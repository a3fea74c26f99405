"""Draw scenes of geometric shapes with their boxes and masks."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "crescent", "cross")

MIN_VISIBLE = 0.6  # default of `min_visible`
MIN_EXTENT = 6  # pixels; below this size the shapes are indistinguishable
MAX_OBJECTS = 255  # the id map has 8 bits, and 0 is the ground

SUPERSAMPLING = 4  # id-map cells per pixel and axis
SIZE_DRAWS = 5  # sizes to try before an object is skipped
PLACE_DRAWS = 10  # places to try for each size
MIN_PIECE = 1.0  # square pixels; smaller slivers and holes of the visible part are not outlined
GROUND_CONTRAST = 35.0  # minimum distance of an object's colour from the ground, CIE Lab units
OBJECT_CONTRAST = 25.0  # minimum distance between two objects' colours, CIE Lab units


@dataclass(frozen=True)
class SceneObject:
    """An object in a scene. All attributes except `extent` describe its visible part.

    Attributes:
        class_index: index into the classes of the scene.
        bbox: (x, y, width, height) in pixels; x and y are the left and top edges.
        polygons: outlines of the visible pieces, each a flat list x0, y0, x1, y1, ... in pixels with at least three
            points. A piece with a hole is cut in two, since COCO's polygons have no holes.
        area: square pixels.
        visible_fraction: visible area / area of the whole object, from `min_visible` to 1.
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
    whole: int  # id-map cells of the whole object
    visible: int  # id-map cells of its visible part


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
        # The unit disc minus a disc of radius r around (d, 0); the two circles intersect at x = meet.
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
    """Outline (N, 2) rotated by a random angle; its box starts at (0, 0) and has a longer side of 1."""
    # Circles take the same path: rotation does not change them.
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    points = _OUTLINES[shape] @ np.array([[cos, sin], [-sin, cos]])
    points -= points.min(axis=0)
    return points / points.max()


def _add_object(rng, id_map, placed, class_index, shape, extents, min_visible) -> None:
    """Add an object to `placed` and to `id_map`, as its number in `placed` from 1, if a valid place is found.

    A place is valid if every earlier object keeps `min_visible` of its area. The extent, from smallest to largest in
    pixels, is drawn log-uniformly.
    """
    height, width = (side // SUPERSAMPLING for side in id_map.shape)
    hideable = np.array([0] + [p.visible - math.ceil(min_visible * p.whole) for p in placed])
    for draw in range(SIZE_DRAWS * PLACE_DRAWS):
        # Try several places per size; otherwise crowded scenes would lack large objects.
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
        # Cell i of the map spans [i, i + 1); its centre is at i + 0.5.
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
    """At least one contour, (N, 1, 2) cells as x, y, that cover `mask` (h, w) uint8 without slivers and holes."""
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
    """The annotation of the visible part of the object with number `index` + 1 in the id map."""
    mask = (id_map[_cells(placed.rows), _cells(placed.cols)] == index + 1).view(np.uint8)
    contours = _outer_contours(mask)
    offset = np.array([placed.cols.start, placed.rows.start])
    polygons = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, 0.75, True)[:, 0]  # (N, 2)
        polygon = (points + 0.5) / SUPERSAMPLING + offset
        if len(polygon) >= 3:
            polygons.append(polygon.ravel().tolist())  # (2 * N,)
    # Contours run through the centres of the outermost cells. The shape's edge lies there too,
    # since fillPoly also fills cells that an edge only touches.
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
    """The textured ground of smooth multi-scale noise (H, W, 3) float32, and its mean colour (3,), RGB."""
    colour = rng.uniform(50, 205, 3).astype(np.float32)
    texture = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 6):
        cells = 2**octave
        grid = (max(2, round(cells * height / min(height, width))), max(2, round(cells * width / min(height, width))))
        # Vary mostly the brightness: three independent channels would give a rainbow.
        noise = rng.standard_normal((*grid, 1), np.float32) + 0.4 * rng.standard_normal((*grid, 3), np.float32)
        texture += 0.75**octave * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    texture -= texture.mean(axis=(0, 1))
    texture *= rng.uniform(4, 12) / texture.std()
    # Clip, so that no spot of the ground comes close to an object's colour.
    return colour + np.clip(texture, -25, 25), colour


def _to_lab(colours: np.ndarray) -> np.ndarray:
    """CIE Lab of RGB colours (N, 3) in 0..255."""
    rgb = np.asarray(colours, np.float32)[None] / 255  # (1, N, 3)
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[0]


def _contrasting_colour(rng, ground_colour, others) -> np.ndarray:
    """A random RGB colour (3,) that contrasts with the ground and, if possible, with the others."""
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
        # The objects' coverages of a pixel sum to at most 1; the ground fills the rest.
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
    min_visible: float = MIN_VISIBLE,
) -> tuple[np.ndarray, list[SceneObject]]:
    """Draw one scene; the same state of `rng` gives the same scene.

    Every object lies entirely within the image. A later object may hide part of an earlier one. An object without a
    valid place is skipped, so a crowded scene can have fewer than `objects[0]` objects.

    Args:
        rng: source of all randomness.
        height, width: of the image in pixels.
        objects: minimum and maximum number of objects, both inclusive, within 0..MAX_OBJECTS.
        object_size: minimum and maximum extent (longer side of the box around the whole object) as a fraction of the
            shorter image side, within (0, 1]; drawn log-uniformly.
        classes: shapes to draw from with equal probability; a subset of SHAPES.
        min_visible: minimum fraction of every object's area that later objects leave visible, within [0, 1].

    Returns:
        The image, (H, W, 3) uint8 RGB, and its objects from back to front.

    Raises:
        ValueError: a value is out of range, or the smallest object is below MIN_EXTENT pixels.
        TypeError: a count or a length is not an integer.
    """
    _check_scene(height, width, objects, object_size, classes, min_visible)
    extents = [fraction * min(height, width) for fraction in object_size]
    id_map = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    placed = []
    for _ in range(rng.integers(objects[0], objects[1], endpoint=True)):
        class_index = int(rng.integers(len(classes)))
        _add_object(rng, id_map, placed, class_index, classes[class_index], extents, min_visible)
    image = _paint(rng, id_map, placed)
    return image, [_annotate(id_map, spot, index) for index, spot in enumerate(placed)]


def _check_scene(height, width, objects, object_size, classes, min_visible) -> None:
    if min(operator.index(height), operator.index(width)) < 1:
        raise ValueError(f"size must be at least 1 x 1 pixel, not {height} x {width}")
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
    if not 0 <= min_visible <= 1:
        raise ValueError(f"min_visible must be from 0 to 1, not {min_visible}")
    unknown = [name for name in classes if name not in SHAPES]
    if isinstance(classes, str) or unknown or not classes or len(set(classes)) != len(classes):
        raise ValueError(f"classes must be one or more distinct names out of {', '.join(SHAPES)}, not {classes!r}")


def _pair(name, values) -> tuple:
    if len(values) != 2:
        raise ValueError(f"{name} must be two values, MIN and MAX, not {values!r}")
    return tuple(values)
