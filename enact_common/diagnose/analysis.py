"""The measurements of a diagnosis, most of them by hotcoco, from detections and their ground truth.

The error types are those of TIDE (Bolya et al., https://arxiv.org/abs/2008.08115); the tests compare hotcoco's counts
and costs with those of TIDE's own package.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from pycocotools import mask as boxes_api

from enact_common.evaluation.coco import evaluation_record
from enact_common.evaluation.stored import object_counts
from enact_common.utils.extras import needed

# A detection matches an object from this IoU on, and touches it from the smaller one on.
MATCH, TOUCH = 0.5, 0.1
# Two annotations of a class from this IoU on are likely one object.
SAME_OBJECT = 0.9

# TIDE's error types: hotcoco's key, our name, and the meaning.
ERRORS = {
    "Cls": ("classification", "right place, wrong class"),
    "Loc": ("localisation", "right class, box only overlaps (IoU 0.1 to 0.5)"),
    "Both": ("both", "wrong class and box only overlaps"),
    "Dupe": ("duplicate", "object was already found by a better detection"),
    "Bkg": ("background", "nothing is annotated there"),
    "Miss": ("missed", "object was not detected, not even with an error above"),
}

# COCO's sizes by area in square pixels, up to the given one.
SIZES = (("small", "APS", 32**2), ("medium", "APM", 96**2), ("large", "APL", float("inf")))

# Least and greatest number of objects in an image.
CROWDING = ((0, 0), (1, 1), (2, 4), (5, 9), (10, 19), (20, None))

# Kinds of likely label errors.
WRONG_CLASS, NOT_ANNOTATED, ANNOTATED_TWICE = "wrong class", "not annotated", "annotated twice"


def hotcoco_package() -> ModuleType:
    """Return hotcoco; a UserError names the extra if it is not installed."""
    return needed("hotcoco", "the diagnosis", "diagnose")


def evaluator(truth: dict[str, Any], detections: np.ndarray) -> Any:
    """Return hotcoco's finished evaluation of detections (n, 7). Row i has the detection id i + 1."""
    ground_truth = hotcoco_package().COCO(truth)
    evaluation = hotcoco_package().COCOeval(ground_truth, ground_truth.load_res(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()
    return evaluation


def diagnose(truth: dict[str, Any], detections: np.ndarray, threshold: float | None = None) -> dict[str, Any]:
    """Return everything that the diagnosis says, in built-in types. APs are in [0, 1], None without objects.

    Args:
        truth: the ground truth, from `read_truth`.
        detections: float64 (n, 7), from `read_results`.
        threshold: minimum score for confusions, worst images and label errors; None for the score with the best F1.
    """
    evaluation = evaluator(truth, detections)
    status = evaluation.image_diagnostics(iou_thr=MATCH)["dt_status"]
    record = evaluation_record(evaluation)
    objects = [a for a in truth["annotations"] if not a["iscrowd"]]
    if threshold is None:
        threshold = best_threshold(detections, status, len(objects))
    # Detections of crowds have no status: COCO's evaluation ignores them.
    counted = np.array([i + 1 in status for i in range(len(detections))], dtype=bool)
    kept = detections[counted & (detections[:, 5] >= threshold)]
    kept_evaluation = evaluator(truth, kept)
    diagnostics = kept_evaluation.image_diagnostics(iou_thr=MATCH, score_thr=0.0)
    return {
        "images": len(truth["images"]),
        "objects": len(objects),
        "detections": len(detections),
        "metrics": {name: measured(value) for name, value in record["figures"].items()},
        "errors": errors(evaluation),
        "sizes": sizes(record["figures"], objects),
        "crowding": crowding(evaluation, truth),
        "classes": [{key: row[key] for key in ("name", "objects", "AP", "AP50")} for row in record["classes"]],
        "threshold": threshold,
        "confusion": confusion(kept_evaluation),
        "worst_images": worst_images(truth, kept, diagnostics),
        "label_errors": label_errors(truth, kept, diagnostics),
    }


def measured(value: float) -> float | None:
    """Return a metric, or None for COCO's -1 and NaN, which mean that there was nothing to measure."""
    return float(value) if value >= 0 else None


def best_threshold(detections: np.ndarray, status: dict[int, str], objects: int) -> float:
    """Return the score at which F1 over all classes is best; 0.5 if no detection is right.

    `status` is "tp" or "fp" by the id of each detection that counts, `objects` the number of objects.
    """
    ids = np.array(sorted(status), dtype=np.int64)
    scores, right = detections[ids - 1, 5], np.array([status[i] == "tp" for i in ids.tolist()], dtype=bool)
    if not right.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    hits = right[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + objects)
    return float(scores[order[f1.argmax()]])


def errors(evaluation: Any) -> dict[str, Any]:
    """Return TIDE's error types with their counts, and the AP50 that each costs: what correcting it would add."""
    tide = evaluation.tide_errors(pos_thr=MATCH, bg_thr=TOUCH)
    return {
        "AP50": tide["ap_base"],
        "types": [
            {"error": name, "meaning": meaning, "count": tide["counts"][key], "costs": tide["delta_ap"][key]}
            for key, (name, meaning) in ERRORS.items()
        ],
        "all_false_positives_cost": tide["delta_ap"]["FP"],
        "all_missed_objects_cost": tide["delta_ap"]["FN"],
    }


def sizes(figures: dict[str, float], objects: Sequence[dict]) -> list[dict[str, Any]]:
    """Return AP and the number of objects of each of COCO's sizes."""
    rows, least = [], 0.0
    for name, metric, most in SIZES:
        count = sum(least <= a["area"] < most for a in objects)
        rows.append({"size": name, "objects": count, "AP": measured(figures[metric])})
        least = most
    return rows


def crowding(evaluation: Any, truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Return AP of the images with few and with many objects."""
    ids = [image["id"] for image in truth["images"]]
    counts = object_counts(truth, "image_id", ids)
    slices: dict[str, list[int]] = {}
    for least, most in CROWDING:
        name = f"{least} or more" if most is None else str(least) if least == most else f"{least} to {most}"
        own = [i for i, count in zip(ids, counts, strict=True) if least <= count <= (count if most is None else most)]
        if own:
            slices[name] = own
    metrics, count_of = evaluation.slice_by(slices), dict(zip(ids, counts, strict=True))
    return [
        {
            "objects_per_image": name,
            "images": len(own),
            "objects": sum(count_of[i] for i in own),
            "AP": measured(metrics[name]["AP"]),
            "AP50": measured(metrics[name]["AP50"]),
        }
        for name, own in slices.items()
    ]


def confusion(evaluation: Any) -> dict[str, Any]:
    """Return the confusion matrix at IoU 0.5: rows are annotated classes and then the background, columns detected
    classes and then missed objects."""
    result = evaluation.confusion_matrix(iou_thr=MATCH)
    return {"classes": [str(name) for name in result["cat_names"]], "matrix": result["matrix"].astype(int).tolist()}


def overlaps(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the IoUs of xywh boxes: float64 (n, m)."""
    if not (len(first) and len(second)):
        return np.zeros((len(first), len(second)))
    first, second = (np.asarray(boxes, dtype=np.float64).reshape(-1, 4) for boxes in (first, second))
    return boxes_api.iou(first, second, [0] * len(second))


def rows_by_image(rows: Sequence[Any], image_of: Sequence[int]) -> dict[int, list[tuple[int, Any]]]:
    """Return (index, row) of the rows of each image."""
    grouped: dict[int, list[tuple[int, Any]]] = {}
    for i, (row, image) in enumerate(zip(rows, image_of, strict=True)):
        grouped.setdefault(int(image), []).append((i, row))
    return grouped


def error_of(detection: np.ndarray, objects: Sequence[dict], found: Sequence[bool]) -> str:
    """Return TIDE's type of a wrong detection (7,).

    `objects` are the image's annotations without crowds, `found` says whether another detection matches each of them.
    """
    iou = overlaps([detection[1:5]], [a["bbox"] for a in objects])[0]
    own = np.array([a["category_id"] == detection[6] for a in objects], dtype=bool)
    if TOUCH <= (iou * own).max(initial=0) <= MATCH:
        key = "Loc"
    elif (iou * ~own).max(initial=0) >= MATCH:
        key = "Cls"
    elif (iou * own * np.array(found, dtype=bool)).max(initial=0) >= MATCH:
        key = "Dupe"
    else:
        key = "Bkg" if iou.max(initial=0) <= TOUCH else "Both"
    return ERRORS[key][0]


def worst_images(truth: dict[str, Any], detections: np.ndarray, diagnostics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the images with errors, those with most errors first, with all their objects and detections.

    `diagnostics` are hotcoco's of these detections (n, 7), from the threshold on.
    """
    names = {category["id"]: str(category["name"]) for category in truth["categories"]}
    objects = [a for a in truth["annotations"] if not a["iscrowd"]]
    annotated = rows_by_image(objects, [a["image_id"] for a in objects])
    detected = rows_by_image(detections, detections[:, 0])
    summary, images = diagnostics["img_summary"], []
    for image in truth["images"]:
        counts = summary.get(image["id"], {"tp": 0, "fp": 0, "fn": 0, "f1": 1.0})
        if not counts["fp"] + counts["fn"]:
            continue
        own = [a for _, a in annotated.get(image["id"], [])]
        found = [diagnostics["gt_status"].get(a["id"]) == "matched" for a in own]
        rows = []
        for i, row in sorted(detected.get(image["id"], []), key=lambda pair: -pair[1][5]):
            wrong = diagnostics["dt_status"].get(i + 1) == "fp"
            error = error_of(row, own, found) if wrong else None
            rows.append({"class": names[int(row[6])], "score": row[5], "bbox": row[1:5].tolist(), "error": error})
        images.append(
            {
                "file_name": image["file_name"],
                "image_id": image["id"],
                "right": counts["tp"],
                "wrong": counts["fp"],
                "missed": counts["fn"],
                "F1": counts["f1"],
                "objects": [
                    {"class": names[a["category_id"]], "bbox": list(a["bbox"]), "found": hit}
                    for a, hit in zip(own, found, strict=True)
                ],
                "detections": rows,
            }
        )
    return sorted(images, key=lambda row: (-row["wrong"] - row["missed"], row["F1"], row["image_id"]))


def label_errors(truth: dict[str, Any], detections: np.ndarray, diagnostics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return likely label errors, the likeliest first: doubled annotations, then by the score of the contradiction.

    Arguments are those of `worst_images`.

    Returns:
        dicts with `kind`; `file_name` and `image_id`; `annotated` and `detected`, class names or None; `score` or None;
        `bbox` xywh of the annotation, or of the detection if nothing is annotated there; and `other_bbox` of the
        detection or of the other annotation.
    """
    files = {image["id"]: image["file_name"] for image in truth["images"]}
    names = {category["id"]: str(category["name"]) for category in truth["categories"]}
    objects = {a["id"]: a for a in truth["annotations"] if not a["iscrowd"]}
    likely: list[dict[str, Any]] = []

    def add(
        kind: str, image: int, annotation: dict | None, row: np.ndarray | None, class_name: str | None,
        other: Sequence[float],
    ) -> None:  # fmt: skip
        likely.append(
            {
                "kind": kind,
                "file_name": files[image],
                "image_id": image,
                "annotated": names[annotation["category_id"]] if annotation else None,
                "detected": class_name,
                "score": None if row is None else float(row[5]),
                "bbox": list(annotation["bbox"]) if annotation else row[1:5].tolist(),
                "other_bbox": list(other),
            }
        )

    for image, rows in sorted(rows_by_image(list(objects.values()), [a["image_id"] for a in objects.values()]).items()):
        own = [a for _, a in rows]
        same = np.equal.outer(*[[a["category_id"] for a in own]] * 2)
        iou = overlaps(*[[a["bbox"] for a in own]] * 2) * same
        for j in range(1, len(own)):
            if iou[:j, j].max() >= SAME_OBJECT:
                add(ANNOTATED_TWICE, image, own[j], None, None, own[iou[:j, j].argmax()]["bbox"])

    taken: set[int] = set()
    unannotated: dict[int, list[np.ndarray]] = {}
    for case in sorted(diagnostics["label_errors"], key=lambda case: (-case["dt_score"], case["dt_id"])):
        row, annotation = detections[case["dt_id"] - 1], objects.get(case["gt_id"])
        if case["type"] == "wrong_label":
            # The annotation stands if a detection of its own class agrees with it.
            agreed = diagnostics["gt_status"].get(case["gt_id"]) == "matched"
            if annotation is not None and not agreed and case["gt_id"] not in taken:
                taken.add(case["gt_id"])
                add(WRONG_CLASS, case["image_id"], annotation, row, case["dt_category"], row[1:5].tolist())
        else:
            known = unannotated.setdefault(case["image_id"], [])
            if overlaps([row[1:5]], known).max(initial=0) < MATCH:
                known.append(row[1:5])
                add(NOT_ANNOTATED, case["image_id"], None, row, case["dt_category"], row[1:5].tolist())
    return likely
