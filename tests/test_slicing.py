"""Detection in slices of large images, and detections for supervision."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, run
from PIL import Image

from enact_common import UserError, load_detector, predict
from enact_common.inference.detector import Detections
from enact_common.inference.slicing import CUT_MARGIN, OVERLAP, detect_in_slices, merged, slice_starts


@pytest.mark.parametrize("length", [1, 99, 100, 101, 120, 180, 181, 1000, 1234])
def test_slices_cover_the_length_and_overlap(length):
    side, starts = 100, slice_starts(length, 100)
    assert starts[0] == 0 and (length <= side or starts[-1] + side == length)
    for first, second in zip(starts, starts[1:], strict=False):
        assert 0 < second - first <= side * (1 - OVERLAP) + 1
    # As few as possible.
    assert len(starts) == 1 or (len(starts) - 2) * side * (1 - OVERLAP) + side < length + 1


class Rectangles:
    """A detector that finds each grey value as one class, with the box of its visible pixels, above a least size."""

    def __init__(self, least: float = 0.0):
        self.least = least
        self.seen = []

    def detect(self, pixels: torch.Tensor, threshold: float | None = None) -> Detections:
        self.seen.append(tuple(pixels.shape[-2:]))
        boxes, values = [], []
        for value in pixels[0].unique().tolist():
            ys, xs = torch.nonzero(pixels[0] == value, as_tuple=True)
            box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            if value and len(ys) >= self.least * pixels[0].numel():
                boxes.append([float(side) for side in box])
                values.append(value)
        count = len(values)
        scores = torch.linspace(0.9, 0.5, count) if count else torch.zeros(0)
        names = [f"grey {value}" for value in values]
        box_tensor = torch.tensor(boxes).reshape(-1, 4)
        return Detections(box_tensor, scores, torch.tensor(values).long(), names, values, torch.arange(count))


def picture(*rectangles, size=(200, 300)) -> torch.Tensor:
    """An image uint8 (3, height, width) with rectangles (left, top, right, bottom), of grey value 1, 2, ..."""
    pixels = torch.zeros(3, *size, dtype=torch.uint8)
    for value, (left, top, right, bottom) in enumerate(rectangles, start=1):
        pixels[:, top:bottom, left:right] = value
    return pixels


@pytest.mark.parametrize("least", [0.0, 0.005])
def test_small_objects_are_found_once_at_their_place(least):
    objects = [(5, 5, 17, 17), (85, 90, 100, 105), (150, 100, 162, 112), (280, 180, 300, 200)]
    detector = Rectangles(least)
    found = detect_in_slices(detector, picture(*objects), 100)
    assert sorted(map(tuple, found.boxes.int().tolist())) == sorted(objects)
    assert found.names == [f"grey {label}" for label in found.labels.tolist()]
    assert (found.scores.diff() <= 0).all() and found.category_ids == found.labels.tolist()
    assert detector.seen[0] == (200, 300) and set(detector.seen[1:]) == {(100, 100)}
    if least:
        assert len(Rectangles(least).detect(picture(*objects))) < len(objects)


def test_an_object_larger_than_a_slice_keeps_the_box_of_the_whole_image():
    found = detect_in_slices(Rectangles(), picture((20, 30, 270, 190)), 100)
    assert found.boxes.tolist() == [[20, 30, 270, 190]]


def test_a_cut_object_that_is_whole_nowhere_is_kept():
    boxes = torch.tensor([[0.0, 0, 100, 50], [200, 0, 260, 50]])
    assert merged(boxes, torch.tensor([0.5, 0.9]), torch.tensor([1, 1]), torch.tensor([True, True])).tolist() == [1, 0]


@pytest.mark.parametrize("labels, kept", [([1, 1], [0]), ([1, 2], [0, 1])])
def test_boxes_are_merged_within_a_class(labels, kept):
    boxes = torch.tensor([[0.0, 0, 100, 50], [5, 0, 105, 50]])
    scores, cut = torch.tensor([0.9, 0.5]), torch.zeros(2, dtype=torch.bool)
    assert merged(boxes, scores, torch.tensor(labels), cut).tolist() == kept


def test_an_image_no_larger_than_a_slice_is_detected_once():
    detector = Rectangles()
    detect_in_slices(detector, picture((5, 5, 9, 9), size=(80, 100)), 100)
    assert detector.seen == [(80, 100)]


def test_the_border_of_the_image_does_not_cut_objects():
    objects = [(0, 0, 10, 10), (290, 190, 300, 200)]
    assert len(detect_in_slices(Rectangles(0.0), picture(*objects), 100)) == 2 and CUT_MARGIN < OVERLAP


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(shapes, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    argv = ["--coco_path", shapes, "--output_dir", output, *SMALL_MODEL["conditional"], "--limit_train", 4]
    assert run("conditional", *argv, "--limit_val", 1, "--epochs", 1) == 0
    return output / "checkpoint.pth"


def call(checkpoint, output, *words) -> int:
    argv = ["--checkpoint", checkpoint, "--output_dir", output, "--device", "cpu", "--threshold", 0, *words]
    return predict.main([str(word) for word in argv])


def test_the_command_detects_in_slices(checkpoint, tmp_path, monkeypatch):
    Image.fromarray(np.zeros((70, 130, 3), np.uint8)).save(tmp_path / "a.png")
    sides = []
    real = predict.detect_in_slices
    monkeypatch.setattr(predict, "detect_in_slices", lambda *a, side: sides.append(side) or real(*a, side=side))
    assert call(checkpoint, tmp_path / "out", tmp_path / "a.png", "--slice", 64) == 0
    assert sides == [64]
    assert (tmp_path / "out" / "a.png").is_file()


@pytest.mark.parametrize(
    "words, said",
    [(("--show", "clusters"), "leave out --slice or --show"), (("--slice", 8), "--slice 8: slices so small")],
)
def test_unsuitable_slices_are_refused(words, said, checkpoint, shapes, tmp_path, capsys):
    photo = next((shapes / "val2017").iterdir())
    assert call(checkpoint, tmp_path / "out", photo, "--slice", 64, *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_models_with_masks_are_refused(checkpoint, shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "load_detector", lambda *a, **k: SimpleNamespace(args=SimpleNamespace(masks=True)))
    photo = next((shapes / "val2017").iterdir())
    assert call(checkpoint, tmp_path / "out", photo, "--slice", 64) == 2
    assert "merges boxes, not masks" in capsys.readouterr().err


def test_a_slice_without_pixels_is_refused(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(checkpoint, tmp_path / "out", "x.jpg", "--slice", 0)
    assert "--slice" in capsys.readouterr().err


# supervision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("count", [0, 3])
def test_detections_become_those_of_supervision(count, masks):
    supervision = pytest.importorskip("supervision")
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 30], [50, 5, 60, 9]])[:count]
    own = Detections(
        boxes, torch.linspace(0.9, 0.5, count), torch.arange(count), ["a", "b", "c"][:count], [7, 8, 9][:count],
        torch.arange(count), torch.ones(count, 40, 60, dtype=torch.bool) if masks else None,
    )  # fmt: skip
    found = own.to_supervision()
    assert isinstance(found, supervision.Detections) and len(found) == count
    assert found.xyxy.tolist() == boxes.tolist() and found.class_id.tolist() == list(range(count))
    assert found["class_name"].tolist() == own.names and found["category_id"].tolist() == own.category_ids
    assert (found.mask is not None) == masks
    zone = supervision.PolygonZone(np.array([[0, 0], [30, 0], [30, 40], [0, 40]]), [supervision.Position.CENTER])
    assert zone.trigger(found).tolist() == [True, True, False][:count] if count else not len(zone.trigger(found))


def test_a_real_detector_gives_detections_for_supervision(checkpoint, shapes):
    pytest.importorskip("supervision")
    found = load_detector(checkpoint, "cpu", threshold=0)(next((shapes / "val2017").iterdir()))
    assert len(found.to_supervision().with_nms(0.5)) <= len(found)


def test_without_supervision_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match=r"pip install 'enact-detection\[supervision\]'"):
        Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), [], [], torch.zeros(0)).to_supervision()
