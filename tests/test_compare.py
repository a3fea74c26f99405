"""The comparison of runs: differing settings, metrics, and the HTML page in a browser."""

import base64
import errno
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, run
from PIL import Image
from test_plots import evaluation_of, original_log, without_figures, write_evaluation, write_log

from enact_common.checkpoints.files import load_checkpoint
from enact_common.compare import pictures
from enact_common.compare.__main__ import main
from enact_common.compare.recorded import RecordedRun, read_run
from enact_common.compare.tables import classes_table, costs_table, figures_table
from enact_common.compare.terms import differing_flags, inequalities, settings_table
from enact_common.data.annotations import load_annotations
from enact_common.evaluation.coco import METRICS, evaluation_record
from enact_common.evaluation.stored import match, read_results, read_truth

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory) -> dict[str, Path]:
    """Two runs that differ only in the attention, and one that differs in more."""
    folder = tmp_path_factory.mktemp("trained")
    for name, flags in (
        ("enact", "--epochs 2"),
        ("plain", "--epochs 2 --encoder_attention mhsa"),
        ("other", "--epochs 1 --encoder_attention mhsa --seed 7 --limit_val 3 --num_workers 1"),
    ):
        data = ["--coco_path", shapes, "--output_dir", folder / name]
        assert run("conditional", *SMALL_MODEL["conditional"], *data, *flags.split()) == 0
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def drawings(monkeypatch):
    """The arguments of every `draw_detections` call: (pixels, boxes, names, scores, labels)."""
    calls = []
    real = pictures.draw_detections

    def draw_detections(*call):
        calls.append(call)
        return real(*call)

    monkeypatch.setattr(pictures, "draw_detections", draw_detections)
    return calls


def compare(*words) -> int:
    """Run the comparison on the CPU; the exit status."""
    return main([*map(str, words), "--device", "cpu"])


class Page(HTMLParser):
    """A parsed HTML page: the URLs it loads and its visible text.

    Attributes:
        sources: all URLs that a browser would load.
        texts: one text per element.
    """

    LOADING = ("src", "href", "srcset", "data", "action", "poster", "xlink:href")

    def __init__(self, page: str):
        super().__init__()
        self.sources: list[str] = []
        self.texts: list[str] = []
        self._inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in self.LOADING and value]
        self._inside.append(tag)

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        if data.strip() and not {"script", "style"} & set(self._inside):
            self.texts.append(data.strip())


@pytest.mark.parametrize(
    "given, budget", [({}, "1/16 of the tokens"), ({"token_budget": 9}, "9")], ids=["default", "9"]
)
def test_rivals_are_shown_with_their_budget(given, budget):
    attentions = ("avgpool", "enact")
    runs = [RecordedRun(name, args={"encoder_attention": name, **given}) for name in attentions]
    rows = [[cell.text for cell in row] for row in settings_table(runs).rows]
    assert rows == [["encoder attention", f"avgpool, token budget {budget}", "ENACT"]]
    assert inequalities(runs) == []


@pytest.mark.parametrize("recorded", [True, False], ids=["evaluation.json", "only log.txt"])
def test_metrics_that_could_not_be_measured_are_dashes(recorded, tmp_path, capsys):
    rows = [{"epoch": 0, "train_loss": 3.0, "test_coco_eval_bbox": [-1.0] * 12}]
    (tmp_path / "log.txt").write_text(json.dumps(rows[0]))
    if recorded:
        record = {"figures": dict.fromkeys(METRICS, -1.0), "recall": [], "classes": [], "images": 2, "epoch": 0}
        (tmp_path / "evaluation.json").write_text(json.dumps(record))
    run = read_run(tmp_path, "run")
    assert run.figures == {} and run.best is None
    assert {cell.text for row in figures_table([run]).rows for cell in row[1:]} == {"-"}
    assert compare(tmp_path, "--output_dir", tmp_path / "out") == 0
    assert "-1" not in capsys.readouterr().out.replace(str(tmp_path), "")


def test_given_photos_are_rotated_by_their_exif_orientation(trained, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 64)).save(tmp_path / "photo.jpg", exif=exif)
    (scene,) = pictures.given_scenes([tmp_path / "photo.jpg"], 1)
    ((_, (panel,)),) = pictures.side_by_side([read_run(trained["enact"], "run")], [scene], 0.0, "cpu")
    with Image.open(io.BytesIO(base64.b64decode(panel.source.partition(",")[2]))) as picture:
        assert picture.height * 64 == picture.width * 80


def test_every_evaluation_writes_its_record(trained, shapes, tmp_path):
    epochs = [json.loads(line) for line in (trained["enact"] / "log.txt").read_text().splitlines()]
    record = json.loads((trained["enact"] / "evaluation.json").read_text())
    assert (record["set"], record["epoch"], record["images"]) == ("val", 1, 6) and "checkpoint" not in record
    assert list(record["figures"].values()) == epochs[-1]["test_coco_eval_bbox"]
    checkpoint = trained["enact"] / "checkpoint.pth"
    data = ["--coco_path", shapes, "--output_dir", tmp_path, "--resume", checkpoint]
    assert run("conditional", *SMALL_MODEL["conditional"], *data, "--eval") == 0
    again = json.loads((tmp_path / "evaluation.json").read_text())
    assert again.pop("checkpoint") == str(checkpoint) and again == record
    # An evaluation's folder is also a run, with the evaluated checkpoint.
    assert read_run(tmp_path, "eval").checkpoint == checkpoint


@pytest.fixture(scope="module")
def evaluated(trained, shapes, tmp_path_factory) -> dict[str, Path]:
    """Two evaluations of the same images: one with the objects found in every image, one with an object in half of
    them. Their detections are drawn, since the small models find nothing."""
    data = load_annotations(shapes / "annotations" / "instances_val2017.json")
    truth = read_truth(shapes / "annotations" / "instances_val2017.json")
    folders = {}
    for name, every in (("good", 1), ("poor", 2)):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        boxes = [a for a in data["annotations"] if not a["iscrowd"] and a["id"] % every == 0]
        keys = ("image_id", "category_id", "bbox")
        rows = [{**{key: a[key] for key in keys}, "score": 0.5 + 0.4 / a["id"]} for a in boxes]
        (folder / "results.json").write_text(json.dumps(rows))
        evaluation = match(truth, read_results(folder / "results.json", truth))
        evaluation.accumulate()
        evaluation.summarize()
        source = {"set": "val", "epoch": 1, "checkpoint": str(trained["enact"] / "checkpoint.pth")}
        (folder / "evaluation.json").write_text(json.dumps({**source, **evaluation_record(evaluation)}))
    return folders


def test_differences_have_intervals_that_tell_chance(evaluated, tmp_path, capsys):
    folders = [evaluated["good"], evaluated["poor"], evaluated["good"]]
    words = [*folders, "--names", "good", "poor", "same", "--pictures", 0, "--resamples", 200]
    for folder in ("one", "two"):
        assert compare(*words, "--output_dir", tmp_path / folder) == 0
    record = json.loads((tmp_path / "one" / "compare.json").read_text())
    assert record == json.loads((tmp_path / "two" / "compare.json").read_text())  # seeded
    rows = {(row["metric"], row["run"]): row for row in record["differences"]}
    stats = {run["name"]: run["metrics"] for run in record["runs"]}
    for name in ("AP", "AP50", "AP75"):
        row = rows[name, "poor"]
        assert row["difference"] == pytest.approx(stats["poor"][name] - stats["good"][name])
        assert row["low"] <= row["difference"] <= row["high"] < 0 and not row["may_be_chance"]
        assert rows[name, "same"]["may_be_chance"] and rows[name, "same"]["low"] == rows[name, "same"]["high"] == 0
    page = Page((tmp_path / "one" / "compare.html").read_text())
    assert {"AP poor", "lower, hardly chance", "may be chance", "Differences to good"} <= set(page.texts)
    assert "may be chance" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, reason",
    [
        ("", ""),
        ("--resamples 0", "--resamples is 0"),
        ("no detections", "no detections (results.json) of the latest evaluation in poor; write them with enact eval"),
        ("trained on", "no detections (results.json) of the latest evaluation in poor"),
        ("other set", "evaluated on different sets (val against train)"),
        ("other detections", "but the evaluation next to it recorded"),
        ("other images", "has detections of image 999, which the annotations lack"),
        ("no list", "not detections but a JSON dict"),
        ("no data", "no checkpoint records its evaluation data"),
    ],
)
def test_missing_intervals_are_explained(evaluated, tmp_path, capsys, change, reason):
    folders = [tmp_path / name for name in ("good", "poor")]
    for folder in folders:
        shutil.copytree(evaluated[folder.name], folder)
    results, record = (folders[1] / name for name in ("results.json", "evaluation.json"))
    rows, entry = json.loads(results.read_text()), json.loads(record.read_text())
    if change == "no detections":
        results.unlink()
    elif change == "trained on":
        record.write_text(json.dumps({key: value for key, value in entry.items() if key != "checkpoint"}))
    elif change == "other set":
        record.write_text(json.dumps({**entry, "set": "train"}))
    elif change == "other detections":
        results.write_text(json.dumps(rows[:1]))
    elif change == "other images":
        results.write_text(json.dumps([*rows, {**rows[0], "image_id": 999}]))
    elif change == "no list":
        results.write_text("{}")
    elif change == "no data":
        (folders[0] / "evaluation.json").write_text(json.dumps({**entry, "checkpoint": "gone"}))
    flags = ["--resamples", 20, *(change.split() if change.startswith("--") else [])]
    assert compare(*folders, "--pictures", 0, *flags, "--output_dir", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert ("no intervals of the differences" in said) == bool(reason) and reason in said
    assert bool(json.loads((tmp_path / "out" / "compare.json").read_text())["differences"]) == (not reason)
    texts = Page((tmp_path / "out" / "compare.html").read_text()).texts
    assert any(reason in text for text in texts)


def test_runs_that_differ_only_in_the_attention_are_on_equal_terms(trained):
    runs = [read_run(trained[name], name) for name in ("enact", "plain")]
    assert inequalities(runs) == [] and differing_flags(runs) == {}
    table = settings_table(runs)
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    marked = [row[0].text for row, mark in zip(table.rows, table.marked, strict=True) if mark]
    assert marked == ["encoder attention", "parameters"]
    assert rows["encoder attention"] == ["ENACT", "plain (mhsa)"]
    assert rows["ENACT's settings"] == ["sigma 3, clusters windows", "-"]
    assert rows["epochs"] == ["2 of 2"] * 2 and rows["detector"] == ["conditional"] * 2


def test_unequal_terms_are_named(trained):
    runs = [read_run(trained[name], name) for name in ("enact", "other")]
    report = "\n".join(inequalities(runs))
    for text in (
        "differ in more than the encoder attention: --epochs (2 against 1), --limit_val (none against 3), "
        "--seed (42 against 7)",
        "trained for different numbers of epochs (2 against 1)",
        "evaluated after different numbers of epochs (2 against 1)",
        "evaluated on different numbers of images (6 against 3)",
        "different classes or objects",
        "Time and memory are not on equal terms: --num_workers (0 against 1)",
    ):
        assert text in report


@pytest.mark.parametrize(
    "flags, equal",
    [
        ({"output_dir": "elsewhere", "eval_every": 5}, True),
        ({"output_dir": "out", "resume": "out/checkpoint.pth", "start_epoch": 3}, True),
        ({"output_dir": "out", "resume": "coco/checkpoint.pth"}, False),
        ({"smoothing_sigma": 9.0, "enact_per_image": True}, True),
        ({"train_sizes": [64]}, False),
        ({"a_later_versions_flag": 1}, True),
    ],
)
def test_flags_that_make_terms_unequal(trained, flags, equal):
    one, two = (read_run(trained["enact"], name) for name in ("one", "two"))
    two.args.update(flags)
    assert (inequalities([one, two]) == []) == equal


def test_metrics_are_compared_with_the_first_run(tmp_path):
    one = write_evaluation(tmp_path / "one", evaluation_of(["nut", "bolt"], 0.5))
    record = evaluation_of(["nut"], 0.6)
    record["figures"] |= {"APS": -1.0, "AR1": 0.4, "AR10": 0.50001, "AR100": 0.4999}
    two = write_evaluation(write_log(tmp_path / "two", original_log(3)), record)
    runs = [read_run(folder, folder.name) for folder in (one, two)]
    rows = {row[0].text: [cell.plain() for cell in row[1:]] for row in figures_table(runs).rows}
    assert rows["AP"] == ["0.500", "**0.600** (+0.100)"]
    assert rows["APS"] == ["0.500", "-"]
    assert rows["AR1"] == ["**0.500**", "0.400 (-0.100)"]
    # Values that round to the same text count as equal.
    assert rows["AR10"] == rows["AR100"] == ["0.500", "0.500 (+0.000)"]
    assert rows["highest AP"] == ["-", "0.300"] and rows["at epoch"] == ["-", "3"]
    classes = {row[0].text: [cell.plain() for cell in row[1:]] for row in classes_table(runs).rows}
    assert classes["nut"] == ["10", "0.300", "**0.360** (+0.060)", "0.500", "**0.600** (+0.100)"]
    assert classes["bolt"] == ["11", "0.225", "-", "0.375", "-"]


def test_classes_with_the_same_name_have_separate_rows(tmp_path):
    two = evaluation_of(["nut", "nut", "bolt"], 0.6)
    folders = [
        write_evaluation(tmp_path / name, record)
        for name, record in (("one", evaluation_of(["nut", "bolt", "nut"])), ("two", two))
    ]
    table = classes_table([read_run(folder, folder.name) for folder in folders])
    rows = {row[0].text: [cell.text for cell in row[1:4]] for row in table.rows}
    # The ids of a name may differ if it occurs once in each run.
    assert rows == {
        "nut (id 1)": ["10", "0.300", "0.360"],
        "bolt": ["11 / 12", "0.250", "0.240"],
        "nut (id 3)": ["12", "0.200", "-"],
        "nut (id 2)": ["11", "-", "0.300"],
    }


def test_a_class_with_invalid_metrics_has_dashes(tmp_path):
    folder = write_evaluation(tmp_path / "broken", without_figures(evaluation_of(["nut", "bolt"]), 0))
    table = classes_table([read_run(folder, "broken"), read_run(folder, "again")])
    assert [cell.plain() for cell in table.rows[0]] == ["nut", "10", "-", "-", "-", "-"]
    assert [cell.plain() for cell in table.rows[1]][2:] == ["0.225", "0.225 (+0.000)", "0.375", "0.375 (+0.000)"]
    assert compare(folder, "--output_dir", tmp_path / "out") == 0


def test_a_page_that_cannot_be_written_is_named(tmp_path, capsys, monkeypatch):
    record = write_evaluation(tmp_path / "record", evaluation_of(["nut"]))

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert compare(record, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"error: {tmp_path / 'out' / 'compare.md'}: cannot be written ({os.strerror(errno.ENOSPC)})" in error
    assert not list((tmp_path / "out").iterdir())


def test_costs_are_medians_with_ratios_and_dashes(tmp_path):
    seconds = [{"train_seconds": s, "test_seconds": 5.0, "peak_memory_gib": s / 100} for s in (100.0, 50.0, 60.0)]
    rows = [{**row, **more} for row, more in zip(original_log(3), seconds, strict=True)]
    half = [{**row, "train_seconds": row["train_seconds"] / 2} for row in rows]
    folders = [
        write_log(tmp_path / name, log) for name, log in (("new", rows), ("old", original_log()), ("half", half))
    ]
    table = costs_table([read_run(folder, folder.name) for folder in folders])
    found = {row[0].text: [cell.plain() for cell in row[1:]] for row in table.rows}
    assert found["training, seconds per epoch"] == ["60.0", "-", "**30.0** (x 0.50)"]
    assert found["evaluation, seconds"] == ["5.0", "-", "5.0 (x 1.00)"]
    assert found["peak memory, GiB"] == ["1.00", "-", "1.00 (x 1.00)"]
    assert found["parameters"] == ["41,302,368", "41,302,368 (x 1.00)", "41,302,368 (x 1.00)"]


def test_the_best_checkpoint_is_preferred_to_the_latest(trained, tmp_path):
    for name in ("checkpoint.pth", "best.pth"):
        shutil.copy(trained["enact"] / "checkpoint.pth", tmp_path / name)
    assert read_run(tmp_path, "run").checkpoint == tmp_path / "best.pth"


def test_an_original_checkpoint_is_recognised_by_its_tensors(trained, tmp_path):
    state = load_checkpoint(str(trained["enact"] / "checkpoint.pth"))
    torch.save({"model": state["model"], "epoch": 4}, tmp_path / "checkpoint.pth")
    original = read_run(tmp_path, "run")
    assert (original.variant, original.args["encoder_attention"], original.epochs_done) == ("conditional", "enact", 5)


def test_the_page_shows_validation_images_with_ground_truth(trained, shapes, drawings, tmp_path, capsys):
    words = [trained["enact"], trained["plain"], "--output_dir", tmp_path, "--pictures", 2, "--threshold", 0]
    assert compare(*words) == 0
    text = capsys.readouterr().out
    assert "Equal terms" in text and (tmp_path / "compare.md").read_text().strip() in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.html", "compare.json", "compare.md"]
    page = Page((tmp_path / "compare.html").read_text())
    assert len([source for source in page.sources if source.startswith("data:image/jpeg;base64,")]) == 6
    data = load_annotations(shapes / "annotations" / "instances_val2017.json")
    first = min(data["images"], key=lambda image: image["id"])
    assert first["file_name"] in page.texts
    pixels, boxes, names, scores, labels = drawings[0]
    truth = [a for a in data["annotations"] if a["image_id"] == first["id"]]
    category = {c["id"]: c["name"] for c in data["categories"]}
    assert pixels.shape == (first["height"], first["width"], 3) and pixels.dtype == np.uint8 and scores is None
    expected = [[x, y, x + width, y + height] for x, y, width, height in (a["bbox"] for a in truth)]
    np.testing.assert_allclose(boxes, expected, rtol=1e-5)
    assert names == [category[a["category_id"]] for a in truth]
    assert len(drawings[1][3]) == len(drawings[1][1]) > 0
    # The label sets the colour, so a class has one label in all pictures.
    assert len({pair for call in drawings for pair in zip(call[2], call[4].tolist(), strict=True)}) <= len(category)


def test_given_images_are_scaled_down_with_their_boxes(trained, drawings, tmp_path):
    (tmp_path / "folder").mkdir()
    for name, size in (("b.png", (1600, 400)), ("a.png", (90, 70)), ("c.png", (80, 80))):
        Image.new("RGB", size, "gray").save(tmp_path / "folder" / name)
    images = [tmp_path / "folder", tmp_path / "folder" / "c.png"]
    words = [trained["enact"], "--output_dir", tmp_path / "out", "--pictures", 2, "--threshold", 0]
    assert compare(*words, "--images", *images) == 0
    assert [call[0].shape[:2] for call in drawings] == [(70, 90), (200, 800), (80, 80)]
    for pixels, boxes, *_ in drawings:
        height, width = pixels.shape[:2]
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
    assert drawings[1][1][:, 2].max() > 90


def test_incomplete_runs_are_compared(trained, tmp_path, capsys):
    log = write_log(tmp_path / "original", original_log()) / "log.txt"
    record = write_evaluation(tmp_path / "record", evaluation_of(["nut"]))
    broken = tmp_path / "broken"
    broken.mkdir()
    torch.save({"model": {"some.weight": torch.zeros(3)}}, broken / "checkpoint.pth")
    runs = [log, record, broken, trained["enact"]]
    assert compare(*runs, "--output_dir", tmp_path / "out", "--pictures", 1) == 0
    assert "The settings of original, record are unknown" in capsys.readouterr().out
    texts = "\n".join(Page((tmp_path / "out" / "compare.html").read_text()).texts)
    assert "No detections: no checkpoint" in texts and "fits none of the variants" in texts


@pytest.mark.parametrize(
    "flags, moved, reason",
    [
        ("--pictures 0", False, "--pictures is 0"),
        ("", True, "gone: no such folder. Pass other images with --images"),
    ],
)
def test_the_page_explains_missing_pictures(trained, tmp_path, capsys, flags, moved, reason):
    shutil.copytree(trained["enact"], tmp_path / "run")
    if moved:
        for path in (tmp_path / "run").glob("*.pth"):
            state = torch.load(path, weights_only=True)
            state["args"]["coco_path"] = str(tmp_path / "gone")
            torch.save(state, path)
    assert compare(tmp_path / "run", "--output_dir", tmp_path / "out", *flags.split()) == 0
    assert "no pictures: " in capsys.readouterr().out
    assert any(reason in text for text in Page((tmp_path / "out" / "compare.html").read_text()).texts)


@pytest.mark.parametrize(
    "words, message",
    [
        ("{tmp}/nothing", "nothing: no such run"),
        ("{tmp}/empty", "empty: not the folder of a run"),
        ("{tmp}/torn", "checkpoint.pth: truncated, or not a file of tensors"),
        ("{run} --names a b", "2 names for 1 runs"),
        ("{run} --images {tmp}/nothing.png", "--images {tmp}/nothing.png: no such file or folder"),
        ("{run} --images {tmp}/empty", "no image in this folder"),
        ("{run} --images {tmp}/words.png", "words.png: not an image"),
        ("{run} --device cuda:99", "cuda:99"),
        ("{run} --output_dir {tmp}/words.png/out", "cannot be created"),
        ("{run} --output_dir {tmp}/taken", "taken/compare.html: cannot be written, there is a folder of this name"),
    ],
)
def test_bad_input_is_refused_before_any_work(trained, tmp_path, capsys, words, message):
    for name in ("empty", "torn"):
        (tmp_path / name).mkdir()
    (tmp_path / "torn" / "checkpoint.pth").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "words.png").write_text("no image")
    (tmp_path / "taken" / "compare.html").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert main(["--output_dir", str(tmp_path / "out"), *words.format(tmp=tmp_path, run=trained["enact"]).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m enact_common.compare: error: ") and message.format(tmp=tmp_path) in error
    assert sorted(tmp_path.rglob("*")) == before


HOSTILE = '</script><img src=https://example.org/x.png onerror="document.title=1">|`${1}'


@pytest.fixture
def hostile_page(trained, tmp_path) -> Path:
    """A page of two runs in which a run's name and a class name contain HTML and a script."""
    shutil.copytree(trained["enact"], tmp_path / "one")
    write_evaluation(tmp_path / "one", evaluation_of(["nut", HOSTILE, "bolt"]))
    runs = [tmp_path / "one", trained["plain"]]
    out = tmp_path / "out"
    assert compare(*runs, "--names", HOSTILE, "plain", "--output_dir", out, "--pictures", 1, "--threshold", 0) == 0
    return out / "compare.html"


def test_names_are_escaped_and_no_url_is_loaded(hostile_page):
    page = Page(hostile_page.read_text())
    assert page.sources and all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert HOSTILE in page.texts and f"AP50 {HOSTILE}" in page.texts
    for name in ("page.css", "page.js"):
        text = (Path(main.__code__.co_filename).parent / name).read_text()
        assert not re.search(r"@import|url\(|fetch|XMLHttp|import\(", text)
    # In Markdown a bar would end the cell.
    lines = (hostile_page.parent / "compare.md").read_text().splitlines()
    assert any(HOSTILE.replace("|", "\\|") in line for line in lines)


def browser() -> str:
    """The path of a headless browser; skips the test if there is none."""
    named = os.environ.get("ENACT_BROWSER")
    executable = named or next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if executable is None:
        pytest.skip("no browser: install " + ", ".join(BROWSERS) + " or set ENACT_BROWSER")
    return executable


def browse(page: Path, profile: Path, *flags: str) -> str:
    """The page's DOM after its scripts have run."""
    command = [
        *(browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
        *(f"--user-data-dir={profile}", "--virtual-time-budget=3000", *flags, page.as_uri()),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


# Use the page as a reader would, and leave the results in the document.
VISIT = """
<script>
const seen = {errors: [], blocked: []};
addEventListener("error", (event) => seen.errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => seen.blocked.push(event.blockedURI));
addEventListener("load", () => setTimeout(() => {
  const lines = () => [...document.querySelectorAll(".plot")].map((plot) => plot.querySelectorAll("path").length);
  const names = () => [...document.querySelectorAll(".sortable tbody th")].map((cell) => cell.textContent);
  seen.lines = lines();
  seen.before = names();
  document.querySelectorAll(".sortable thead button")[2].click();
  seen.falling = names();
  document.querySelectorAll(".sortable thead button")[0].click();
  seen.rising = names();
  const plot = document.querySelector(".plot");
  const box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 11, clientY: box.top + 50}));
  seen.readout = document.querySelector(".readout").textContent;
  plot.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));
  seen.stepped = document.querySelector(".readout").textContent;
  document.querySelector(".runs input").click();
  seen.fewer = lines();
  document.querySelector(".scene button").click();
  seen.open = document.getElementById("large").open;
  document.querySelector("dialog button").click();
  seen.closed = !document.getElementById("large").open;
  seen.title = document.title;
  seen.wide = document.documentElement.scrollWidth <= innerWidth;
  const note = document.createElement("pre");
  note.id = "seen";
  note.textContent = JSON.stringify(seen);
  document.body.append(note);
}, 300));
</script>
"""


def test_the_page_works_in_a_browser(hostile_page, tmp_path):
    visited = tmp_path / "visited.html"
    visited.write_text(hostile_page.read_text().replace("</title>", "</title>" + VISIT, 1))
    document = browse(visited, tmp_path / "profile", "--dump-dom", "--window-size=1200,900")
    note = re.search(r'<pre id="seen">(.*?)</pre>', document, re.DOTALL)
    assert note, "the page's scripts did not run to their end"
    seen = json.loads(note[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["errors"] == seen["blocked"] == []
    assert seen["title"] == f"{HOSTILE} and plain"
    # Two runs with two losses, two APs and a learning rate each; then one run.
    assert seen["lines"] == [4, 4, 2] and seen["fewer"] == [2, 2, 1]
    assert seen["readout"].startswith(f"epoch 2: {HOSTILE} validation ") and "plain training" in seen["readout"]
    assert seen["stepped"].startswith("epoch 1: ")
    # Sorted by the first run's AP, which falls from class to class and is missing for other classes; then by name.
    assert seen["falling"][:3] == ["nut", HOSTILE, "bolt"]
    assert seen["rising"] != seen["falling"] and sorted(seen["rising"]) == sorted(seen["before"])
    assert seen["rising"].index("bolt") < seen["rising"].index("nut")
    assert seen["open"] and seen["closed"] and seen["wide"]


def test_a_browser_renders_the_page(hostile_page, tmp_path):
    picture = tmp_path / "page.png"
    browse(hostile_page, tmp_path / "profile", f"--screenshot={picture}", "--window-size=1200,3000")
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(2**24)
    # Text, charts and pictures have many colours.
    assert len(colours) > 500
