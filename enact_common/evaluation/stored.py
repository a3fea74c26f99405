"""Ground truth and detections as files: what an evaluation measured, read back for a diagnosis or a comparison."""

import contextlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from enact_common.data.annotations import load_annotations
from enact_common.data.coco import as_coco
from enact_common.utils.errors import UserError

# File of the latest `--eval` in its output folder: the detections in COCO's results format.
RESULTS = "results.json"

# `RESULTS` rounds boxes and scores, which changes AP by less than this.
ROUNDING = 0.01


def read_truth(annotations: Path, images: int | None = None, remove_difficult: bool = False) -> dict[str, Any]:
    """Return the ground truth of an evaluation, in COCO's format, its `images` ordered by id, and without masks.

    Args:
        annotations: COCO-format JSON.
        images: number of evaluated images, the first ones by id (`--limit_val`); None for all.
        remove_difficult: whether objects marked as difficult count as crowds.

    Raises:
        UserError: the annotations cannot be read.
    """
    data = load_annotations(annotations, remove_difficult=remove_difficult)
    kept = sorted(data["images"], key=lambda image: image["id"])[:images]
    ids = {image["id"] for image in kept}
    # Segmentations are unchecked, and must not reach C code.
    objects = [
        {key: value for key, value in annotation.items() if key != "segmentation"}
        for annotation in data["annotations"]
        if annotation["image_id"] in ids
    ]
    return {"images": kept, "annotations": objects, "categories": data["categories"], "info": {}, "licenses": []}


def read_results(path: Path, truth: dict[str, Any]) -> np.ndarray:
    """Return the detections of a `results.json`, in COCO's format for boxes, of a ground truth from `read_truth`.

    Returns:
        float64 (n, 7): image id, x, y, width, height in pixels, score, category id.

    Raises:
        UserError: the file is missing or not of this format, or its images or categories are not those of the ground
            truth.
    """
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected the {RESULTS} of --eval") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error}); expected the {RESULTS} of --eval") from error
    if not isinstance(entries, list):
        raise UserError(
            f"{path}: not detections but a JSON {type(entries).__name__}; pass the {RESULTS} of --eval, a list"
        )
    rows = []
    for i, entry in enumerate(entries):
        try:
            left, top, width, height = entry["bbox"]
            row = [float(v) for v in (entry["image_id"], left, top, width, height, entry["score"])]
            rows.append([*row, float(entry["category_id"])])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: entry {i} is not a detection; it needs numbers image_id, category_id and score, and a bbox "
                "of x, y, width, height"
            ) from error
        if not all(map(math.isfinite, rows[-1])):
            raise UserError(f"{path}: entry {i} holds {entry}, which is not finite: the model has diverged")
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    for column, key, noun in ((0, "images", "image"), (6, "categories", "category")):
        strange = np.setdiff1d(table[:, column], [entry["id"] for entry in truth[key]])
        if len(strange):
            raise UserError(
                f"{path}: has detections of {noun} {strange[0]:g}, which the annotations lack; pass the data that it "
                "was evaluated on"
            )
    return table


def match(truth: dict[str, Any], detections: np.ndarray) -> COCOeval:
    """Match detections (n, 7) to a ground truth from `read_truth`, by pycocotools."""
    coco = as_coco(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        results = coco.loadRes(detections) if len(detections) else as_coco({**truth, "annotations": []})
        evaluation = COCOeval(coco, results, "bbox")
        evaluation.evaluate()
    return evaluation


def is_outdated(record: dict[str, Any] | None) -> bool:
    """Whether a training has replaced the record of an `--eval`, so that the detections next to it are older."""
    return record is not None and "checkpoint" not in record


def check_recorded(ap: float, record: dict[str, Any] | None, path: Path) -> None:
    """Refuse the detections of a file, by their AP, if the evaluation record next to them has another AP."""
    recorded = (record or {}).get("figures", {}).get("AP")
    if isinstance(recorded, int | float) and abs(recorded - ap) > ROUNDING:
        raise UserError(
            f"{path}: AP is {ap:.3f} with these annotations, but the evaluation next to it recorded {recorded:.3f}; "
            "pass the data (and --remove_difficult) that it was evaluated with, or evaluate again with --eval"
        )


def object_counts(truth: dict[str, Any], key: str, ids: Sequence[int]) -> list[int]:
    """Return the number of objects, without crowds, of each id under a key of the annotations."""
    counts = dict.fromkeys(ids, 0)
    for annotation in truth["annotations"]:
        if not annotation["iscrowd"] and annotation[key] in counts:
            counts[annotation[key]] += 1
    return [counts[i] for i in ids]
