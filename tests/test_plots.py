"""Plots of runs: reading logs and evaluation records, drawing them, and refusing bad input."""

import errno
import json
import os
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from conftest import make_font
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from enact_common.drawing.figures import save
from enact_common.evaluation.coco import METRICS
from enact_common.plots import curves, precision_recall
from enact_common.plots.__main__ import main
from enact_common.plots.detections import plot_detections
from enact_common.training.run_logs import CURVES, read_epochs, read_evaluation, run_names, series
from enact_common.utils.errors import UserError


def original_log(epochs=3, **more):
    """Log rows in the format of the original repositories."""
    return [
        {
            "train_lr": 1e-5,
            "train_class_error": 90.0,
            "train_loss": 20.0 - epoch,
            "train_loss_ce": 1.0,
            "test_class_error": 80.0,
            "test_loss": 21.0 - epoch,
            "test_coco_eval_bbox": [0.1 + epoch / 10, 0.2 + epoch / 10] + [-1.0] * 10,
            "epoch": epoch,
            "n_parameters": 41302368,
            **more,
        }
        for epoch in range(epochs)
    ]


def write_log(folder, rows, end="\n"):
    """Write a run's log with these rows; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text("\n".join(json.dumps(row) for row in rows) + end)
    return folder


def evaluation_of(classes, level=0.5):
    """An evaluation record; each class has one precision at all recalls, from `level` downwards."""
    recall = [i / 100 for i in range(101)]
    rows = []
    for i, name in enumerate(classes):
        height = level * (1 - i / (2 * len(classes)))
        precision = {key: [height * factor] * 101 for key, factor in (("0.5", 1), ("0.75", 0.5), ("mean", 0.6))}
        rows.append(
            {
                "category_id": i + 1,
                "name": name,
                "objects": 10 + i,
                "AP": 0.6 * height,
                "AP50": height,
                "precision": precision,
            }
        )
    figures = dict.fromkeys(METRICS, level)
    return {"set": "val", "epoch": 2, "figures": figures, "images": 6, "recall": recall, "classes": rows}


def write_evaluation(folder, record):
    """Write a run's evaluation record; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """A list that collects the figures instead of saving them."""
    figures: list[Figure] = []
    for module in (curves, precision_recall):
        monkeypatch.setattr(module, "save", lambda figure, picture: figures.append(figure))
    return figures


def lines(axes):
    """The points of each line of a panel."""
    return [[tuple(point) for point in line.get_xydata().tolist()] for line in axes.lines]


def test_the_last_log_row_of_an_epoch_counts_after_a_resume(tmp_path):
    rows = [{"epoch": epoch, "train_loss": loss} for epoch, loss in ((0, 9), (1, 8), (2, 7), (3, 6), (1, 5), (2, 4))]
    folder = write_log(tmp_path, rows, end='\n{"epoch": 3, "train_lo')
    epochs = read_epochs(folder)
    # The run resumed after its first epoch, so earlier rows of later epochs are dropped.
    assert series(epochs, "train_loss") == [(1, 9), (2, 5), (3, 4)]
    assert read_epochs(folder / "log.txt") == epochs


def test_values_that_are_not_numbers_have_no_point(tmp_path):
    values = [1.0, None, "2", float("nan"), True, [3.0], 4]
    epochs = [{"epoch": i, "test_loss": value} for i, value in enumerate(values)]
    assert series(epochs, "test_loss") == [(1, 1.0), (7, 4)]
    assert series(epochs, "test_loss", 0) == [(6, 3.0)]
    assert series(epochs, "test_loss", 1) == series(epochs, "train_loss") == []


def test_run_names_are_the_shortest_that_differ(tmp_path):
    a, b, c = (tmp_path / name for name in ("one/enact", "two/enact", "two/plain"))
    assert run_names([a, c]) == ["enact", "plain"]
    assert run_names([a / "log.txt", b / "evaluation.json", c]) == ["one/enact", "two/enact", "two/plain"]
    assert run_names([a, a], ["x", "y"]) == ["x", "y"]
    for sources, names, message in (
        ([a, b], ["x"], "1 names for 2 runs"),
        ([a, b], ["x", "x"], "'x' appears twice"),
        ([a, b, a], None, "given twice"),
    ):
        with pytest.raises(UserError, match=message):
            run_names(sources, names)


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_curves_show_the_numbers_of_the_log(drawn, tmp_path, runs):
    folders = [write_log(tmp_path / f"run{i}", original_log(3 + i)) for i in range(runs)]
    assert main([*map(str, folders), "--output", str(tmp_path / "curves.png")]) == 0
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == list(CURVES)
    epochs = [read_epochs(folder) for folder in folders]
    for axes, quantities in zip(figure.axes, CURVES.values(), strict=True):
        assert lines(axes) == [series(own, key, place) for own in epochs for _, key, place in quantities]
    # With several runs each run has a colour, otherwise each quantity.
    losses = figure.axes[0].lines
    assert len({line.get_color() for line in losses}) == max(runs, 2)
    texts = [figure.get_suptitle()] if runs == 1 else [text.get_text() for text in figure.legends[0].texts]
    assert texts == [f"run{i} (AP {0.3 + i / 10:.3f} after {3 + i} epochs)" for i in range(runs)]


def test_panels_without_a_number_are_left_out(drawn, tmp_path):
    rows = [{"epoch": 0, "train_loss": 3.0}, {"epoch": 1, "test_loss": 2.0}]
    assert main(["curves", str(write_log(tmp_path, rows)), "--output", str(tmp_path / "c.png")]) == 0
    (axes,) = drawn[0].axes
    assert axes.get_title() == "Loss" and lines(axes) == [[(2, 2.0)], [(1, 3.0)]]


@pytest.mark.parametrize("measured", [[], [0.1]])
def test_a_precision_of_minus_one_has_no_point(drawn, tmp_path, measured):
    rows = [{"epoch": i, "train_loss": 3.0, "test_coco_eval_bbox": [ap] * 12} for i, ap in enumerate([*measured, -1])]
    assert main([str(write_log(tmp_path / "run", rows)), "--output", str(tmp_path / "c.png")]) == 0
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["Loss", "Average precision"][: 1 + len(measured)]
    if measured:
        assert lines(figure.axes[1]) == [[(1, 0.1)]] * 2
    assert figure.get_suptitle() == ("run (AP 0.100 after 1 epochs)" if measured else "run")


def test_precision_by_recall_of_one_run(drawn, tmp_path):
    folder = write_evaluation(tmp_path / "run", evaluation_of(["nut", "bolt"]))
    assert main(["precision-recall", str(folder), "--output", str(tmp_path / "pr.png")]) == 0
    (figure,) = drawn
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["IoU 0.5", "IoU 0.75", "mean over IoU 0.5 to 0.95"]
    assert [line.get_ydata()[0] for line in panels["IoU 0.5"].lines] == pytest.approx([0.5, 0.375, 0.4375])
    legend = [text.get_text() for text in panels["IoU 0.75"].get_legend().texts]
    assert legend == ["0.250  nut", "0.188  bolt", "0.219  mean of all classes"]


def test_the_legend_of_many_classes_names_the_best_and_the_worst(drawn, tmp_path):
    names = [f"class {i}" for i in range(20)]
    folder = write_evaluation(tmp_path / "run", evaluation_of(names))
    assert main(["precision-recall", str(folder), "--output", str(tmp_path / "pr.png")]) == 0
    axes = drawn[0].axes[0]
    assert len(axes.lines) == len(names) + 1
    legend = [text.get_text().split("  ")[1] for text in axes.get_legend().texts]
    assert legend == [*names[:3], *names[-3:], "mean of all classes"]


@pytest.mark.parametrize("classes, panels", [(1, 1), (3, 4), (40, 9)])
def test_several_runs_have_a_panel_for_each_class(drawn, tmp_path, classes, panels):
    names = [f"class {i}" for i in range(classes)]
    one, two = evaluation_of(names, 0.5), evaluation_of(names, 0.6)
    folders = [write_evaluation(tmp_path / name, record) for name, record in (("one", one), ("two", two))]
    # In the last class the second run is worse.
    two["classes"][-1]["AP50"] = 0.01
    write_evaluation(tmp_path / "two", two)
    assert main(["precision-recall", *map(str, folders), "--output", str(tmp_path / "pr.png")]) == 0
    shown = [axes for axes in drawn[0].axes if axes.get_visible()]
    titles = [axes.get_title() for axes in shown]
    assert len(titles) == panels and names[-1] in titles and names[0] in titles
    # One line per run and IoU (0.5, 0.75), each with its AP.
    panel = shown[titles.index(names[0])]
    assert [line.get_ydata()[0] for line in panel.lines] == pytest.approx([0.5, 0.25, 0.6, 0.3])
    assert {text.get_text() for text in panel.get_legend().texts} == {"0.500", "0.250", "0.600", "0.300"}


@pytest.mark.parametrize("runs", [1, 2])
def test_classes_with_equal_names_show_their_ids(drawn, tmp_path, runs):
    folders = [write_evaluation(tmp_path / f"run{i}", evaluation_of(["nut", "bolt", "nut"])) for i in range(runs)]
    assert main(["precision-recall", *map(str, folders), "--output", str(tmp_path / "pr.png")]) == 0
    if runs == 1:
        found = [text.get_text().split("  ")[1] for text in drawn[0].axes[0].get_legend().texts]
        heights = [line.get_ydata()[0] for line in drawn[0].axes[0].lines]
    else:
        found = [axes.get_title() for axes in drawn[0].axes]
        heights = [axes.lines[0].get_ydata()[0] for axes in drawn[0].axes]
    assert found[:3] == ["nut (id 1)", "bolt", "nut (id 3)"]
    assert heights == pytest.approx([0.5, 5 / 12, 1 / 3, 5 / 12])


def test_classes_of_two_runs_are_matched_by_name_not_id(drawn, tmp_path):
    other = evaluation_of(["bolt", "nut"])
    folders = [
        write_evaluation(tmp_path / name, record)
        for name, record in (("one", evaluation_of(["nut", "bolt"])), ("two", other))
    ]
    assert main(["precision-recall", *map(str, folders), "--output", str(tmp_path / "pr.png")]) == 0
    assert [axes.get_title() for axes in drawn[0].axes] == ["nut", "bolt", "mean of all classes"]


def without_figures(record, place):
    """The record with one class whose AP and precision are None or NaN, like that of a broken model."""
    row = record["classes"][place]
    row |= {"AP": float("nan"), "AP50": None}
    row["precision"] = {key: [1.0, *[float("nan")] * 100] for key in row["precision"]}
    return record


def test_values_that_are_not_numbers_are_left_out_of_an_evaluation(tmp_path):
    folder = write_evaluation(tmp_path / "run", without_figures(evaluation_of(["nut", "bolt"]), 0))
    nut, bolt = read_evaluation(folder)["classes"]
    assert (nut["AP"], nut["AP50"], nut["precision"]) == (None, None, {})
    assert bolt == evaluation_of(["nut", "bolt"])["classes"][1]


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("classes", [2, 20])
def test_a_class_without_metrics_does_not_affect_the_others(drawn, tmp_path, runs, classes):
    names = [f"class {i}" for i in range(classes)]
    records = [without_figures(evaluation_of(names), 0), evaluation_of(names)][:runs]
    folders = [write_evaluation(tmp_path / f"run{i}", record) for i, record in enumerate(records)]
    assert main(["precision-recall", *map(str, folders), "--output", str(tmp_path / "pr.png")]) == 0
    for axes in drawn[0].axes:
        assert all(np.isfinite(line.get_ydata()).all() for line in axes.lines)
        assert not any("nan" in text.get_text() for text in axes.get_legend().texts)
    if runs == 1:
        # With a single drawable class there is no line for the mean.
        assert len(drawn[0].axes[0].lines) == (1 if classes == 2 else classes)


# As formulas, the first is a syntax error and the second would look different.
HOSTILE = ("$a_$", r"$x^2$ \$ 5")


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("command", ["curves", "precision-recall"])
def test_names_are_not_read_as_formulas(tmp_path, command, runs):
    folders = []
    for i in range(runs):
        folder = write_log(tmp_path / f"run{i}", original_log())
        folders.append(write_evaluation(folder, evaluation_of([f"{name} class" for name in HOSTILE])))
    picture, names = tmp_path / "picture.svg", [f"{name} run" for name in HOSTILE[:runs]]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert main([command, *map(str, folders), "--output", str(picture), "--names", *names]) == 0
    text = picture.read_text()
    expected = names if command == "curves" else [*names, *(f"{name} class" for name in HOSTILE)]
    assert all(name in text for name in expected)


@pytest.mark.parametrize("command, runs", [("curves", 2), ("precision-recall", 1), ("precision-recall", 2)])
@pytest.mark.parametrize("installed", [True, False])
def test_names_in_chinese_are_drawn_or_warned_about(installed, command, runs, fonts, tmp_path, caplog, monkeypatch):
    if installed:
        # A new font family per test, since matplotlib caches families.
        make_font(fonts / f"{tmp_path.name}.ttf", "白血球红")
    classes = ["白血球", "红血球 $5", "Zelle"]
    folders = []
    for name in ("白", "红")[:runs]:
        folders.append(write_log(tmp_path / name, original_log()))
        write_evaluation(folders[-1], evaluation_of(classes))
    figures = []
    for module in (curves, precision_recall):
        monkeypatch.setattr(module, "save", lambda *args: figures.append(args[0]) or save(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([command, *map(str, folders), "--output", str(tmp_path / "p.png")]) == 0
    texts = [text.get_text() for text in figures[0].findobj(Text)]
    shown = ["白", "白血球"][command == "precision-recall"]
    assert any(shown in text for text in texts) == installed
    assert any(ascii(shown)[1:-1] in text for text in texts) != installed
    said = [record.getMessage() for record in caplog.records]
    assert (said == []) if installed else (len(said) == 1 and "apt install fonts-noto-cjk" in said[0])


def test_names_at_boxes_are_not_read_as_formulas(tmp_path):
    image, truth = np.zeros((40, 60, 3), np.uint8), [{"bbox": [5, 5, 20, 20], "category_id": 1}]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_detections([image], [truth], [[]], {1: HOSTILE[0]}, tmp_path / "picture.svg")
    assert HOSTILE[0] in (tmp_path / "picture.svg").read_text()


@pytest.mark.parametrize("command", ["curves", "precision-recall"])
def test_a_picture_that_cannot_be_written_is_named(tmp_path, capsys, monkeypatch, command):
    folder = write_evaluation(write_log(tmp_path / "run", original_log()), evaluation_of(["nut"]))
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"an earlier one")

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert main([command, str(folder), "--output", str(picture)]) == 2
    assert f"error: {picture}: cannot be written ({os.strerror(errno.ENOSPC)})" in capsys.readouterr().err
    assert picture.read_bytes() == b"an earlier one" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
@pytest.mark.parametrize("command", ["curves", "precision-recall"])
def test_the_suffix_decides_the_picture_format(tmp_path, capsys, command, suffix, start):
    folder = write_evaluation(write_log(tmp_path / "run", original_log()), evaluation_of(["nut"]))
    picture = tmp_path / f"picture.{suffix}"
    assert main([command, str(folder), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(start)
    assert capsys.readouterr().out == f"written to {picture}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", picture.name])
    if suffix == "png":
        with Image.open(picture) as image:
            assert min(image.size) > 500 and len(image.convert("RGB").getcolors(2**24)) > 50


@pytest.mark.parametrize(
    "words, message",
    [
        ("{tmp}/nothing", "nothing: no such file; expected a run's log.txt"),
        ("{tmp}/words.txt", "words.txt: not a run's log"),
        ("{tmp}/bytes.txt", "bytes.txt: cannot be read as text"),
        ("{tmp}/run --output {tmp}/a.xyz", "a.xyz: unknown picture format"),
        ("{tmp}/run --output {tmp}/no/a.png", "no does not exist; create it first"),
        ("{tmp}/run --names a b", "2 names for 1 runs"),
        ("{tmp}/bare", "bare: nothing to draw; expected one of the keys test_loss, train_loss"),
        ("precision-recall {tmp}/run", "no such file; expected an evaluation.json"),
        ("precision-recall {tmp}/words.txt", "words.txt: not a JSON file"),
        ("precision-recall {tmp}/list.json", "list.json: not an evaluation's record"),
        ("precision-recall {tmp}/short.json", "short.json: not an evaluation's record"),
        ("precision-recall {tmp}/empty.json", "no class has ground truth"),
        ("precision-recall {tmp}/broken.json", "no class has a finite precision"),
        ("curves {tmp}/run --output {tmp}/folder.png", "folder.png: cannot be written, there is a folder of this name"),
    ],
)
def test_bad_logs_records_and_outputs_are_refused(tmp_path, capsys, words, message):
    write_log(tmp_path / "run", original_log())
    write_log(tmp_path / "bare", [{"epoch": 0}])
    (tmp_path / "words.txt").write_text("no log at all\n3\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "list.json").write_text("[1, 2]")
    short = evaluation_of(["nut"])
    short["classes"][0]["precision"]["0.5"].pop()
    (tmp_path / "short.json").write_text(json.dumps(short))
    (tmp_path / "empty.json").write_text(json.dumps(evaluation_of([])))
    (tmp_path / "broken.json").write_text(json.dumps(without_figures(evaluation_of(["nut"]), 0)))
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    argv = words.format(tmp=tmp_path).split()
    if "--output" not in argv:
        argv += ["--output", str(tmp_path / "picture.png")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m enact_common.plots: error: ") and message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib_the_error_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(write_log(tmp_path / "run", original_log())), "--output", str(tmp_path / "a.png")]) == 2
    assert "pip install 'enact-detection[plots]'" in capsys.readouterr().err
