"""Images with each run's detections, next to the ground truth if there is one."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from enact_common.compare.recorded import RecordedRun
from enact_common.data.annotations import check_file_names, load_annotations
from enact_common.data.build import data_files
from enact_common.data.images import decode_image, images_in
from enact_common.drawing.detections import draw_detections
from enact_common.inference.detector import as_pixels, load_detector
from enact_common.utils.errors import UserError

# Larger pictures are scaled down to this longer side, in pixels, to keep the page small.
LONGEST_SIDE = 800


@dataclass
class Objects:
    """Objects in an image: boxes float (n, 4), xyxy in pixels; class names; scores, None for the ground truth."""

    boxes: np.ndarray
    names: list[str]
    scores: list[float] | None = None


@dataclass
class Scene:
    """An image to detect in: its file; its ground truth, None if unknown; and whether to apply its EXIF orientation,
    which is not done for data sets."""

    path: Path
    truth: Objects | None = None
    exif: bool = False


@dataclass
class Panel:
    """A picture on the page: its caption, and its source, a data URI, or the reason why there is none."""

    caption: str
    source: str | None = None
    reason: str = ""


def corners(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """Return xywh boxes as xyxy, float64 (n, 4)."""
    table = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    table[:, 2:] += table[:, :2]
    return table


def given_scenes(sources: Sequence[Path], most: int) -> list[Scene]:
    """Return the images of `--images`: each file, and the first `most` images of each folder.

    Raises:
        UserError: a path is missing, a folder has no image, or a file cannot be read as an image.
    """
    paths = []
    for source in sources:
        if source.is_dir():
            paths += images_in(source, f"--images {source}")[:most]
        elif source.is_file():
            paths.append(source)
        else:
            raise UserError(f"--images {source}: no such file or folder")
    for path in paths:
        decode_image(path)
    return [Scene(path, exif=True) for path in paths]


def validation_scenes(runs: Sequence[RecordedRun], most: int) -> list[Scene]:
    """Return the first evaluation images of the first run whose data set still exists.

    Raises:
        UserError: no run's data set exists any more; the message says why.
    """
    reasons = []
    for run in runs:
        try:
            return read_scenes(*evaluated_data(run), most)
        except (UserError, OSError) as error:
            reasons.append(f"{run.name}: {error}")
    raise UserError("; ".join(dict.fromkeys(reasons)))


def evaluated_data(run: RecordedRun) -> tuple[Path, Path]:
    """Return the image folder and the annotation file that a run was evaluated on.

    Raises:
        UserError: they are unknown or missing.
    """
    split = str(run.args.get("eval_set") or "val")
    if not (run.args.get("coco_path") or run.args.get(f"{split}_images")):
        raise UserError("no checkpoint records its evaluation data")
    return data_files(SimpleNamespace(**run.args), split)


def read_scenes(folder: Path, annotations: Path, most: int) -> list[Scene]:
    """Return the first images of a data set, ordered by id, with their annotations except crowds."""
    annotated = not annotations.name.startswith("image_info")
    data = load_annotations(annotations, annotated)
    check_file_names(data["images"], folder, annotations)
    names = {category["id"]: str(category["name"]) for category in data["categories"]}
    scenes = []
    for image in sorted(data["images"], key=lambda image: image["id"])[:most]:
        own = [a for a in data["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        path = folder / image["file_name"]
        decode_image(path)
        truth = Objects(corners([a["bbox"] for a in own]), [names[a["category_id"]] for a in own])
        scenes.append(Scene(path, truth if annotated else None))
    return scenes


def detect(run: RecordedRun, scenes: Sequence[Scene], threshold: float, device: str | None) -> list[Objects] | str:
    """Return a run's detections with a score of at least `threshold` in each image, or why there are none."""
    if run.checkpoint is None:
        return "no checkpoint"
    try:
        detector = load_detector(run.checkpoint, device, threshold)
    except UserError as error:
        return str(error)
    objects = []
    for scene in tqdm(scenes, desc=run.name, unit="image"):
        detections = detector(scene.path, exif=scene.exif)
        objects.append(Objects(detections.boxes.numpy(), detections.names, detections.scores.tolist()))
    return objects


def draw_objects(pixels: np.ndarray, objects: Objects, colours: dict[str, int]) -> str:
    """Draw objects into an image uint8 (height, width, 3) and return it as a data URI.

    `colours` maps class names to colour numbers.
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    if scale < 1:
        # Scale before drawing, so that boxes and names stay legible.
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    labels = torch.tensor([colours[name] for name in objects.names], dtype=torch.int64)
    boxes = torch.from_numpy(np.asarray(objects.boxes, dtype=np.float32)) * scale
    scores = None if objects.scores is None else torch.tensor(objects.scores)
    drawn = draw_detections(pixels, boxes, objects.names, scores, labels)
    encoded = io.BytesIO()
    Image.fromarray(drawn).save(encoded, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def side_by_side(
    runs: Sequence[RecordedRun], scenes: Sequence[Scene], threshold: float, device: str | None
) -> Iterator[tuple[str, list[Panel]]]:
    """Yield each image's name and its panels: the ground truth if known, then each run's detections."""
    outcomes = {run.name: detect(run, scenes, threshold, device) for run in runs}
    all_objects = [scene.truth for scene in scenes if scene.truth]
    all_objects += [objects for outcome in outcomes.values() if not isinstance(outcome, str) for objects in outcome]
    # A class has the same colour in all panels.
    names = sorted({name for objects in all_objects for name in objects.names})
    colours = {name: i for i, name in enumerate(names)}
    for i, scene in enumerate(scenes):
        pixels = as_pixels(scene.path, scene.exif).permute(1, 2, 0).numpy()  # (height, width, 3)
        panels = []
        if scene.truth is not None:
            caption = f"annotated: {len(scene.truth.names)}"
            panels.append(Panel(caption, draw_objects(pixels, scene.truth, colours)))
        for run in runs:
            outcome = outcomes[run.name]
            if isinstance(outcome, str):
                panels.append(Panel(run.name, reason=outcome))
            else:
                caption = f"{run.name}: {len(outcome[i].names)} found"
                panels.append(Panel(caption, draw_objects(pixels, outcome[i], colours)))
        yield scene.path.name, panels
