"""COCO's average precision of boxes and masks, merged over ranks, and results in COCO's format.

faster-coco-eval computes the metrics if installed, in a fraction of the time; otherwise pycocotools does. In this file,
`COCO` and `COCOeval` mean the classes of either package.
"""

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from enact_common.data.categories import LabelMap
from enact_common.data.coco import as_coco
from enact_common.data.masks import normalize_segmentations
from enact_common.utils.distributed import gather_objects
from enact_common.utils.files import write_atomically

logger = logging.getLogger(__name__)

# The twelve COCO metrics, in the order of `COCOeval.stats`.
METRICS = ("AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR100", "ARS", "ARM", "ARL")

# File of the latest evaluation in a run's folder: an `evaluation_record` with the `set` of images, the weights' `epoch`
# (from 0; None if unknown) and, after `--eval`, the evaluated `checkpoint`.
EVALUATION = "evaluation.json"


def evaluation_package() -> tuple[str, type[COCO], Callable[..., COCOeval]]:
    """Return the fastest working package: its name, its `COCO` and its `COCOeval`."""
    try:
        from faster_coco_eval import COCO as FasterCOCO
        from faster_coco_eval import COCOeval_faster
    except Exception as error:  # builds for another NumPy or C library raise various errors
        if not (isinstance(error, ModuleNotFoundError) and error.name == "faster_coco_eval"):
            logger.warning("faster-coco-eval is installed but does not work: %s", error)
        return "pycocotools", COCO, COCOeval
    # It logs by default; print instead, so that its output is captured like that of pycocotools.
    return "faster-coco-eval", FasterCOCO, partial(COCOeval_faster, print_function=print)


class CocoBoxEvaluator:
    """A collector of detections that computes COCO metrics. Detections with labels outside the label map are ignored.

    Detections are kept on the host as an array of seven numbers each (image, x, y, width, height, score, category), and
    their masks, if any, as run-length codes.
    """

    def __init__(self, label_map: LabelMap):
        self._has_category = np.array([i is not None for i in label_map.category_ids])
        self._category = np.array([0 if i is None else i for i in label_map.category_ids])
        self._by_image: dict[int, np.ndarray] = {}
        self._masks: dict[int, list[dict]] = {}

    def update(self, image_ids: Iterable[int], results: list[dict[str, Tensor]]) -> None:
        """Add a batch. A repeated image (distributed samplers repeat some) replaces its earlier results.

        Args:
            image_ids: id of each image.
            results: for each image `scores` (Q,), `labels` (Q,), `boxes` (Q, 4) xyxy in pixels; with masks also
                `segmentations`, Q run-length codes from `encode_masks`, which are not checked.
        """
        image_ids, counts = list(image_ids), [len(result["labels"]) for result in results]
        columns = [torch.cat([result[name] for result in results]).double() for name in ("boxes", "scores", "labels")]
        # One copy per batch, since each copy waits for the device. float64 is exact for float32 and labels.
        table = torch.column_stack(columns).cpu().numpy()  # (n, 6): left, top, right, bottom, score, label
        labels = table[:, 5].astype(np.int64)
        sides = table[:, 2:4] - table[:, :2]
        rows = np.column_stack((np.repeat(image_ids, counts), table[:, :2], sides, table[:, 4], self._category[labels]))
        known, cuts = self._has_category[labels], np.cumsum(counts)[:-1]
        per_image = zip(image_ids, results, np.split(rows, cuts), np.split(known, cuts), strict=True)
        for image_id, result, own, keep in per_image:
            self._by_image[image_id] = own[keep]
            if "segmentations" in result:
                self._masks[image_id] = [result["segmentations"][i] for i in np.flatnonzero(keep)]

    def synchronize(self) -> None:
        """Merge the detections of all ranks on every rank."""
        boxes: dict[int, np.ndarray] = {}
        masks: dict[int, list[dict]] = {}
        for rank_boxes, rank_masks in gather_objects((self._by_image, self._masks)):
            boxes |= rank_boxes
            masks |= rank_masks
        self._by_image, self._masks = boxes, masks

    def of_image(self, image_id: int) -> np.ndarray:
        """Return an image's detections, float64 (n, 7)."""
        return self._by_image.get(image_id, np.zeros((0, 7)))

    def detections(self) -> np.ndarray:
        """Return all detections, float64 (n, 7), ordered by image id."""
        rows = [self._by_image[image_id] for image_id in sorted(self._by_image)]
        return np.concatenate(rows) if rows else np.zeros((0, 7))

    def segmentations(self) -> list[dict]:
        """Return the masks of all detections in the same order; empty for a model without masks."""
        return [mask for image_id in sorted(self._masks) for mask in self._masks[image_id]]

    def evaluate(self, coco: COCO, masks: bool = False) -> COCOeval:
        """Match detections to ground truth and accumulate. The result's `stats` are the twelve `METRICS`.

        Args:
            coco: the ground truth, of either package. All its images are evaluated, even without detections.
            masks: whether to match masks instead of boxes. The ground truth must then have `segmentation`.

        Raises:
            UserError: with `masks`, the ground truth's masks are damaged.
        """
        detections = self.detections()
        name, truth_class, evaluation_class = evaluation_package()
        if not np.isfinite(detections).all():
            # faster-coco-eval rejects NaN and Inf from a diverged model, which must not end a training.
            name, truth_class, evaluation_class = "pycocotools", COCO, COCOeval
        logger.info("COCO metrics are computed by %s", name)
        with contextlib.redirect_stdout(io.StringIO()):
            if masks or not isinstance(coco, truth_class):
                dataset = coco.dataset
                if masks:
                    # Only ground truth from `coco_api` has checked masks.
                    images, truth = normalize_segmentations(
                        dataset["images"], dataset["annotations"], "the ground truth"
                    )
                    dataset = {**dataset, "images": images, "annotations": truth}
                coco = as_coco(dataset, truth_class)
            # pycocotools cannot load an empty list.
            results = coco.loadRes(self.mask_results() if masks else detections) if len(detections) else truth_class()
            evaluation = evaluation_class(coco, results, iouType="segm" if masks else "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    def mask_results(self) -> list[dict]:
        """Return the detections in COCO's results format for masks, without boxes, to use the masks' areas."""
        return [
            {"image_id": int(row[0]), "category_id": int(row[6]), "segmentation": mask, "score": float(row[5])}
            for row, mask in zip(self.detections(), self.segmentations(), strict=True)
        ]

    def write_results(self, path: Path) -> int:
        """Write the detections, with any masks, in COCO's results format atomically, and return their number."""
        results = [
            {
                "image_id": int(row[0]),
                "category_id": int(row[6]),
                "bbox": [round(float(side), 2) for side in row[1:5]],
                "score": round(float(row[5]), 5),
            }
            for row in self.detections()
        ]
        if self._masks:
            masks = zip(results, self.segmentations(), strict=True)
            results = [{**result, "segmentation": mask} for result, mask in masks]
        write_atomically(path, lambda file: file.write(json.dumps(results).encode()))
        return len(results)


def metrics_text(evaluation: COCOeval) -> str:
    """Return the twelve COCO metrics in COCO's usual wording, one per line; -1 if no object has that size."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        evaluation.summarize()
    # faster-coco-eval appends further metrics.
    return "\n".join(text.getvalue().splitlines()[: len(METRICS)])


def evaluation_record(evaluation: COCOeval) -> dict[str, Any]:
    """Return the results of `CocoBoxEvaluator.evaluate` in built-in types, as the content of `evaluation.json`.

    Returns:
        a dict with `figures`, the twelve `METRICS` by name, in [0, 1], -1 if no object has that size; `images`, the
            number of evaluated images; `recall`, the 101 recalls at which precision is sampled, 0 to 1; and `classes`,
            a dict for each category with ground truth, ordered by id: `category_id`, `name`, `objects` (without
            crowds), `AP`, `AP50` and `precision`, the 101 non-increasing precisions in [0, 1] under `0.5` and `0.75` at
            that IoU and under `mean` over COCO's ten IoUs. All values cover objects of all sizes and at most 100
            detections per image and category.
    """
    precision = evaluation.eval["precision"]  # (10 IoU thresholds, 101 recalls, categories, areas, max detections)
    classes = []
    for k, category in enumerate(evaluation.params.catIds):
        curves = np.asarray(precision[:, :, k, 0, -1])  # (10, 101): all areas, 100 detections
        if (curves > -1).any():
            by_iou = {"0.5": curves[0], "0.75": curves[5], "mean": curves.mean(axis=0)}
            classes.append(
                {
                    "category_id": int(category),
                    "name": str(evaluation.cocoGt.cats[category]["name"]),
                    "objects": len(evaluation.cocoGt.getAnnIds(catIds=[category], iscrowd=False)),
                    "AP": float(curves.mean()),
                    "AP50": float(curves[0].mean()),
                    # Six digits are enough for a curve and halve the file.
                    "precision": {iou: np.round(curve, 6).tolist() for iou, curve in by_iou.items()},
                }
            )
    return {
        "figures": {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)},
        "images": len(evaluation.params.imgIds),
        "recall": np.round(evaluation.params.recThrs, 6).tolist(),
        "classes": classes,
    }


def per_class_text(record: dict[str, Any]) -> str:
    """Return AP and AP50 of each category in an `evaluation_record`, one line each."""
    lines = [f"{'class':<24} {'objects':>8} {'AP':>7} {'AP50':>7}"]
    lines += [f"{row['name']:<24} {row['objects']:>8} {row['AP']:7.3f} {row['AP50']:7.3f}" for row in record["classes"]]
    return "\n".join(lines)
