"""An image as two models see it: detections, information, clusters, attention, times and memory; pictures and JSON.

The models run in `look`, `with_second` and `attention_of`. Drawing and JSON only read their results.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from enact_common.benchmark.measuring import MemoryMeter, synchronizer, take_turns
from enact_common.data.exif import decode_upright
from enact_common.data.images import image_size
from enact_common.drawing.detections import draw_detections, enlargement
from enact_common.drawing.fonts import open_font, readable_name
from enact_common.explore.models import Models, Settings, settings_of
from enact_common.inference.detector import Detections, LoadedDetector
from enact_common.inference.introspection import ClusteredMaps, introspect
from enact_common.utils.errors import UserError
from enact_common.utils.files import write_file

# Longer side of an image in pixels, at least; larger images are scaled down to this or to the model's own size.
LONGER_SIDE = 1600

# Images with more pixels are refused, because decoding takes several bytes per pixel.
MAX_PIXELS = 200_000_000

# The likeliest detections of a model that are kept.
MAX_DETECTIONS = 100

# Timed runs of a model; the median counts.
REPEATS = 3

# Runs whose memory is measured; the least counts, because other work in the process can only add to it.
MEMORY_RUNS = 2

# Size of a figure that is one of two side by side, inches.
HALF_SLIDE = (8.0, 9.0)

# Pixels of the caption over a picture.
CAPTION = 44


@dataclass(frozen=True)
class Picture:
    """An image to look at.

    Attributes:
        name: the file's name.
        pixels: uint8 (3, height, width), RGB, upright; scaled down if the image is large.
        size: (height, width) of the upright image, in pixels.
    """

    name: str
    pixels: Tensor
    size: tuple[int, int]

    @property
    def scale(self) -> float:
        """Pixels of the image per pixel of `pixels`, at least 1."""
        return max(self.size) / max(self.pixels.shape[-2:])

    def note(self) -> str:
        """A sentence if the image was scaled down; else empty."""
        height, width = self.pixels.shape[-2:]
        if self.scale == 1:
            return ""
        return (
            f"The image has {self.size[1]:,} x {self.size[0]:,} pixels. It was scaled down to {width:,} x {height:,} "
            "before anything else; the boxes in the JSON file refer to the whole image."
        )


@dataclass(frozen=True)
class Seen:
    """The results of one model for an image.

    Attributes:
        settings: the model's settings.
        detections: the likeliest detections of any score, at most `MAX_DETECTIONS`, boxes in pixels of
            `Picture.pixels`.
        layers: the information and clusters of each encoder layer; empty without ENACT.
        milliseconds: the model's time, median of `REPEATS` runs, without reading, resizing and drawing.
        memory: bytes, the peak of a run above the memory before it, least of `MEMORY_RUNS`; None where it cannot be
            measured.
    """

    settings: Settings
    detections: Detections
    layers: list[ClusteredMaps]
    milliseconds: float
    memory: int | None


@dataclass(frozen=True)
class View:
    """An image seen by the checkpoint's model and by the same weights with changed settings."""

    picture: Picture
    first: Seen
    second: Seen

    def both(self) -> tuple[Seen, Seen]:
        """The results of the two models, in order."""
        return self.first, self.second


# Reading and running -------------------------------------------------------------------------------------------------


def read_picture(path: Path, least_side: int = 0) -> Picture:
    """Read an image upright, and scale it down if its longer side is above `LONGER_SIDE` and `least_side`, in pixels.

    Raises:
        UserError: it is not an image that can be read, or has more than `MAX_PIXELS` pixels. The message names it
            without its folder, which may be a temporary one.
    """
    try:
        width, height = image_size(path)
        if width * height > MAX_PIXELS:
            raise UserError(
                f"{path}: {width:,} x {height:,} pixels are more than the explorer's limit of {MAX_PIXELS:,} pixels; "
                "make the image smaller"
            )
        pixels = decode_upright(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from error
    size = tuple(pixels.shape[-2:])
    factor = max(LONGER_SIDE, least_side) / max(size)
    if factor < 1:
        height, width = (max(round(side * factor), 1) for side in size)
        scaled = cv2.resize(pixels.permute(1, 2, 0).numpy(), (width, height), interpolation=cv2.INTER_AREA)
        pixels = torch.from_numpy(scaled).permute(2, 0, 1).contiguous()
    return Picture(path.name, pixels, size)


def look(models: Models, picture: Picture, second: Settings) -> View:
    """Run the checkpoint's model and the model with other settings on an image."""
    with models.lock:
        other = models.get(second)
        first = see(models.detector, picture.pixels)
        return View(picture, first, first if other is models.detector else see(other, picture.pixels))


def with_second(models: Models, view: View, second: Settings) -> View:
    """Return the view with other settings; only their model runs."""
    if second == view.second.settings:
        return view
    with models.lock:
        other = models.get(second)
        return replace(view, second=view.first if other is models.detector else see(other, view.picture.pixels))


def see(detector: LoadedDetector, pixels: Tensor) -> Seen:
    """Run a model on an image, uint8 (3, height, width), with its internals recorded, and then timed without that."""
    # The recorded run comes first, and warms up the model.
    layers = introspect(detector, pixels, torch.zeros(0, dtype=torch.int64)).layers
    images, outputs = detector.model_input(pixels), []

    def run() -> None:
        with torch.inference_mode():
            outputs[:] = [detector.model(images)]

    synchronize = synchronizer(detector.device)
    rises = []
    for _ in range(MEMORY_RUNS):
        meter = MemoryMeter(detector.device)
        run()
        rises.append(meter.read()["rise"])
    seconds = take_turns({"model": run}, REPEATS, synchronize, warmup=0)["model"]
    found = detector.decode(outputs[0], tuple(pixels.shape[-2:]), threshold=0.0)
    # Only Linux forgets an earlier peak of a process.
    measured = detector.device.type == "cuda" or sys.platform == "linux"
    memory = min(rises) if measured else None
    return Seen(settings_of(detector), likeliest(found), layers, 1000 * statistics.median(seconds), memory)


def likeliest(detections: Detections, threshold: float = 0.0) -> Detections:
    """Return the detections that reach the threshold, at most the likeliest `MAX_DETECTIONS`."""
    count = min(int((detections.scores >= threshold).sum()), MAX_DETECTIONS)
    columns = {name: values for name, values in vars(detections).items() if name != "panoptic" and values is not None}
    return Detections(**{name: values[:count] for name, values in columns.items()})


def attention_of(models: Models, view: View, query: int) -> tuple[Tensor, Tensor]:
    """Return where a query attends in the two models: float (decoder layers, h, w) each, adding up to one per layer."""
    chosen = torch.tensor([query])
    with models.lock:
        first, second = (
            introspect(models.get(seen.settings), view.picture.pixels, chosen).by_layer[:, 0] for seen in view.both()
        )
    return first, second


def detection_at(detections: Detections, x: float, y: float) -> int | None:
    """Return the index of the smallest box around a point, in the boxes' pixels; None if there is none."""
    left, top, right, bottom = detections.boxes.unbind(1)
    inside = (left <= x) & (x <= right) & (top <= y) & (y <= bottom)
    area = ((right - left) * (bottom - top)).masked_fill(~inside, float("inf"))
    return int(area.argmin()) if inside.any() else None


# Pictures ------------------------------------------------------------------------------------------------------------


def draw_seen(picture: Picture, seen: Seen, threshold: float) -> np.ndarray:
    """Draw the detections that reach the threshold: uint8 (height, width, 3), `zoom` times the size of the pixels."""
    kept = likeliest(seen.detections, threshold)
    return draw_detections(picture.pixels, kept.boxes, kept.names, kept.scores, kept.labels, masks=kept.masks)


def zoom(picture: Picture) -> int:
    """How often `draw_seen` repeats each pixel of a small image in both directions."""
    return enlargement(*picture.pixels.shape[-2:])


def draw_maps(picture: Picture, seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """Draw the information and the clusters of each encoder layer; without ENACT, twice that there are none."""
    from enact_common.drawing.figures import rendered
    from enact_common.inference.introspection_plots import draw_clusters, draw_information, draw_note

    image = picture.pixels.permute(1, 2, 0).numpy()
    if not seen.layers:
        none = rendered(draw_note(image, ("No clusters", "every cell attends to all cells"), HALF_SLIDE))
        return none, none
    information = draw_information(image, [layer.information for layer in seen.layers], HALF_SLIDE)
    clusters = draw_clusters(image, [layer.clusters for layer in seen.layers], HALF_SLIDE)
    return rendered(information), rendered(clusters)


def draw_query(picture: Picture, seen: Seen, query: int, by_layer: Tensor) -> np.ndarray:
    """Draw a query's attention, float (decoder layers, h, w), with the query's likeliest detection."""
    from enact_common.drawing.figures import rendered
    from enact_common.inference.introspection_plots import draw_attention_by_layer

    image, found = picture.pixels.permute(1, 2, 0).numpy(), seen.detections
    best = next((i for i, other in enumerate(found.queries.tolist()) if other == query), None)
    box = torch.zeros(4) if best is None else found.boxes[best]
    name, score = ("no detection", 0.0) if best is None else (found.names[best], float(found.scores[best]))
    return rendered(draw_attention_by_layer(image, by_layer, box, name, score, HALF_SLIDE))


def side_by_side(view: View, threshold: float) -> np.ndarray:
    """Draw both models' detections next to each other with their settings: uint8 (height, width, 3)."""
    drawn = [captioned(draw_seen(view.picture, seen, threshold), seen, threshold) for seen in view.both()]
    gap = np.full((drawn[0].shape[0], 12, 3), 255, np.uint8)
    return np.concatenate([drawn[0], gap, drawn[1]], axis=1)


def captioned(picture: np.ndarray, seen: Seen, threshold: float) -> np.ndarray:
    """Return a picture below two lines on the model, uint8 (height, width, 3)."""
    width = picture.shape[1]
    canvas = Image.new("RGB", (width, CAPTION), "white")
    draw = ImageDraw.Draw(canvas)
    for line, top in ((seen.settings.text(), 2), (figures_text(seen, threshold), CAPTION // 2)):
        size = CAPTION // 2 - 5
        text, source = readable_name(line, 0)
        while size > 8 and open_font(source, size).getlength(text) > width - 4:
            size -= 1
        draw.text((2, top), text, fill="black", font=open_font(source, size))
    return np.concatenate([np.array(canvas), picture])


# Words and files -----------------------------------------------------------------------------------------------------


def figures_text(seen: Seen, threshold: float) -> str:
    """The numbers of detections and clusters, the time and the memory, in one line."""
    count = len(likeliest(seen.detections, threshold))
    parts = [f"{count} detection{'' if count == 1 else 's'}", f"{seen.milliseconds:.1f} ms"]
    parts += ["memory not measured" if seen.memory is None else f"{seen.memory / 2**20:.1f} MiB"]
    if seen.layers:
        counts = [int(layer.clusters.max()) + 1 for layer in seen.layers]
        few = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
        parts.append(f"{few} cluster{'s' * (max(counts) > 1)} of {seen.layers[0].clusters.numel()} cells")
    return ", ".join(parts)


def as_json(view: View, checkpoint: str, threshold: float) -> dict[str, Any]:
    """Return the view as JSON values. Boxes are left, top, right, bottom in pixels of the whole upright image."""
    height, width = view.picture.size
    return {
        "checkpoint": checkpoint,
        "image": {"file_name": view.picture.name, "width": width, "height": height},
        "threshold": threshold,
        "models": [seen_json(seen, threshold, view.picture.scale) for seen in view.both()],
    }


def seen_json(seen: Seen, threshold: float, scale: float) -> dict[str, Any]:
    """Return one model's part of `as_json`; `scale` multiplies the boxes."""
    kept = likeliest(seen.detections, threshold)
    rows = zip(
        kept.names, kept.category_ids, kept.scores.tolist(), (kept.boxes * scale).tolist(), kept.queries.tolist(),
        strict=True,
    )  # fmt: skip
    return {
        "settings": seen.settings.flags(),
        "milliseconds": round(seen.milliseconds, 3),
        "memory_bytes": seen.memory,
        "detections": [
            {
                "name": name,
                "category_id": category,
                "score": round(score, 5),
                "box": [round(side, 2) for side in box],
                "query": query,
            }
            for name, category, score, box, query in rows
        ],
        "encoder_layers": [
            {
                "clusters": layer.clusters.tolist(),
                "information_bits": np.round(layer.information.double().numpy(), 8).tolist(),
            }
            for layer in seen.layers
        ],
    }


def write_downloads(view: View, checkpoint: str, threshold: float, folder: Path) -> tuple[Path, Path]:
    """Write the picture of both models' detections and the JSON file, atomically; return their paths."""
    stem = Path(view.picture.name).stem or "image"
    picture, text = folder / f"{stem}_explored.png", folder / f"{stem}_explored.json"
    drawn = Image.fromarray(side_by_side(view, threshold))
    write_file(picture, lambda file: drawn.save(file, format="PNG", compress_level=1), sync=False)
    values = json.dumps(as_json(view, checkpoint, threshold))
    write_file(text, lambda file: file.write(values.encode()), sync=False)
    return picture, text


def options_of(view: View, threshold: float) -> list[tuple[str, int]]:
    """Return the queries whose detections reach the threshold in either model, as (text, query): each query once, those
    of the first model first, and the likeliest of a model first."""
    options: dict[int, str] = {}
    for seen in view.both():
        kept = likeliest(seen.detections, threshold)
        for name, score, query in zip(kept.names, kept.scores.tolist(), kept.queries.tolist(), strict=True):
            options.setdefault(query, f"{len(options) + 1}: {name} {score:.2f}")
    return [(text, query) for query, text in options.items()]


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return the names of image files, below their common folder if a name occurs twice."""
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    return [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
