"""COCO's figures on cases worked out by hand, and what is written."""

import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from enact_common.data.categories import LabelMap
from enact_common.data.coco import CocoDetection
from enact_common.data.transforms import eval_transforms
from enact_common.evaluation.coco import FIGURES, CocoBoxEvaluator, figures_text, per_class_text

CATEGORIES = [{"id": 3, "name": "nut"}, {"id": 7, "name": "bolt"}]
LABELS = LabelMap.from_categories(CATEGORIES)  # nut is label 0, bolt is label 1


def ground_truth(boxes, images=(1, 2)):
    """A COCO ground truth of (image, category, xywh) boxes."""
    coco = COCO()
    coco.dataset = {
        "info": {},
        "licenses": [],
        "images": [{"id": i, "height": 200, "width": 200} for i in images],
        "categories": CATEGORIES,
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for n, (image, category, box) in enumerate(boxes, start=1)
        ],
    }
    coco.createIndex()
    return coco


def detected(*rows):
    """One image's result from (label, score, xyxy) rows."""
    return {
        "labels": torch.tensor([row[0] for row in rows], dtype=torch.int64),
        "scores": torch.tensor([row[1] for row in rows]),
        "boxes": torch.tensor([row[2] for row in rows], dtype=torch.float32).reshape(-1, 4),
    }


TWO_NUTS = [(1, 3, [10, 10, 40, 40]), (2, 3, [50, 50, 40, 40])]


def figures(evaluator, boxes=TWO_NUTS, images=(1, 2)):
    """The twelve figures by name, for a ground truth of these boxes."""
    return dict(zip(FIGURES, evaluator.evaluate(ground_truth(boxes, images)).stats, strict=True))


def test_perfect_detections_have_ap_one():
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update(
        [1, 2], [detected((0, 0.9, [10, 10, 50, 50])), detected((0, 0.8, [50, 50, 90, 90]), (1, 0.1, [0, 0, 5, 5]))]
    )
    result = figures(evaluator)
    assert result["AP"] == result["AP50"] == result["AR100"] == pytest.approx(1)
    # 40 x 40 pixels are medium; there is nothing small or large.
    assert result["APM"] == pytest.approx(1) and result["APS"] == result["APL"] == -1


def test_a_false_alarm_before_the_second_hit():
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update(
        [1, 2],
        [detected((0, 0.9, [10, 10, 50, 50]), (0, 0.8, [120, 120, 160, 160])), detected((0, 0.7, [50, 50, 90, 90]))],
    )
    # Precision is 1 up to recall 0.5 (51 of 101 points), then 2/3.
    assert figures(evaluator)["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_overlap_decides_at_which_thresholds_a_box_counts():
    evaluator = CocoBoxEvaluator(LABELS)
    # 40 x 30 of 40 x 40: IoU 0.75, right at 0.50, 0.55, ..., 0.75, wrong at the four above.
    evaluator.update([1], [detected((0, 0.9, [10, 10, 50, 40]))])
    result = figures(evaluator, TWO_NUTS[:1], images=(1,))
    assert result["AP50"] == result["AP75"] == pytest.approx(1)
    assert result["AP"] == pytest.approx(0.6)


def test_images_without_a_detection_count():
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1, 2], [detected((0, 0.9, [10, 10, 50, 50])), detected()])
    assert figures(evaluator)["AP50"] == pytest.approx(51 / 101)


@pytest.mark.parametrize(
    "remove, found, ap50",
    [
        (False, ("easy",), 51 / 101),  # half of what there is
        (True, ("easy",), 1),  # what is difficult need not be found
        (True, ("difficult", "easy"), 1),  # nor is it wrong to find it, even first
        (True, ("difficult",), 0),  # it does not stand for what must be found
    ],
)
def test_difficult_objects_are_neither_right_nor_wrong(tmp_path, remove, found, ap50):
    boxes = {"easy": [10, 10, 40, 40], "difficult": [100, 100, 40, 40]}
    annotations = [
        {"id": n, "image_id": 1, "category_id": 3, "bbox": box, "difficult": int(name == "difficult")}
        for n, (name, box) in enumerate(boxes.items())
    ]
    content = {"images": [{"id": 1, "file_name": "a.png"}], "categories": CATEGORIES, "annotations": annotations}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (tmp_path / "a.png").touch()
    dataset = CocoDetection(tmp_path, tmp_path / "truth.json", eval_transforms(64, 64), remove_difficult=remove)
    evaluator = CocoBoxEvaluator(LABELS)
    rows = [(0, 0.9 - i / 10, [*boxes[name][:2], *(c + 40 for c in boxes[name][:2])]) for i, name in enumerate(found)]
    evaluator.update([1], [detected(*rows)])
    assert evaluator.evaluate(dataset.coco_api()).stats[1] == pytest.approx(ap50)


def test_no_detection_at_all_is_ap_zero():
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1, 2], [detected(), detected()])
    assert figures(evaluator)["AP"] == 0


def test_an_image_given_twice_counts_once(monkeypatch):
    perfect = [detected((0, 0.9, [10, 10, 50, 50])), detected((0, 0.8, [50, 50, 90, 90]))]
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1, 2], perfect)
    # Another process has image 2 too, as a sampler's padding.
    monkeypatch.setattr("enact_common.evaluation.coco.gather_objects", lambda value: [value, {2: value[2]}])
    evaluator.synchronize()
    assert len(evaluator.detections()) == 2
    assert figures(evaluator)["AP"] == pytest.approx(1)


def test_results_are_in_the_data_sets_own_ids_and_pixels(tmp_path):
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1, 2], [detected((1, 0.5, [10, 20, 40, 80])), detected((0, 0.25, [0, 0, 1, 1]))])
    path = tmp_path / "results.json"
    assert evaluator.write_results(path) == 2
    assert json.loads(path.read_text()) == [
        {"image_id": 1, "category_id": 7, "bbox": [10.0, 20.0, 30.0, 60.0], "score": 0.5},
        {"image_id": 2, "category_id": 3, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.25},
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_labels_that_mean_nothing_are_no_detections():
    roomy = LabelMap.from_categories(CATEGORIES, num_classes=4)
    evaluator = CocoBoxEvaluator(roomy)
    evaluator.update([1], [detected((3, 0.9, [10, 10, 50, 50]), (0, 0.8, [10, 10, 50, 50]))])
    assert np.array_equal(evaluator.detections()[:, 6], [3])


def test_the_twelve_lines_and_the_classes():
    truth = [*TWO_NUTS, (2, 7, [100, 100, 50, 50])]
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1, 2], [detected((0, 0.9, [10, 10, 50, 50])), detected((0, 0.8, [50, 50, 90, 90]))])
    evaluation = evaluator.evaluate(ground_truth(truth))
    lines = figures_text(evaluation).splitlines()
    assert len(lines) == 12
    assert lines[1] == " Average Precision  (AP) @[ IoU=0.50      | area=   all | maxDets=100 ] = 0.500"
    rows = [line.split() for line in per_class_text(evaluation).splitlines()[1:]]
    assert rows == [["nut", "2", "1.000", "1.000"], ["bolt", "1", "0.000", "0.000"]]
