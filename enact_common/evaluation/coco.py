"""COCO's average precision of boxes and of masks, merged over processes, and results in COCO's format.

The figures are computed by faster-coco-eval where it is installed, in a fraction of the time, otherwise by pycocotools.
Where `COCO` and `COCOeval` are named here, either package's classes are meant.
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
from enact_common.data.masks import normalize_segmentations
from enact_common.utils.distributed import gather_objects
from enact_common.utils.files import write_atomically

logger = logging.getLogger(__name__)

# COCO's twelve figures, in the order of `COCOeval.stats`.
METRICS = ("AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR100", "ARS", "ARM", "ARL")

# The latest evaluation's record in a run's folder: `evaluation_record`, with the `set` of images, the weights' `epoch`
# (from 0; None where unknown) and, after `--eval`, the `checkpoint` that was evaluated.
EVALUATION = "evaluation.json"


def evaluation_package() -> tuple[str, type[COCO], Callable[..., COCOeval]]:
    """The faster package that works here: its name, its `COCO` and its `COCOeval`."""
    try:
        from faster_coco_eval import COCO as FasterCOCO
        from faster_coco_eval import COCOeval_faster
    except Exception as error:  # one that was built for another NumPy or C library raises this or that
        if not (isinstance(error, ModuleNotFoundError) and error.name == "faster_coco_eval"):
            logger.warning("faster-coco-eval is installed but does not work: %s", error)
        return "pycocotools", COCO, COCOeval
    # Its own default is a log; here, as with pycocotools, what it says is caught on standard output.
    return "faster-coco-eval", FasterCOCO, partial(COCOeval_faster, print_function=print)


class CocoBoxEvaluator:
    """Collects detections image by image and computes COCO's figures.

    Detections are kept as one array of seven numbers each (image, x, y, width, height, score, category), on the
    host, and their masks, where there are any, as run-length codes.

    Args:
        label_map: the category of each label. Labels without one are no detection.
    """

    def __init__(self, label_map: LabelMap):
        self._has_category = np.array([i is not None for i in label_map.category_ids])
        self._category = np.array([0 if i is None else i for i in label_map.category_ids])
        self._by_image: dict[int, np.ndarray] = {}
        self._masks: dict[int, list[dict]] = {}

    def update(self, image_ids: Iterable[int], results: list[dict[str, Tensor]]) -> None:
        """Add a batch.

        Args:
            image_ids: of each image. An image that is given again (distributed samplers repeat some) replaces
                itself.
            results: of each image `scores` (Q,), `labels` (Q,), `boxes` (Q, 4) xyxy in pixels; with masks,
                `segmentations`, a run-length code of each, from `encode_masks`: they are not checked.
        """
        image_ids, counts = list(image_ids), [len(result["labels"]) for result in results]
        columns = [torch.cat([result[name] for result in results]).double() for name in ("boxes", "scores", "labels")]
        # One copy for the whole batch: each waits for the device. float64 holds float32 and labels as they are.
        table = torch.column_stack(columns).cpu().numpy()  # (n, 6): left, top, right, bottom, score, label
        labels = table[:, 5].astype(np.int64)
        rows = np.column_stack(
            (
                np.repeat(image_ids, counts),
                table[:, :2],
                table[:, 2:4] - table[:, :2],
                table[:, 4],
                self._category[labels],
            )
        )
        known, cuts = self._has_category[labels], np.cumsum(counts)[:-1]
        found = zip(image_ids, results, np.split(rows, cuts), np.split(known, cuts), strict=True)
        for image_id, result, own, keep in found:
            self._by_image[image_id] = own[keep]
            if "segmentations" in result:
                self._masks[image_id] = [result["segmentations"][i] for i in np.flatnonzero(keep)]

    def synchronize(self) -> None:
        """Bring the detections of all processes together in each."""
        boxes: dict[int, np.ndarray] = {}
        masks: dict[int, list[dict]] = {}
        for some_boxes, some_masks in gather_objects((self._by_image, self._masks)):
            boxes |= some_boxes
            masks |= some_masks
        self._by_image, self._masks = boxes, masks

    def detections(self) -> np.ndarray:
        """All detections, float64 (n, 7), in the order of the image ids."""
        rows = [self._by_image[image_id] for image_id in sorted(self._by_image)]
        return np.concatenate(rows) if rows else np.zeros((0, 7))

    def segmentations(self) -> list[dict]:
        """The masks of all detections, in their order; none where the model finds none."""
        return [mask for image_id in sorted(self._masks) for mask in self._masks[image_id]]

    def evaluate(self, coco: COCO, masks: bool = False) -> COCOeval:
        """Match detections to ground truth and accumulate. The result's `stats` are the twelve `METRICS`.

        Says in the log which package did it.

        Args:
            coco: the ground truth, of either package; its images are what is evaluated, those without a detection
                included.
            masks: match masks rather than boxes. The ground truth must have `segmentation`.

        Raises:
            UserError: with `masks`, the ground truth's masks are damaged.
        """
        detections = self.detections()
        name, truth_class, evaluation_class = evaluation_package()
        if not np.isfinite(detections).all():
            # faster-coco-eval refuses what a broken model gives; no reason to end a training.
            name, truth_class, evaluation_class = "pycocotools", COCO, COCOeval
        logger.info("COCO's figures are computed by %s", name)
        with contextlib.redirect_stdout(io.StringIO()):
            if masks or not isinstance(coco, truth_class):
                dataset, coco = coco.dataset, truth_class()
                if masks:
                    # The ground truth need not be from `coco_api`, which has checked its masks.
                    images, truth = normalize_segmentations(
                        dataset["images"], dataset["annotations"], "the ground truth"
                    )
                    dataset = {**dataset, "images": images, "annotations": truth}
                coco.dataset = dataset
                coco.createIndex()
            # pycocotools cannot load an empty list.
            found = coco.loadRes(self.mask_results() if masks else detections) if len(detections) else truth_class()
            evaluation = evaluation_class(coco, found, iouType="segm" if masks else "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    def mask_results(self) -> list[dict]:
        """The detections in COCO's results format for masks. Without boxes: areas shall be the masks'."""
        return [
            {"image_id": int(row[0]), "category_id": int(row[6]), "segmentation": mask, "score": float(row[5])}
            for row, mask in zip(self.detections(), self.segmentations(), strict=True)
        ]

    def write_results(self, path: Path) -> int:
        """Write the detections as COCO's results format, whole or not at all; with masks, `segmentation` is theirs.

        Returns:
            how many there are.
        """
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
    """COCO's twelve figures in its customary words, a line each; -1 where nothing of that size exists."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        evaluation.summarize()
    # faster-coco-eval goes on with figures that are not among COCO's.
    return "\n".join(text.getvalue().splitlines()[: len(METRICS)])


def evaluation_record(evaluation: COCOeval) -> dict[str, Any]:
    """What an evaluation found, in built-in types alone: what `evaluation.json` holds, and plots are drawn from.

    Args:
        evaluation: of `CocoBoxEvaluator.evaluate`.

    Returns:
        a dict with `figures`, the twelve `METRICS` by name, in [0, 1], -1 where nothing of that size exists; `images`,
        how many were evaluated; `recall`, the 101 recalls at which precision is sampled, 0 to 1; and `classes`, of each
        category that has ground truth, in the order of their ids, a dict with `category_id`, `name`, `objects` (crowds
        left out), `AP`, `AP50` and `precision`: the 101 ap_history, in [0, 1] and falling, under `0.5` and `0.75` at
        that IoU and under `mean` over COCO's ten. All are over objects of all sizes, and at most 100 detections an
        image and category.
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
                    # Six digits: beyond what is ever read off a curve, and half the file.
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
    """AP and AP50 of each category in an `evaluation_record`, a line each."""
    lines = [f"{'class':<24} {'objects':>8} {'AP':>7} {'AP50':>7}"]
    lines += [f"{row['name']:<24} {row['objects']:>8} {row['AP']:7.3f} {row['AP50']:7.3f}" for row in record["classes"]]
    return "\n".join(lines)
