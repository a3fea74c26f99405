"""COCO metrics with both evaluation packages, on hand-worked and random cases, and the files they write."""

import json
import sys

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from enact_common.data.categories import LabelMap
from enact_common.data.coco import CocoDetection
from enact_common.data.transforms import eval_transforms
from enact_common.evaluation.bootstrap import difference_intervals, draw_images, resampled_metrics
from enact_common.evaluation.coco import METRICS, CocoBoxEvaluator, evaluation_record, metrics_text, per_class_text
from enact_common.evaluation.stored import match
from enact_common.models.segmentation import encode_masks
from enact_common.utils.errors import UserError

try:
    import faster_coco_eval
except ImportError:
    faster_coco_eval = None

PACKAGES = ("pycocotools", "faster-coco-eval")

CATEGORIES = [{"id": 3, "name": "nut"}, {"id": 7, "name": "bolt"}]
LABELS = LabelMap.from_categories(CATEGORIES)  # nut is label 0, bolt is label 1


def use(package, monkeypatch):
    """Compute the metrics with this package; skips the test if it is not installed."""
    if package == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    else:
        pytest.importorskip("faster_coco_eval")


@pytest.fixture(params=PACKAGES)
def package(request, monkeypatch):
    """Run the test with each evaluation package."""
    use(request.param, monkeypatch)
    return request.param


def indexed(images, annotations, coco_class=COCO):
    """A COCO ground truth."""
    coco = coco_class()
    coco.dataset = {
        "info": {},
        "licenses": [],
        "images": [{"id": i, "height": 200, "width": 200} for i in images],
        "categories": CATEGORIES,
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def ground_truth(boxes, images=(1, 2), **kwargs):
    """A COCO ground truth of (image, category, xywh) boxes."""
    annotations = [
        {"id": n, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (image, category, box) in enumerate(boxes, start=1)
    ]
    return indexed(images, annotations, **kwargs)


def detected(*rows):
    """One image's result from (label, score, xyxy) rows."""
    return {
        "labels": torch.tensor([row[0] for row in rows], dtype=torch.int64),
        "scores": torch.tensor([row[1] for row in rows]),
        "boxes": torch.tensor([row[2] for row in rows], dtype=torch.float32).reshape(-1, 4),
    }


TWO_NUTS = [(1, 3, [10, 10, 40, 40]), (2, 3, [50, 50, 40, 40])]


def figures(evaluator, boxes=TWO_NUTS, images=(1, 2)):
    """The twelve metrics by name, for a ground truth of these boxes."""
    return dict(zip(METRICS, evaluator.evaluate(ground_truth(boxes, images)).stats, strict=True))


def test_perfect_detections_have_ap_one(package):
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update(
        [1, 2], [detected((0, 0.9, [10, 10, 50, 50])), detected((0, 0.8, [50, 50, 90, 90]), (1, 0.1, [0, 0, 5, 5]))]
    )
    result = figures(evaluator)
    assert result["AP"] == result["AP50"] == result["AR100"] == pytest.approx(1)
    # 40 x 40 pixels are medium; there are no small or large objects.
    assert result["APM"] == pytest.approx(1) and result["APS"] == result["APL"] == -1


def test_a_false_positive_before_the_second_hit_lowers_ap50(package):
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update(
        [1, 2],
        [detected((0, 0.9, [10, 10, 50, 50]), (0, 0.8, [120, 120, 160, 160])), detected((0, 0.7, [50, 50, 90, 90]))],
    )
    # Precision is 1 up to recall 0.5 (51 of 101 points), then 2/3.
    assert figures(evaluator)["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_a_box_counts_at_thresholds_up_to_its_iou(package):
    evaluator = CocoBoxEvaluator(LABELS)
    # 40 x 30 of 40 x 40 is IoU 0.75: correct at 0.50, 0.55, ..., 0.75, wrong at the four higher thresholds.
    evaluator.update([1], [detected((0, 0.9, [10, 10, 50, 40]))])
    result = figures(evaluator, TWO_NUTS[:1], images=(1,))
    assert result["AP50"] == result["AP75"] == pytest.approx(1)
    assert result["AP"] == pytest.approx(0.6)


def test_images_without_detections_lower_recall(package):
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1, 2], [detected((0, 0.9, [10, 10, 50, 50])), detected()])
    assert figures(evaluator)["AP50"] == pytest.approx(51 / 101)


@pytest.mark.parametrize(
    "remove, detections, ap50",
    [
        (False, ("easy",), 51 / 101),  # one of two objects
        (True, ("easy",), 1),  # the difficult object need not be detected
        (True, ("difficult", "easy"), 1),  # detecting it, even first, is not wrong
        (True, ("difficult",), 0),  # it does not replace the easy object
    ],
)
def test_difficult_objects_are_ignored(package, tmp_path, remove, detections, ap50):
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
    rows = [
        (0, 0.9 - i / 10, [*boxes[name][:2], *(c + 40 for c in boxes[name][:2])]) for i, name in enumerate(detections)
    ]
    evaluator.update([1], [detected(*rows)])
    assert evaluator.evaluate(dataset.coco_api()).stats[1] == pytest.approx(ap50)


def test_ap_is_zero_without_detections(package):
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1, 2], [detected(), detected()])
    assert figures(evaluator)["AP"] == 0


def test_an_image_given_twice_counts_once(package, monkeypatch):
    perfect = [detected((0, 0.9, [10, 10, 50, 50])), detected((0, 0.8, [50, 50, 90, 90]))]
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1, 2], perfect)
    # Another rank has image 2 too, as padding of the sampler.
    monkeypatch.setattr("enact_common.evaluation.coco.gather_objects", lambda value: [value, ({2: value[0][2]}, {})])
    evaluator.synchronize()
    assert len(evaluator.detections()) == 2
    assert figures(evaluator)["AP"] == pytest.approx(1)


@pytest.mark.parametrize("hit_first", [True, False])
@pytest.mark.parametrize("same_image", [True, False])
def test_equal_scores_are_sorted_by_image_then_by_order(package, hit_first, same_image):
    hit, miss = (0, 0.5, [10, 10, 50, 50]), (0, 0.5, [120, 120, 160, 160])
    first, second = (hit, miss) if hit_first else (miss, hit)
    one, two = ((first, second), ()) if same_image else ((first,), (second,))
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([2, 1], [detected(*two), detected(*one)])
    truth = [(1 if same_image or hit_first else 2, 3, [10, 10, 40, 40])]
    # One object: detected first with precision 1, or after a false positive with 1/2.
    assert figures(evaluator, truth)["AP50"] == pytest.approx(1 if hit_first else 0.5)


def test_only_the_100_best_detections_of_an_image_and_class_count(package):
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1], [detected(*[(0, 0.5, [120, 120, 160, 160])] * 100, (0, 0.4, [10, 10, 50, 50]))])
    assert figures(evaluator, TWO_NUTS[:1], images=(1,))["AR100"] == 0
    evaluator.update([1], [detected(*[(0, 0.5, [120, 120, 160, 160])] * 99, (0, 0.4, [10, 10, 50, 50]))])
    assert figures(evaluator, TWO_NUTS[:1], images=(1,))["AR100"] == pytest.approx(1)


def random_case(seed):
    """(image ids, annotations, results by image id): crowds, all sizes, empty images, ties in the scores."""
    rng = np.random.default_rng(seed)
    images, annotations, results = rng.permutation(np.arange(5, 35)).tolist(), [], {}
    # With few different scores, most are ties.
    steps = (10**6, 8, 1)[seed % 3]

    def random_box():
        return np.array([*rng.uniform(0, 120, 2), *np.exp(rng.uniform(np.log(6), np.log(200), 2))])

    for n, image in enumerate(images):
        objects = [(int(rng.integers(2)), random_box()) for _ in range(rng.integers(1, 9) if n % 4 else 0)]
        for label, box in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": CATEGORIES[label]["id"],
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3] * rng.uniform(0.4, 1)),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
        detections = []
        if n % 5:
            # The objects, slightly displaced and sometimes with the wrong class, and false positives.
            detections += [
                (label if rng.random() < 0.9 else 1 - label, box + rng.normal(0, 0.05, 4) * np.tile(box[2:], 2))
                for label, box in objects * int(rng.integers(1, 4))
            ]
            detections += [(int(rng.integers(2)), random_box()) for _ in range(rng.integers(150))]
        results[image] = detected(
            *(
                (label, round(rng.random() * steps) / steps, [*box[:2], *(box[:2] + np.abs(box[2:]))])
                for label, box in detections
            )
        )
    return images, annotations, results


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(9))
def test_both_packages_agree(monkeypatch, seed):
    images, annotations, results = random_case(seed)
    assert any(annotation["iscrowd"] for annotation in annotations)
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update(results, list(results.values()))
    done = {}
    for package in ("faster-coco-eval", "pycocotools"):
        use(package, monkeypatch)
        done[package] = evaluator.evaluate(indexed(images, annotations))
    fast, slow = done.values()
    assert type(fast) is not type(slow)
    assert len(fast.stats) == len(slow.stats) == len(METRICS)
    # The case is not trivial: it has objects of all sizes, and some are detected.
    assert (slow.stats >= 0).all() and slow.stats[0] > 0
    np.testing.assert_allclose(fast.stats, slow.stats, rtol=0, atol=1e-6)
    np.testing.assert_allclose(fast.eval["precision"], slow.eval["precision"], rtol=0, atol=1e-6)
    assert metrics_text(fast) == metrics_text(slow)
    records = [evaluation_record(evaluation) for evaluation in (fast, slow)]
    assert per_class_text(records[0]) == per_class_text(records[1])


@pytest.mark.parametrize("other", [False, True])
def test_ground_truth_of_either_package_is_accepted(package, other):
    if faster_coco_eval is None:
        pytest.skip("faster-coco-eval is not installed")
    truth_class = faster_coco_eval.COCO if (package == "faster-coco-eval") != other else COCO
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1], [detected((0, 0.9, [10, 10, 50, 50]))])
    evaluation = evaluator.evaluate(ground_truth(TWO_NUTS, coco_class=truth_class))
    assert evaluation.stats[1] == pytest.approx(51 / 101)


def test_the_log_names_the_evaluation_package(package, caplog):
    evaluator = CocoBoxEvaluator(LABELS)
    with caplog.at_level("INFO"):
        figures(evaluator)
    assert f"COCO metrics are computed by {package}" in caplog.text and "does not work" not in caplog.text


def test_pycocotools_replaces_a_package_that_fails_to_import(tmp_path, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.split(".")[0] == "faster_coco_eval"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "faster_coco_eval.py").write_text("raise RuntimeError('built for another NumPy')")
    monkeypatch.syspath_prepend(tmp_path)
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1], [detected((0, 0.9, [10, 10, 50, 50]))])
    with caplog.at_level("INFO"):
        assert figures(evaluator)["AP50"] == pytest.approx(51 / 101)
    assert "faster-coco-eval is installed but does not work: built for another NumPy" in caplog.text
    assert "COCO metrics are computed by pycocotools" in caplog.text


@pytest.mark.parametrize("fault", ["scores", "boxes"])
def test_nan_detections_do_not_stop_the_evaluation(package, fault):
    result = detected((0, 0.9, [10, 10, 50, 50]), (0, 0.8, [10, 10, 50, 50]))
    result[fault][0] = torch.nan
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1, 2], [result, detected((0, 0.7, [50, 50, 90, 90]))])
    assert len(figures(evaluator)) == 12


def masked(segmentation, side=200):
    """(ground truth of a nut with this segmentation in an image of `side` x `side`, evaluator with its detection)."""
    truth = ground_truth(TWO_NUTS[:1], images=(1,))
    truth.dataset["images"][0].update(height=side, width=side)
    truth.dataset["annotations"][0]["segmentation"] = segmentation
    mask = torch.zeros(1, 200, 200, dtype=torch.bool)
    mask[:, 10:50, 10:50] = True
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1], [{**detected((0, 0.9, [10, 10, 50, 50])), "segmentations": encode_masks(mask)}])
    return truth, evaluator


RUNS = [10 * 200 + 10, *[40, 160] * 39, 40, 150 * 200 + 150]
POLYGON = [[10, 10, 50, 10, 50, 50, 10, 50]]


@pytest.mark.parametrize("side", [200, 200.0, "200"])
@pytest.mark.parametrize("counts", [None, RUNS, "text", [float(run) for run in RUNS], [0, 0, *RUNS, 0, 0]],
                         ids=["polygon", "runs", "text", "floats", "empty runs"])  # fmt: skip
def test_masks_are_compared_however_their_sizes_are_written(package, side, counts):
    truth, evaluator = masked(POLYGON, side)
    if counts == "text":
        counts = evaluator.segmentations()[0]["counts"]
    if counts:
        truth.dataset["annotations"][0]["segmentation"] = {"size": [side, side], "counts": counts}
    # Evaluate twice, because evaluation packages may modify the ground truth.
    for _ in range(2):
        assert evaluator.evaluate(truth, masks=True).stats[0] == pytest.approx(1)


@pytest.mark.parametrize("counts", ["", "j", "b'`2'", "zz\u00e9", [3], [40_000, -1, 1], [2**40], None], ids=repr)
def test_damaged_masks_in_a_ground_truth_are_refused(package, counts):
    truth, evaluator = masked({"size": [200, 200], "counts": counts})
    with pytest.raises(UserError, match="the ground truth: annotation 1 of image 1, .* has "):
        evaluator.evaluate(truth, masks=True)
    # Box metrics do not need masks.
    assert evaluator.evaluate(truth).stats[0] == pytest.approx(1)


def test_a_batch_is_copied_from_the_device_once(monkeypatch):
    several = detected((0, 0.9, [10, 10, 50, 50]), (1, 0.8, [0, 0, 5, 5]))
    results = [several, detected(), detected((0, 0.7, [1, 2, 3, 4]))]
    copies = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, original=torch.Tensor.cpu: copies.append(1) or original(self))
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([7, 8, 5], results)
    assert len(copies) == 1
    # The evaluator holds copies on the host, so later changes of the results have no effect.
    for result in results:
        result["boxes"].zero_()
    rows = evaluator.detections()
    assert rows.dtype == np.float64
    expected = [[5, 1, 2, 2, 2, 0.7, 3], [7, 10, 10, 40, 40, 0.9, 3], [7, 0, 0, 5, 5, 0.8, 7]]
    np.testing.assert_allclose(rows, expected, rtol=1e-7)
    with pytest.raises(ValueError):
        evaluator.update([1, 2], results)


def test_results_use_the_data_sets_ids_and_pixels(tmp_path):
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1, 2], [detected((1, 0.5, [10, 20, 40, 80])), detected((0, 0.25, [0, 0, 1, 1]))])
    path = tmp_path / "results.json"
    assert evaluator.write_results(path) == 2
    assert json.loads(path.read_text()) == [
        {"image_id": 1, "category_id": 7, "bbox": [10.0, 20.0, 30.0, 60.0], "score": 0.5},
        {"image_id": 2, "category_id": 3, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.25},
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_detections_of_unused_labels_are_dropped():
    roomy = LabelMap.from_categories(CATEGORIES, num_classes=4)
    evaluator = CocoBoxEvaluator(roomy)
    evaluator.update([1], [detected((3, 0.9, [10, 10, 50, 50]), (0, 0.8, [10, 10, 50, 50]))])
    assert np.array_equal(evaluator.detections()[:, 6], [3])


def test_metrics_text_and_per_class_text(package):
    truth = [*TWO_NUTS, (2, 7, [100, 100, 50, 50])]
    evaluator = CocoBoxEvaluator(LABELS)
    evaluator.update([1, 2], [detected((0, 0.9, [10, 10, 50, 50])), detected((0, 0.8, [50, 50, 90, 90]))])
    evaluation = evaluator.evaluate(ground_truth(truth))
    lines = metrics_text(evaluation).splitlines()
    assert len(lines) == 12
    assert lines[1] == " Average Precision  (AP) @[ IoU=0.50      | area=   all | maxDets=100 ] = 0.500"
    rows = [line.split() for line in per_class_text(evaluation_record(evaluation)).splitlines()[1:]]
    assert rows == [["nut", "2", "1.000", "1.000"], ["bolt", "1", "0.000", "0.000"]]


def test_evaluation_record_of_a_hand_worked_case(package):
    # Two nuts: one is detected first at IoU 0.6 (40 x 24 of 40 x 40), then comes a false positive, then the other nut
    # exactly. One bolt is missed, and a crowd of bolts does not count. The washer has no ground truth.
    bolts = [(2, 7, [100, 100, 50, 50]), (1, 7, [150, 150, 40, 40])]
    truth = ground_truth([*TWO_NUTS, *bolts])
    truth.anns[4]["iscrowd"] = 1
    truth.dataset["categories"] = [*CATEGORIES, {"id": 9, "name": "washer"}]
    truth.createIndex()
    labels = LabelMap.from_categories(truth.dataset["categories"])
    evaluator = CocoBoxEvaluator(labels)
    evaluator.update(
        [1, 2],
        [
            detected((0, 0.9, [10, 10, 50, 34]), (2, 0.9, [0, 0, 5, 5])),
            detected((0, 0.8, [120, 10, 160, 50]), (0, 0.7, [50, 50, 90, 90])),
        ],
    )
    evaluation = evaluator.evaluate(truth)
    record = evaluation_record(evaluation)
    assert record == json.loads(json.dumps(record))  # only built-in types
    assert record["images"] == 2 and record["recall"] == pytest.approx(np.linspace(0, 1, 101))
    assert list(record["figures"]) == list(METRICS)
    assert list(record["figures"].values()) == pytest.approx(evaluation.stats.tolist())
    nut, bolt = record["classes"]
    assert (nut["category_id"], nut["name"], nut["objects"]) == (3, "nut", 2)
    assert (bolt["category_id"], bolt["name"], bolt["objects"]) == (7, "bolt", 1)
    # At IoU 0.5 to 0.6 the first detection is correct: precision 1 up to recall 0.5, then 2/3. At the seven higher IoUs
    # it is wrong: the only hit comes third, so precision is 1/3 up to recall 0.5, then 0.
    low, high = [1] * 51 + [2 / 3] * 50, [1 / 3] * 51 + [0] * 50
    expected = {"0.5": low, "0.75": high, "mean": [(3 * a + 7 * b) / 10 for a, b in zip(low, high, strict=True)]}
    assert nut["precision"].keys() == expected.keys()
    for iou, curve in expected.items():
        assert nut["precision"][iou] == pytest.approx(curve, abs=1e-6)
    assert nut["AP50"] == pytest.approx(sum(low) / 101)
    assert nut["AP"] == pytest.approx((3 * sum(low) + 7 * sum(high)) / 1010)
    assert bolt["AP"] == bolt["AP50"] == 0 and set(bolt["precision"]["mean"]) == {0}
    assert record["figures"]["AP"] == pytest.approx(nut["AP"] / 2)


@pytest.fixture
def noisy():
    """A ground truth of 12 images with crowds and two classes, and two sets of detections of it."""
    generator = np.random.default_rng(3)
    boxes = [
        (image, int(generator.choice([3, 7])), [*generator.uniform(0, 90, 2), *generator.uniform(10, 110, 2)])
        for image in range(1, 13)
        for _ in range(generator.integers(0, 5))
    ]
    coco = ground_truth(boxes, range(1, 13))
    coco.dataset["annotations"][2]["iscrowd"] = 1
    rows = np.array([[image, *box, generator.uniform(), category] for image, category, box in boxes])
    extra = np.array([[image, *generator.uniform(0, 90, 2), 40, 40, generator.uniform(), 3] for image in range(1, 13)])
    first = np.concatenate((rows, extra))
    second = first.copy()
    second[:, 1:5] += generator.normal(0, 6, (len(first), 4))
    second[:, 3:5] = second[:, 3:5].clip(1)
    return coco.dataset, first, second


def repeated(dataset, detections, counts):
    """The same data with each image as often as `counts` says, under new ids."""
    images, annotations, rows = [], [], [detections[:0]]
    for old in np.repeat([image["id"] for image in dataset["images"]], counts):
        images.append({"id": len(images) + 1, "height": 200, "width": 200})
        for annotation in dataset["annotations"]:
            if annotation["image_id"] == old:
                annotations.append({**annotation, "image_id": len(images), "id": len(annotations) + 1})
        own = detections[detections[:, 0] == old].copy()
        own[:, 0] = len(images)
        rows.append(own)
    return {**dataset, "images": images, "annotations": annotations}, np.concatenate(rows)


def test_a_resample_equals_an_evaluation_of_the_repeated_images(noisy):
    dataset, detections, _ = noisy
    draws = draw_images(12, 4, seed=1)
    assert draws.sum(1).tolist() == [12] * 5 and draws.max() > 1 and (draws[0] == 1).all()
    metrics = resampled_metrics(match(dataset, detections), draws)
    for counts, own in zip(draws, metrics, strict=True):
        evaluation = match(*repeated(dataset, detections, counts))
        evaluation.accumulate()
        evaluation.summarize()
        expected = [value if value >= 0 else np.nan for value in evaluation.stats[:6]]
        # Repeated images tie in their scores, and pycocotools orders ties by image.
        np.testing.assert_allclose(own, expected, atol=1e-9)


def test_intervals_have_the_width_of_the_sampling_error():
    # One object in each of 40 images; the second detector finds 20 of them. AP is then the recall in the resample.
    images = range(1, 41)
    dataset = ground_truth([(image, 3, [10, 10, 50, 50]) for image in images], images).dataset
    rows = np.array([[image, 10, 10, 50, 50, 0.9, 3] for image in images], dtype=float)
    draws = draw_images(40, 2000, seed=0)
    none, half = (resampled_metrics(match(dataset, rows[:count]), draws) for count in (0, 20))
    interval = difference_intervals(none, half)["AP"]
    assert interval["difference"] == pytest.approx(51 / 101)
    # Plus or minus 1.96 binomial standard errors.
    assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * (0.25 / 40) ** 0.5, rel=0.1)


def test_a_metric_without_objects_has_no_interval(noisy):
    dataset, first, second = noisy
    small = {**dataset, "annotations": [{**a, "area": 10.0} for a in dataset["annotations"]]}
    draws = draw_images(12, 20, seed=0)
    metrics = [resampled_metrics(match(small, rows), draws) for rows in (first, second)]
    intervals = difference_intervals(*metrics)
    assert set(intervals) == {"AP", "AP50", "AP75", "APS"}
    assert all(row["low"] <= row["high"] for row in intervals.values())
