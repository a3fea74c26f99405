"""The report of an evaluation: metrics on the terminal, in `evaluation.json`, and results in COCO's formats."""

import json
import logging
from pathlib import Path
from typing import Any

from enact_common.evaluation.coco import EVALUATION, CocoBoxEvaluator, evaluation_record, metrics_text, per_class_text
from enact_common.evaluation.panoptic import FOLDER, PanopticEvaluator, panoptic_metrics, panoptic_record, panoptic_text
from enact_common.evaluation.stored import RESULTS
from enact_common.training.setup import Data
from enact_common.utils.distributed import is_main_process
from enact_common.utils.files import write_file

logger = logging.getLogger("enact")


def report_evaluation(
    data: Data,
    evaluator: CocoBoxEvaluator,
    panoptic: PanopticEvaluator | None,
    source: dict[str, Any],
    output_dir: Path | None,
    masks: bool = False,
    per_class: bool = False,
) -> dict[str, Any]:
    """Print the metrics and write them to `evaluation.json`, which the next evaluation replaces.

    Args:
        data: holds the ground truth; without it there are no metrics.
        panoptic: holds the segments; None for a model without segments.
        source: the first entries of the record, which say where the weights come from.
        output_dir: None writes nothing.
        masks: also compute the metrics of masks.
        per_class: also print the metrics of each class, and write `results.json` and `panoptic_results/`.

    Returns:
        the metrics under the log's names: COCO's twelve of boxes and of masks as lists, PQ, SQ and RQ as dicts. Empty
        without ground truth, and in all processes except the main one.
    """
    if not is_main_process():
        return {}
    metrics: dict[str, Any] = {}
    if data.ground_truth is not None:
        record, metrics["test_coco_eval_bbox"] = coco_metrics(data, evaluator, per_class)
        if masks:
            logger.info("masks:")
            record["masks"], metrics["test_coco_eval_masks"] = coco_metrics(data, evaluator, per_class, masks=True)
        if panoptic is not None:
            quality = panoptic.evaluate(data.panoptic_truth)
            logger.info("panoptic quality:\n%s", panoptic_text(quality))
            record["panoptic"] = panoptic_record(quality)
            metrics |= panoptic_metrics(record["panoptic"])
        if output_dir:
            text = json.dumps({**source, **record})
            write_file(output_dir / EVALUATION, lambda file: file.write(text.encode()))
    if per_class and output_dir:
        path = output_dir / RESULTS
        logger.info("%d detections written to %s", evaluator.write_results(path), path)
        if panoptic is not None:
            folder, truth = output_dir / FOLDER, data.panoptic_truth
            count = panoptic.write_results(folder, truth.images, truth.categories)
            logger.info("segments of %d images written to %s", count, folder)
    return metrics


def coco_metrics(
    data: Data, evaluator: CocoBoxEvaluator, per_class: bool, masks: bool = False
) -> tuple[dict, list[float]]:
    """Compute and print COCO's metrics of boxes, or of masks; return the `evaluation_record` and the twelve metrics."""
    evaluation = evaluator.evaluate(data.ground_truth, masks)
    logger.info("%s", metrics_text(evaluation))
    record = evaluation_record(evaluation)
    if per_class:
        logger.info("%s", per_class_text(record))
    return record, [float(value) for value in evaluation.stats]
