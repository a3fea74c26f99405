"""The diagnosis: planted errors are found, metrics equal pycocotools', and a user's mistakes are named."""

import json
import lzma
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, run
from PIL import Image
from test_architecture import RECORDED
from test_compare import Page
from test_evaluation import CATEGORIES, indexed

from enact_common.diagnose.__main__ import main
from enact_common.diagnose.analysis import best_threshold, diagnose, error_of, evaluator
from enact_common.diagnose.page import summary
from enact_common.diagnose.sources import in_folder
from enact_common.evaluation.coco import METRICS
from enact_common.evaluation.stored import match, read_results, read_truth
from enact_common.utils.errors import UserError

pytest.importorskip("hotcoco", reason="the extra diagnose is not installed")

NUT, BOLT = 3, 7
# Image 1 has two nuts, image 2 a nut and a bolt, image 3 none.
OBJECTS = [(1, NUT, [10, 10, 40, 40]), (1, NUT, [100, 100, 40, 40]), (2, NUT, [10, 10, 40, 40]),
           (2, BOLT, [100, 20, 80, 100])]  # fmt: skip
PERFECT = [(image, category, box, 0.9 - 0.1 * i) for i, (image, category, box) in enumerate(OBJECTS)]


def truth_of(objects, images=(1, 2, 3), crowds=()) -> dict:
    """The ground truth of (image, category, xywh box) objects; `crowds` are indices."""
    annotations = [
        {"id": i + 1, "image_id": image, "category_id": category, "bbox": list(map(float, box)),
         "area": float(box[2] * box[3]), "iscrowd": int(i in crowds)}
        for i, (image, category, box) in enumerate(objects)
    ]  # fmt: skip
    dataset = indexed(images, annotations).dataset
    return {**dataset, "images": [{**image, "file_name": f"{image['id']}.png"} for image in dataset["images"]]}


def rows_of(detections) -> np.ndarray:
    """(image, category, xywh box, score) detections as an array (n, 7)."""
    rows = [[image, *box, score, category] for image, category, box, score in detections]
    return np.array(rows, dtype=np.float64).reshape(-1, 7)


def random_case(crowds=()) -> tuple[dict, np.ndarray]:
    """40 images with up to 12 objects, and detections with errors of all kinds."""
    generator = np.random.default_rng(0)
    objects, detections = [], []
    for image in range(1, 41):
        for _ in range(generator.integers(0, 13)):
            box = [*generator.uniform(0, 80, 2), *generator.uniform(8, 120, 2)]
            category = int(generator.choice([NUT, BOLT]))
            objects.append((image, category, box))
            for _ in range(generator.integers(0, 3)):
                noise = generator.normal(0, generator.choice([0.03, 0.3]), 4) * [box[2], box[3], box[2], box[3]]
                moved = [*(np.array(box) + noise)[:2], *(np.array(box) + noise)[2:].clip(2)]
                label = category if generator.random() < 0.8 else int(generator.choice([NUT, BOLT]))
                detections.append((image, label, moved, generator.uniform(0.2, 1)))
        detections.append((image, NUT, [*generator.uniform(0, 80, 2), 30, 30], generator.uniform(0, 0.6)))
    return truth_of(objects, range(1, 41), crowds), rows_of(detections)


def pycocotools_stats(truth: dict, rows: np.ndarray, images=None) -> dict:
    """pycocotools' twelve metrics by name, of these images; None for -1."""
    evaluation = match(truth, rows)
    if images is not None:
        evaluation.params.imgIds = images
        evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {name: value if value >= 0 else None for name, value in zip(METRICS, evaluation.stats, strict=True)}


def test_metrics_equal_those_of_pycocotools():
    truth, rows = random_case(crowds=(3, 50))
    found = diagnose(truth, rows)
    expected = pycocotools_stats(truth, rows)
    assert found["metrics"] == pytest.approx(expected, abs=1e-12)
    assert {row["size"]: row["AP"] for row in found["sizes"]} == pytest.approx(
        {"small": expected["APS"], "medium": expected["APM"], "large": expected["APL"]}
    )
    objects = [a for a in truth["annotations"] if not a["iscrowd"]]
    assert sum(row["objects"] for row in found["sizes"]) == len(objects) == found["objects"]
    counts = Counter(a["image_id"] for a in objects)
    for row in found["crowding"]:
        least, _, most = row["objects_per_image"].replace(" or more", " to 99").partition(" to ")
        own = [i for i in range(1, 41) if int(least) <= counts[i] <= int(most or least)]
        assert (row["images"], row["objects"]) == (len(own), sum(counts[i] for i in own))
        own_stats = pycocotools_stats(truth, rows, own)
        assert row["AP"] == pytest.approx(own_stats["AP"]) and row["AP50"] == pytest.approx(own_stats["AP50"])
    for row, category in zip(found["classes"], CATEGORIES, strict=True):
        one = {**truth, "annotations": [a for a in truth["annotations"] if a["category_id"] == category["id"]]}
        assert row["objects"] == sum(not a["iscrowd"] for a in one["annotations"])
        assert row["AP"] == pytest.approx(pycocotools_stats(one, rows)["AP"])


@pytest.mark.parametrize(
    "kind, change",
    [
        ("classification", lambda rows: [*rows[1:], (1, BOLT, OBJECTS[0][2], 0.95)]),
        ("localisation", lambda rows: [*rows[1:], (1, NUT, [30, 10, 40, 40], 0.95)]),
        ("both", lambda rows: [*rows, (1, BOLT, [30, 10, 40, 40], 0.95)]),
        ("duplicate", lambda rows: [*rows, (1, NUT, [11, 11, 40, 40], 0.85)]),
        ("background", lambda rows: [*rows, (3, NUT, [10, 10, 40, 40], 0.95)]),
        ("missed", lambda rows: rows[1:]),
    ],
)
def test_a_planted_error_is_counted_and_costs_ap(kind, change):
    found = diagnose(truth_of(OBJECTS), rows_of(change(PERFECT)), threshold=0.0)
    rows = {row["error"]: row for row in found["errors"]["types"]}
    assert {name: row["count"] for name, row in rows.items()} == {**dict.fromkeys(rows, 0), kind: 1}
    # Correcting it brings AP50 back to 1; a wrong class also spoils the other class.
    assert rows[kind]["costs"] == pytest.approx(1 - found["errors"]["AP50"], abs=1e-6) and rows[kind]["costs"] > 0
    assert any(kind in text for text in summary(found))
    # The image with the error comes first, and the picture names the kind.
    worst = found["worst_images"][0]
    names = [d["error"] for d in worst["detections"] if d["error"]]
    assert names == ([] if kind == "missed" else [kind])
    assert worst["wrong"] == len(names) and worst["missed"] == sum(not o["found"] for o in worst["objects"])


def test_kinds_of_single_detections_agree_with_the_counts():
    truth, rows = random_case()
    evaluation = evaluator(truth, rows)
    diagnostics = evaluation.image_diagnostics()
    kinds = Counter()
    for i, row in enumerate(rows):
        own = [a for a in truth["annotations"] if a["image_id"] == row[0]]
        if diagnostics["dt_status"][i + 1] == "fp":
            kinds[error_of(row, own, [diagnostics["gt_status"][a["id"]] == "matched" for a in own])] += 1
    counts = {row["error"]: row["count"] for row in diagnose(truth, rows)["errors"]["types"]}
    assert counts.pop("missed") and min(kinds.values()) > 0 and dict(kinds) == counts


def test_counts_and_costs_equal_those_of_tide():
    found = diagnose(*random_case())["errors"]
    # Recorded from tidecv 1.0.1, TIDE's own package, on the same data; costs in percent.
    expected = {
        "classification": (9, 2.77201), "localisation": (124, 30.16266), "both": (10, 0.40670),
        "duplicate": (28, 1.48034), "background": (12, 0.70028), "missed": (85, 12.47995),
    }  # fmt: skip
    own = {row["error"]: (row["count"], pytest.approx(100 * row["costs"], abs=2e-5)) for row in found["types"]}
    assert own == expected
    costs = (found["AP50"], found["all_false_positives_cost"], found["all_missed_objects_cost"])
    assert costs == pytest.approx((0.2775064, 0.2224936, 0.2748223), abs=1e-6)


def test_planted_label_errors_are_found():
    wrong, doubled = (2, BOLT, OBJECTS[2][2]), (1, NUT, [100, 101, 40, 40])
    detections = [*PERFECT, (3, BOLT, [50, 50, 40, 40], 0.65), (3, BOLT, [51, 50, 40, 40], 0.6)]
    found = diagnose(truth_of([*OBJECTS[:2], wrong, OBJECTS[3], doubled]), rows_of(detections), 0.5)["label_errors"]
    keys = ("kind", "image_id", "annotated", "detected", "score")
    assert [tuple(case[key] for key in keys) for case in found] == [
        ("annotated twice", 1, "nut", None, None),
        ("wrong class", 2, "bolt", "nut", pytest.approx(0.7)),
        ("not annotated", 3, None, "bolt", 0.65),  # reported once
    ]
    assert found[0]["bbox"] == list(doubled[2]) and found[0]["other_bbox"] == OBJECTS[1][2]
    # A detection that agrees with the annotation defends it, and so does a higher threshold.
    defended = rows_of([*PERFECT, (1, BOLT, OBJECTS[0][2], 0.85)])
    assert diagnose(truth_of(OBJECTS), defended, 0.5)["label_errors"] == []


def test_crowds_are_neither_errors_nor_label_errors():
    crowd = (3, NUT, [0, 0, 150, 150])
    detections = [*PERFECT, (3, NUT, [10, 10, 40, 40], 0.95)]
    found = diagnose(truth_of([*OBJECTS, crowd], crowds=(4,)), rows_of(detections), 0.5)
    assert found["worst_images"] == found["label_errors"] == [] and found["objects"] == 4
    assert found["confusion"] == {"classes": ["nut", "bolt"], "matrix": [[3, 0, 0], [0, 1, 0], [0, 0, 0]]}


def test_confusions_are_counted_from_the_threshold_on():
    detections = [*PERFECT[1:], (1, BOLT, OBJECTS[0][2], 0.95), (3, NUT, [9, 9, 40, 40], 0.3)]
    truth = truth_of(OBJECTS)
    assert diagnose(truth, rows_of(detections), 0.5)["confusion"]["matrix"] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert diagnose(truth, rows_of(detections), 0.0)["confusion"]["matrix"][2] == [1, 0, 0]


def test_the_default_threshold_has_the_best_f1():
    detections = rows_of([(1, NUT, [0, 0, 9, 9], score) for score in (0.9, 0.8, 0.7, 0.6)])
    status = {1: "tp", 2: "fp", 3: "tp", 4: "fp"}
    assert best_threshold(detections, status, objects=2) == 0.7
    assert best_threshold(detections, status, objects=1) == 0.9
    assert best_threshold(detections, {1: "fp", 4: "fp"}, objects=2) == 0.5
    assert best_threshold(detections[:0], {}, objects=2) == 0.5


@pytest.mark.parametrize("objects, rows", [([], PERFECT), (OBJECTS, []), ([], [])], ids=["no truth", "nothing", "both"])
def test_nothing_to_measure_is_said(objects, rows):
    found = diagnose(truth_of(objects), rows_of(rows))
    assert found["metrics"]["AP"] == (0 if objects else None)
    assert ("nothing to measure" in summary(found)[0]) == (not objects)
    json.dumps(found, allow_nan=False)


HOSTILE = "<img src=x onerror=alert(1)>|"


@pytest.fixture
def data(tmp_path) -> Path:
    """A data set on the disk with a run's folder: a planted wrong label and a planted duplicate."""
    (tmp_path / "images").mkdir()
    for i in (1, 2, 3):
        Image.effect_noise((200, 200), 40).convert("RGB").save(tmp_path / "images" / f"{i}.png")
    truth = truth_of([*OBJECTS[:2], (2, BOLT, OBJECTS[2][2]), OBJECTS[3]])
    truth["categories"] = [{"id": NUT, "name": HOSTILE}, {"id": BOLT, "name": "bolt"}]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "run").mkdir()
    write_results(tmp_path / "run", [*PERFECT, (1, NUT, [11, 11, 40, 40], 0.85)])
    return tmp_path


def write_results(folder: Path, detections) -> None:
    """Write detections as a run's `results.json`."""
    entries = [dict(zip(("image_id", "category_id", "bbox", "score"), row, strict=True)) for row in detections]
    (folder / "results.json").write_text(json.dumps(entries))


def call(data: Path, *words) -> int:
    """Run the command with the data set on the disk; the exit status."""
    flags = ["--val_images", data / "images", "--val_annotations", data / "truth.json", "--output_dir", data / "out"]
    return main([str(word) for word in (*words, *flags)])


@pytest.mark.parametrize("source", ["run", "run/results.json"])
def test_the_command_writes_a_table_json_and_a_page(data, capsys, source):
    assert call(data, data / source, "--threshold", 0.5) == 0
    said = capsys.readouterr().out
    assert sorted(path.name for path in (data / "out").iterdir()) == [
        f"diagnose.{kind}" for kind in ("html", "json", "md")
    ]
    assert (data / "out" / "diagnose.md").read_text().strip() in said and "# Diagnosis of run" in said
    found = json.loads((data / "out" / "diagnose.json").read_text())
    assert [case["kind"] for case in found["label_errors"]] == ["wrong class"]
    detections = {image["image_id"]: image["detections"] for image in found["worst_images"]}
    assert [d["error"] for d in detections[1]] == [None, "duplicate", None]
    truth = read_truth(data / "truth.json")
    expected = pycocotools_stats(truth, read_results(data / "run" / "results.json", truth))
    assert found["metrics"] == pytest.approx(expected)
    page = Page((data / "out" / "diagnose.html").read_text())
    # Two worst images and a label error, each as annotated and as detected.
    assert len(page.sources) == 6 and all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert {"Errors by kind", "Confusion matrix", "Worst images", "duplicate", HOSTILE} <= set(page.texts)


def test_pictures_are_limited_and_missing_images_are_named(data, capsys):
    (data / "images" / "2.png").unlink()
    assert call(data, data / "run") == 0
    texts = Page((data / "out" / "diagnose.html").read_text()).texts
    assert any("2.png" in text and "No detections:" in text for text in texts)
    assert call(data, data / "run", "--pictures", 0) == 0
    page = Page((data / "out" / "diagnose.html").read_text())
    assert page.sources == [] and "No pictures: --pictures is 0" in page.texts


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A small Conditional DETR that knows the drawn shapes."""
    path = tmp_path / "trained" / "checkpoint.pth"
    path.parent.mkdir()
    path.write_bytes(lzma.decompress((RECORDED / "checkpoint.pth.xz").read_bytes()))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("whole_run", [True, False], ids=["run", "checkpoint"])
def test_a_checkpoint_is_evaluated_first(checkpoint, shapes, tmp_path, whole_run, capsys):
    out, source = tmp_path / "out", checkpoint.parent if whole_run else checkpoint
    flags = ["--coco_path", str(shapes), "--device", "cpu", "--num_workers", "0"]
    assert main([str(source), *flags, "--output_dir", str(out)]) == 0
    assert "evaluating" in capsys.readouterr().out
    record = json.loads((out / "evaluation.json").read_text())
    assert record["checkpoint"] == str(checkpoint) and record["images"] == 6
    if not whole_run:
        # As `--eval` does.
        model = "--backbone_stages 2 --hidden_dim 16 --dim_feedforward 32 --num_workers 0".split()
        words = [*SMALL_MODEL["conditional"], *model, "--resume", checkpoint, "--coco_path", shapes, "--eval"]
        assert run("conditional", *words, "--output_dir", tmp_path / "eval") == 0
        expected = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
        assert record["figures"] == pytest.approx(expected["figures"], abs=1e-6)
        return
    # The folder of the diagnosis is itself one of a run with detections.
    capsys.readouterr()
    assert main([str(out), *flags, "--output_dir", str(tmp_path / "again")]) == 0
    assert "evaluating" not in capsys.readouterr().out
    first, second = (json.loads((f / "diagnose.json").read_text()) for f in (out, tmp_path / "again"))
    assert first["metrics"] == second["metrics"] and first["errors"] == second["errors"]


def test_a_folder_with_a_configuration_is_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert in_folder(tmp_path, None) == (None, tmp_path)
    write_results(tmp_path, [])
    assert in_folder(tmp_path, None) == (tmp_path / "results.json", None)


@pytest.mark.slow
def test_detections_from_before_the_last_training_are_not_used(checkpoint, shapes, tmp_path, capsys):
    write_results(checkpoint.parent, [])
    record = {"figures": {"AP": 0.9}, "recall": [], "classes": [], "images": 6}
    (checkpoint.parent / "evaluation.json").write_text(json.dumps(record))
    flags = ["--coco_path", shapes, "--device", "cpu", "--num_workers", 0, "--output_dir", tmp_path / "out"]
    assert main(list(map(str, [checkpoint.parent, *flags]))) == 0
    assert f"evaluating {checkpoint}" in capsys.readouterr().out


def test_a_folder_in_hugging_faces_layout_is_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert in_folder(tmp_path, None) == (None, tmp_path)


@pytest.mark.parametrize(
    "source, change, message",
    [
        ("nothing", "", "nothing: no such file or folder; pass a run's folder, a checkpoint, or a results.json"),
        ("empty", "", "empty: not the folder of a run; expected results.json, best.pth or checkpoint.pth in it"),
        ("logged", "", "logged: a run without an evaluation to diagnose"),
        ("other.pth", "", "other.pth: fits none of the variants"),
        ("words.pth", "", "words.pth: not a file of tensors but a text file; pass a checkpoint"),
        ("truth.json", "", "truth.json: not detections but a JSON dict"),
        ("broken.json", "", "broken.json: not a JSON file ("),
        ("run", "no annotations", "the annotations are missing: pass --coco_path DIR"),
        ("run", "half the flags", "--val_images and --val_annotations belong together"),
        ("run", "test images", "run: was evaluated on test images"),
        ("run", "other data", "has detections of image 9, which the annotations lack"),
        ("run", "other AP", "the evaluation next to it recorded 0.111"),
        ("run", "NaN", "is not finite: the model has diverged"),
        ("run", "no score", "entry 0 is not a detection"),
        ("run", "--device cuda:99", "cuda:99"),
        ("run", "taken", "diagnose.html: cannot be written, there is a folder of this name"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(data, capsys, source, change, message):
    (data / "empty").mkdir()
    (data / "logged").mkdir()
    (data / "logged" / "log.txt").write_text(json.dumps({"epoch": 0, "train_loss": 3.0}))
    torch.save({"model": {"some.weight": torch.zeros(3)}}, data / "other.pth")
    (data / "words.pth").write_text("words")
    (data / "broken.json").write_text("[{")
    record = {"figures": {"AP": 0.111}, "recall": [], "classes": [], "images": 3}
    if change in ("test images", "other AP"):
        record |= {"set": "test"} if change == "test images" else {}
        (data / "run" / "evaluation.json").write_text(json.dumps(record))
    wrong = {
        "other data": [(9, NUT, [1, 1, 2, 2], 0.5)], "NaN": [(1, NUT, [1, 1, 2, 2], float("nan"))],
        "no score": [(1, NUT, [1, 1, 2, 2], None)],
    }  # fmt: skip
    if change in wrong:
        write_results(data / "run", wrong[change])
    if change == "taken":
        (data / "out" / "diagnose.html").mkdir(parents=True)
    before = sorted(data.rglob("*"))
    words = change.split() if change.startswith("--") else []
    if change in ("no annotations", "half the flags"):
        flags = ["--val_images", str(data / "images")] if change == "half the flags" else []
        status = main([str(data / source), *flags, "--output_dir", str(data / "out")])
    else:
        status = call(data, data / source, *words)
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.startswith("python -m enact_common.diagnose: error: ")
    assert sorted(data.rglob("*")) == before


def test_without_the_extra_its_install_is_named(data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    assert call(data, data / "run") == 2
    assert "pip install 'enact-detection[diagnose]'" in capsys.readouterr().err
    with pytest.raises(UserError, match="hotcoco"):
        diagnose(truth_of(OBJECTS), rows_of(PERFECT))
