"""Prediction: loading checkpoints of any origin, detecting, drawing, and the command line."""

import argparse
import errno
import json
import os
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ATTENTIONS, SMALL_MODEL, build, make_font, parse, real_data, run
from PIL import Image, ImageOps

from enact_common import UserError, load_detector, predict
from enact_common.checkpoints.bundled import BUNDLED, bundled_file
from enact_common.checkpoints.contents import arguments_of, variant_of
from enact_common.cli.flags import MODEL_FLAGS
from enact_common.data.categories import coco_names
from enact_common.data.images import decode_image
from enact_common.data.scenes import SHAPES
from enact_common.drawing import fonts as drawing_fonts
from enact_common.drawing.detections import (
    PALETTE,
    SHADES,
    colour_of,
    draw_detections,
    enlargement,
    fit_label,
    fit_labels,
    ink_on,
    overlaps,
    place_labels,
)
from enact_common.drawing.fonts import readable_name
from enact_common.inference.detector import LoadedDetector, as_pixels
from enact_common.models.backbone import FrozenNorm
from enact_common.predict import FINEST_TIME, Input, VideoFile, plan
from enact_common.variants import VARIANTS

# ENACT settings that a detector must take from its checkpoint.
CLUSTERED = "--enact_per_image --enact_max_clusters 5".split()


@pytest.fixture(scope="module")
def checkpoint_of(shapes, tmp_path_factory):
    """A function (variant, attention) -> checkpoint of one training step, made on first use."""
    made = {}

    def checkpoint(variant: str, attention: str) -> Path:
        if (variant, attention) not in made:
            output = tmp_path_factory.mktemp("run")
            argv = ["--coco_path", shapes, "--output_dir", output, *SMALL_MODEL[variant], "--limit_train", 4]
            argv += ["--limit_val", 1, "--epochs", 1, "--encoder_attention", attention]
            torch.manual_seed(0)
            assert run(variant, *argv, *(CLUSTERED if attention == "enact" else ())) == 0
            made[variant, attention] = output / "checkpoint.pth"
        return made[variant, attention]

    return checkpoint


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of):
    """A checkpoint of Conditional DETR with ENACT, for tests of one variant."""
    return checkpoint_of("conditional", "enact")


@pytest.fixture(scope="module")
def detector(checkpoint):
    return load_detector(checkpoint, "cpu", threshold=0)


@pytest.fixture(scope="module")
def photo(shapes) -> Path:
    """An image of 64 x 80 pixels."""
    return sorted((shapes / "val2017").iterdir())[0]


def altered(checkpoint: Path, path: Path, **changes) -> Path:
    """A copy of a checkpoint with changed entries; None removes an entry."""
    state = torch.load(checkpoint, weights_only=True) | changes
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    return path


# ---------------------------------------------------------------------------------------------- loading and detecting


def test_a_checkpoint_brings_its_variant_classes_and_settings(variant_and_attention, checkpoint_of):
    variant, attention = variant_and_attention
    path = checkpoint_of(variant, attention)
    random_state = torch.get_rng_state()
    detector = load_detector(path, "cpu")
    # Weights that the checkpoint fills are not drawn.
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (detector.variant, detector.args.encoder_attention) == (variant, attention)
    assert (detector.args.eval_size, detector.args.max_size, detector.args.backbone) == (64, 96, "resnet18")
    if attention == "enact":
        assert detector.args.enact_per_image and detector.args.enact_max_clusters == 5
    assert detector.label_map.names == SHAPES
    assert not any(module.training for module in detector.model.modules())
    saved = torch.load(path, weights_only=True)["model"]
    torch.testing.assert_close(dict(detector.model.state_dict()), saved, rtol=0, atol=0)


def test_detections_match_those_of_an_evaluation(variant_and_attention, checkpoint_of, shapes, tmp_path):
    variant, attention = variant_and_attention
    path = checkpoint_of(variant, attention)
    argv = ["--coco_path", shapes, "--output_dir", tmp_path, *SMALL_MODEL[variant], "--encoder_attention", attention]
    assert run(variant, *argv, "--resume", path, "--eval", "--batch_size", 1) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    detector = load_detector(path, "cpu", threshold=0)
    images = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())["images"]
    for image in images[:3]:
        found = detector(shapes / "val2017" / image["file_name"])
        own = torch.cat((found.boxes, found.scores[:, None] * 1000), dim=1)
        own = torch.cat((own, 1000.0 * torch.tensor(found.category_ids)[:, None]), dim=1)
        theirs = []
        for result in (result for result in results if result["image_id"] == image["id"]):
            x, y, w, h = result["bbox"]
            corners = np.clip((x, y, x + w, y + h), 0, np.tile((image["width"], image["height"]), 2))
            theirs.append([*corners, result["score"] * 1000, result["category_id"] * 1000])
        assert len(theirs) == len(own) > 0
        # Match each detection to its nearest one, since rounding may swap detections with nearly equal scores.
        distance = torch.cdist(own.double(), torch.tensor(theirs), p=torch.inf)
        assert distance.amin(dim=0).max() < 0.05 and distance.amin(dim=1).max() < 0.05


def test_detections_are_sorted_named_and_inside_the_image(detector, photo):
    found = detector(photo)
    assert len(found) == len(found.names) == len(found.category_ids) == len(found.queries) > 8
    assert (found.scores.diff() <= 0).all() and found.scores.min() >= 0 and found.scores.max() <= 1
    assert (found.boxes >= 0).all() and (found.boxes <= torch.tensor([80, 64, 80, 64])).all()
    assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
    assert found.names == [SHAPES[label] for label in found.labels]
    assert found.category_ids == [label + 1 for label in found.labels]
    assert found.queries.min() >= 0 and found.queries.max() < 8

    least = float(found.scores[4])
    assert len(detector(photo, threshold=least)) >= 5 > len(detector(photo, threshold=least + 1e-4)) - 1
    assert len(detector(photo, threshold=1)) == 0 and detector(photo, threshold=1).boxes.shape == (0, 4)


def test_labels_without_a_category_are_not_detected(checkpoint, photo, tmp_path):
    label_map = {"category_ids": [7, None, 9, None, None, 12], "names": ["a", "N/A", "b", "N/A", "N/A", "c"]}
    detector = load_detector(altered(checkpoint, tmp_path / "some.pth", label_map=label_map), "cpu", threshold=0)
    found = detector(photo)
    assert set(zip(found.category_ids, found.names, strict=True)) == {(7, "a"), (9, "b"), (12, "c")}


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "form",
    [
        str,
        Path,
        Image.open,
        lambda path: decode_image(path),
        lambda path: decode_image(path).float() / 255,
        lambda path: decode_image(path).permute(1, 2, 0).numpy(),
        lambda path: read_only(decode_image(path).permute(1, 2, 0).numpy().copy()),
        lambda path: decode_image(path).permute(1, 2, 0).numpy() / 255,
    ],
    ids=["str", "Path", "PIL", "tensor", "float tensor", "array", "read-only array", "float array"],
)
@pytest.mark.filterwarnings("error")
def test_an_image_may_come_in_any_form(form, detector, photo):
    image, expected = form(photo), detector.detect(decode_image(photo))
    (of_list,) = detector([image])
    for found in (detector(image), of_list):
        assert torch.equal(found.boxes, expected.boxes) and found.names == expected.names


def test_grey_and_deep_images_become_eight_bits_of_three_colours(tmp_path):
    grey = np.arange(0, 240, 2, dtype=np.uint8).reshape(10, 12)
    expected = torch.from_numpy(grey).expand(3, -1, -1)
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 99)
    deep.save(tmp_path / "deep.png")
    for image in (grey, Image.fromarray(grey), grey / 255, deep, tmp_path / "deep.png"):
        pixels = as_pixels(image)
        assert pixels.is_contiguous() and torch.equal(pixels, expected)


@pytest.mark.parametrize(
    "image, said",
    [
        (np.zeros((4, 4, 4), np.uint8), r"got \(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got \(3, 0, 4\)"),
        (torch.zeros(4, 4, 3), r"a tensor \(3, height, width\), got \(4, 4, 3\)"),
        (torch.zeros(1, 3, 4, 4), r"got \(1, 3, 4, 4\)"),
        (torch.full((3, 4, 4), 255.0), "pass uint8"),
        (torch.full((3, 4, 4), torch.nan), "pass uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "got torch.int64"),
        (None, "got NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inputs_that_are_not_images_are_refused(image, said):
    with pytest.raises(ValueError, match=said):
        as_pixels(image)


def test_detecting_does_not_change_the_model_and_returns_ordinary_tensors(detector, photo):
    before = {name: tensor.clone() for name, tensor in detector.model.state_dict().items()}
    found = detector(photo)
    torch.testing.assert_close(dict(detector.model.state_dict()), before, rtol=0, atol=0)
    assert not detector.model.training and torch.is_grad_enabled()
    for tensor in (found.boxes, found.scores, found.labels, found.queries):
        assert not tensor.requires_grad and tensor.device.type == "cpu"
        # An in-place update fails for inference tensors.
        tensor += 1


def test_norms_are_folded_once_and_channels_are_innermost(checkpoint_of, photo, tmp_path):
    checkpoint = checkpoint_of("detr", "enact")
    state = torch.load(checkpoint, weights_only=True)
    # Imitates a training with frozen norms, which have no num_batches_tracked.
    weights = {name: tensor for name, tensor in state["model"].items() if not name.endswith("num_batches_tracked")}
    args = {**state["args"], "backbone_norm": "frozen"}
    frozen = altered(checkpoint, tmp_path / "frozen.pth", model=weights, args=args)
    detector = load_detector(frozen, "cpu", threshold=0)
    norms = [module for module in detector.model.modules() if isinstance(module, FrozenNorm)]
    convolutions = [module for module in detector.model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(norms) == 10
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions)
    first = detector(photo)
    folded = [norm.folded[1] for norm in norms]
    second = detector(photo)
    assert all(norm.folded[1] is weight for norm, weight in zip(norms, folded, strict=True))
    torch.testing.assert_close(second.boxes, first.boxes, rtol=0, atol=0)
    # Trainable batch norms with the same statistics are not folded but give the same boxes.
    torch.testing.assert_close(load_detector(checkpoint, "cpu", threshold=0)(photo).boxes, first.boxes)


def test_a_detector_runs_in_the_requested_precision(detector, checkpoint, photo):
    narrow = load_detector(checkpoint, "cpu", threshold=0, amp="bf16")
    seen = []
    layer = narrow.model.transformer.encoder.layers[0].linear1
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    found, expected = narrow(photo), detector(photo)
    assert set(seen) == {torch.bfloat16}
    assert found.boxes.dtype == found.scores.dtype == torch.float32 and len(found) == len(expected) > 0
    torch.testing.assert_close(found.scores[:3], expected.scores[:3], rtol=0, atol=0.02)


@pytest.mark.parametrize("amp, said", [("fp16", "fp16 needs a GPU"), ("int8", "unknown precision; pass one of none")])
def test_an_unavailable_precision_is_refused(checkpoint, amp, said):
    with pytest.raises(UserError, match=said):
        load_detector(checkpoint, "cpu", amp=amp)


@pytest.mark.parametrize("variant", VARIANTS)
def test_original_checkpoints_load_without_variant_and_class_names(variant, checkpoint_of, tmp_path):
    ours = torch.load(checkpoint_of(variant, "mhsa"), weights_only=True)
    kept = "hidden_dim nheads dim_feedforward enc_layers dec_layers num_queries dilation backbone position_embedding "
    kept = (kept + "pre_norm num_query_position num_query_pattern").split()
    args = argparse.Namespace(**{name: ours["args"][name] for name in kept if name in ours["args"]}, masks=False)
    torch.save({"model": ours["model"], "args": args, "epoch": 3}, tmp_path / "original.pth")
    detector = load_detector(tmp_path / "original.pth", "cpu")
    assert (detector.variant, detector.args.encoder_attention) == (variant, "mhsa")
    assert (detector.args.eval_size, detector.args.max_size) == (800, 1333)
    assert detector.label_map.names == tuple(f"class {i}" for i in range(6))
    assert detector.label_map.category_ids == tuple(range(6))


def test_variant_and_settings_are_inferred_from_weights(variant_and_attention, tmp_path):
    variant, attention = variant_and_attention
    model, _, _ = build(variant, *SMALL_MODEL[variant], "--encoder_attention", attention)
    state = {"model": model.state_dict(), "args": {}}
    assert variant_of(state) == variant
    args, label_map = arguments_of(state, variant)
    assert (args.encoder_attention, args.backbone, args.backbone_norm) == (attention, "resnet18", "batch")
    # The model has as many labels as COCO has ids, hence COCO's names.
    assert label_map.names == coco_names() and label_map.category_ids[:2] == (None, 1)


def test_a_rivals_weights_without_arguments_need_its_name():
    model, _, _ = build("detr", *SMALL_MODEL["detr"], "--encoder_attention", "avgpool")
    state = {"model": model.state_dict(), "args": {}}
    with pytest.raises(UserError, match=r"one of avgpool.*: pass encoder_attention=NAME"):
        arguments_of(state, "detr")
    args, _ = arguments_of(state, "detr", {"encoder_attention": "avgpool", "token_budget": 3})
    assert (args.encoder_attention, args.token_budget) == ("avgpool", 3)


def test_weights_of_the_published_size_load_without_arguments(photo, tmp_path):
    model, _, _ = build("detr", "--backbone", "resnet18", "--backbone_weights", "none", "--encoder_attention", "mhsa")
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    detector = load_detector(tmp_path / "weights.pth", "cpu", threshold=0)
    assert (detector.variant, detector.args.backbone_norm) == ("detr", "frozen")
    detector._resize = lambda image, target: (image, target)  # skips the slow resize to 800 pixels
    assert {*detector(photo).names} <= {*coco_names()} - {"N/A"}


def test_ema_weights_are_preferred(checkpoint, tmp_path):
    averaged = torch.load(checkpoint, weights_only=True)["model"]
    averaged = {name: tensor + 1 if name == "class_embed.bias" else tensor for name, tensor in averaged.items()}
    detector = load_detector(altered(checkpoint, tmp_path / "averaged.pth", model_ema=averaged), "cpu")
    torch.testing.assert_close(detector.model.class_embed.bias.data, averaged["class_embed.bias"], rtol=0, atol=0)


def without(checkpoint: Path, name: str) -> dict:
    return {key: tensor for key, tensor in torch.load(checkpoint, weights_only=True)["model"].items() if key != name}


@pytest.mark.parametrize(
    "write, said",
    [
        (lambda path, checkpoint: None, "no such file"),
        (lambda path, checkpoint: path.write_text("not a checkpoint"), "not a file of tensors"),
        (lambda path, checkpoint: path.write_bytes(checkpoint.read_bytes()[:50_000]), "truncated"),
        (lambda path, checkpoint: torch.save([1, 2], path), r"not a checkpoint \(list\)"),
        (lambda path, checkpoint: torch.save({"state_dict": {}}, path), r"not a checkpoint \(keys state_dict\)"),
        (
            lambda path, checkpoint: torch.save({"model": {0: torch.ones(1)}}, path),
            r"not a checkpoint \(keys model\)",
        ),
        (
            lambda path, checkpoint: altered(checkpoint, path, model=without(checkpoint, "class_embed.bias")),
            "class_embed.bias is missing",
        ),
        (lambda path, checkpoint: altered(checkpoint, path, variant="detr"), "does not fit this model"),
        (
            lambda path, checkpoint: altered(checkpoint, path, args={"backbone": "swin_t"}),
            "trained with --backbone swin_t; the variant conditional supports resnet18",
        ),
    ],
    ids=["missing", "text", "cut off", "list", "other keys", "other model", "tensor lost", "other variant", "backbone"],
)
def test_files_that_are_not_checkpoints_of_a_detector_are_refused(write, said, checkpoint, tmp_path):
    path = tmp_path / "some.pth"
    write(path, checkpoint)
    with pytest.raises(UserError, match=said) as error:
        load_detector(path, "cpu")
    assert str(path) in str(error.value)


def test_an_unavailable_device_is_refused(checkpoint):
    with pytest.raises(UserError, match="--device warp: not a device"):
        load_detector(checkpoint, "warp")


# ------------------------------------------------------------------------------------------------------------ drawing


def random_boxes(count: int, width: int, height: int, largest: float = 0.3, seed: int = 0) -> np.ndarray:
    """Boxes (count, 4), xyxy, inside a picture and across its edges."""
    random = np.random.default_rng(seed)
    sides, centres = random.uniform(0.02, largest, (count, 2)), random.uniform(0, 1, (count, 2))
    return np.concatenate((centres - sides / 2, centres + sides / 2), axis=1) * np.tile((width, height), 2)


NAMES = ["person", "traffic light", "café", "x", "a class with a name that is longer than any other here"]
SIZES = [(32, 32), (480, 640), (3000, 4000), (10, 2000), (900, 20), (1, 1), (8, 12000)]


@pytest.mark.parametrize("height, width", SIZES, ids=str)
def test_labels_fit_into_pictures_of_any_size(height, width):
    factor = enlargement(height, width)
    pixels = np.full((height, width, 3), 90, np.uint8)
    boxes, labels = random_boxes(40, width, height), np.arange(40) % 5
    names = [NAMES[label] for label in labels]
    drawn = draw_detections(pixels, boxes, names, np.linspace(1, 0, 40), labels)
    assert drawn.shape == (factor * height, factor * width, 3) and drawn.dtype == np.uint8
    assert (pixels == 90).all() and (drawn != 90).any()
    assert draw_detections(pixels, boxes, names, None, labels, enlarge=False).shape == pixels.shape

    height, width = factor * height, factor * width
    texts = [(name, "0.50") for name in names]
    written, size = fit_labels(texts, labels.tolist(), width, height)
    places = place_labels((boxes * factor).clip(0, np.tile((width, height), 2)), written, width, height)
    for place, label in zip(places, written, strict=True):
        if label is not None:
            assert (place[2:] - place[:2]).tolist() == [label.width, label.height]
            assert (place >= 0).all() and (place <= np.tile((width, height), 2)).all()
            assert label.text.endswith("0.50")
    # A label is left out only if a line of text is taller than the picture, or a score wider.
    assert (None in written) == (height < 19)
    assert size >= 10


@pytest.mark.parametrize(
    "shape, factor",
    [
        ((32, 32), 15),
        ((24, 32), 15),
        ((300, 300), 2),
        ((480, 640), 1),
        ((10, 2000), 5),
        ((20, 20000), 1),
        ((1, 1), 480),
    ],
)
def test_small_pictures_are_enlarged_by_a_whole_factor(shape, factor):
    assert enlargement(*shape) == factor
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    drawn = draw_detections(pixels, np.zeros((0, 4)), [], [], [])
    assert (drawn[::factor, ::factor] == pixels).all() and (
        drawn[factor - 1 :: factor, factor - 1 :: factor] == pixels
    ).all()


def test_labels_do_not_overlap_if_there_is_room():
    boxes = random_boxes(25, 640, 480, largest=0.15)
    # Some objects share a place, and one is in each corner.
    corners = [(0, 0, 30, 20), (610, 0, 640, 20), (0, 460, 30, 480), (610, 460, 640, 480)]
    boxes = np.concatenate((boxes, boxes[:2], boxes[:1], corners)).clip(0, [640, 480, 640, 480])
    written, _ = fit_labels([("person", "0.90")] * len(boxes), [0] * len(boxes), 640, 480)
    places = place_labels(boxes, written, 640, 480)
    common = overlaps(places, places)
    np.fill_diagonal(common, 0)
    # Three objects share a place, so labels may overlap slightly there.
    assert common.max() < 0.1 * written[0].width * written[0].height and (common > 0).sum() <= 4
    # Labels stay next to their boxes.
    grown = boxes + np.array([-1, -1, 1, 1]) * np.tile((written[0].width, written[0].height), 2)
    assert all(overlaps(place[None], box[None]) > 0 for place, box in zip(places, grown, strict=True))


def test_a_box_is_drawn_at_its_place_in_the_colour_of_its_label():
    pixels = np.zeros((480, 640, 3), np.uint8)
    drawn = draw_detections(pixels, [[100, 200, 300, 400]], ["x"], [0.5], [3])
    rows, columns = np.nonzero((drawn == colour_of(3)).all(axis=-1))
    rows, columns = rows[rows >= 200], columns[rows >= 200]
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (200, 399, 100, 299)
    assert (drawn[250:350, 150:250] == 0).all()


def test_likely_objects_are_drawn_over_unlikely_ones_and_small_over_large():
    pixels = np.zeros((480, 640, 3), np.uint8)
    large, small = [0, 0, 640, 480], [0, 200, 100, 300]
    for scores, on_top in (([0.9, 0.3], 0), ([0.3, 0.9], 1), (None, 1)):
        drawn = draw_detections(pixels, [large, small], ["x", "y"], scores, [0, 1])
        assert drawn[250, 0].tolist() == list(colour_of(on_top))


def test_tensors_arrays_and_lists_are_drawn_alike():
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    boxes, names, scores, labels = random_boxes(5, 640, 480), NAMES, [0.9, 0.8, 0.7, 0.6, 0.5], [0, 1, 2, 3, 4]
    expected = draw_detections(pixels, boxes, names, np.array(scores), np.array(labels))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    of_tensors = draw_detections(tensor, torch.tensor(boxes), names, torch.tensor(scores), torch.tensor(labels))
    assert (of_tensors == expected).all()
    assert (draw_detections(pixels, boxes.tolist(), names, scores, labels) == expected).all()


@pytest.mark.parametrize(
    "pixels, names",
    [
        (np.zeros((9, 9), np.uint8), ["a"]),
        (np.zeros((9, 9, 3)), ["a"]),
        (np.zeros((3, 9, 9), np.uint8), ["a"]),
        (torch.zeros(9, 9, 3, dtype=torch.uint8), ["a"]),
        (np.zeros((9, 9, 3), np.uint8), ["a", "b"]),
    ],
    ids=["grey", "float", "array, colours first", "tensor, colours last", "surplus name"],
)
@pytest.mark.parametrize("scores", [[0.5], None])
def test_drawing_refuses_other_image_formats_and_surplus_names(pixels, names, scores):
    with pytest.raises(ValueError):
        draw_detections(pixels, [[0, 0, 5, 5]], names, scores, [0])


def test_labels_have_different_colours_with_readable_text():
    colours = [colour_of(label) for label in range(len(PALETTE) * len(SHADES))]
    apart = torch.cdist(*[torch.tensor(colours, dtype=torch.float64)] * 2).fill_diagonal_(torch.inf)
    assert apart.min() > 30
    assert colour_of(len(colours)) == colours[0]
    for colour in colours:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colour) / 255]
        light, dark = sorted((np.dot(linear, (0.2126, 0.7152, 0.0722)), ink_on(colour)[0] / 255), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG level AA


@pytest.fixture
def no_fonts(monkeypatch):
    """Simulates a machine whose only font is Pillow's built-in one."""
    monkeypatch.setattr(drawing_fonts, "font_sources", lambda: (drawing_fonts.OWN_FONT,))
    drawing_fonts._said.clear()
    readable_name.cache_clear()
    yield
    readable_name.cache_clear()


@pytest.mark.parametrize(
    "name, written",
    [
        ("person", "person"),
        (" two\nlines ", "two lines"),
        ("Café Ångström", "Cafe Angstrom"),
        ("白血球", "class 4"),
        ("cat \U0001f63a", "cat"),
        ("", "class 4"),
    ],
)
def test_names_without_a_font_are_transliterated_or_numbered(name, written, no_fonts, caplog):
    assert readable_name(name, 4)[0] == written
    # An empty name gives no warning, since no font would help.
    assert (len(caplog.records) == 0) == (written == " ".join(name.split()) or not name)
    draw_detections(np.zeros((100, 100, 3), np.uint8), [[0, 0, 50, 50]], [name], [0.5], [4])


def test_an_installed_font_is_found_whatever_its_name(fonts, caplog):
    names = ("白血球", "セル", "세포")
    for name in names:
        assert readable_name(name, 4)[0] == "class 4"
    # One warning for all names.
    (record,) = caplog.records
    assert "apt install fonts-noto-cjk" in record.getMessage() and "白血球" in record.getMessage()
    make_font(fonts / "of mine" / "Anything-Bold.ttf", "".join(names))
    chosen = str(make_font(fonts / "Something.otf", "".join(names)))
    (fonts / "damaged.ttf").write_bytes(b"no font")
    drawing_fonts.font_sources.cache_clear()
    readable_name.cache_clear()
    assert [readable_name(name, 4) for name in names] == [(name, chosen) for name in names]
    plain, named = (
        draw_detections(np.zeros((100, 200, 3), np.uint8), [[0, 30, 50, 90]], [name], [0.5], [4])
        for name in ("class 4", "白血球")
    )
    assert plain.shape == named.shape and (plain != named).any()
    assert len(caplog.records) == 1


def test_another_script_needs_another_package(fonts, caplog):
    readable_name("白血球", 0)
    readable_name("\u1200\u1201", 1)  # Ethiopic
    assert [record.args[1] for record in caplog.records] == ["fonts-noto-cjk", "fonts-noto-core"]


def test_names_in_other_scripts_are_drawn_by_a_font_that_has_them():
    pytest.importorskip("matplotlib")  # brings such a font
    for name in ("Эритроцит", "αιμοσφαίριο", "łódź"):
        written, source = readable_name(name, 0)
        assert written == name and source != drawing_fonts.OWN_FONT


def test_a_long_name_is_shortened_and_its_score_kept():
    texts = [fit_label("a long name", drawing_fonts.OWN_FONT, "0.75", 13, width, 40) for width in (200, 80, 45, 20)]
    assert [label and label.text for label in texts][::2] == ["a long name  0.75", "0.75"]
    assert texts[1].text.startswith("a") and texts[1].text.endswith("...  0.75") and texts[1].width <= 80
    assert texts[3] is None
    assert fit_label("a", drawing_fonts.OWN_FONT, "", 13, 200, 10) is None


# ------------------------------------------------------------------------------------------------------- command line


def write_video(
    path: Path, count: int = 6, size: tuple[int, int] = (64, 48), codec: str = "mp4v", rate: float = 12.5
) -> Path:
    """Write a video of noise; return its path."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, size)
    random = np.random.default_rng(0)
    for _ in range(count):
        writer.write(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    writer.release()
    return path


def read_video(path: Path) -> tuple[float, list[np.ndarray]]:
    """The frame rate in frames per second, and the frames."""
    reader, frames = cv2.VideoCapture(str(path)), []
    while (frame := reader.read())[0]:
        frames.append(frame[1])
    return reader.get(cv2.CAP_PROP_FPS), frames


def call(checkpoint: Path, output: Path, *inputs, threshold: float = 0) -> int:
    """Run the command line; return its exit status."""
    words = ["--checkpoint", checkpoint, "--output_dir", output, "--threshold", threshold, "--device", "cpu", *inputs]
    return predict.main([str(word) for word in words])


def read_predictions(output: Path) -> list[dict]:
    return json.loads((output / "predictions.json").read_text())


def files_in(output: Path) -> list[str]:
    return sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())


@pytest.fixture
def folder(photo, tmp_path) -> Path:
    """A folder with images of all kinds, equal names and sub-folders, a video, and files that are neither."""
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    image = Image.open(photo)
    image.save(folder / "a.jpg")
    image.convert("RGBA").save(folder / "a.png")
    image.convert("CMYK").save(folder / "A.tif")
    image.convert("L").save(folder / "b" / "a.jpg")
    image.save(folder / "b" / "a.gif", save_all=True, append_images=[image.rotate(90)] * 2)
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256).save(folder / "b" / "deep.PNG")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:30])
    (folder / ".hidden.jpg").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    (folder / "phone.heic").write_text("no image")
    write_video(folder / "c.avi", codec="MJPG")
    return folder


def test_a_folder_of_images_videos_and_other_files_is_predicted(checkpoint, detector, folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert call(checkpoint, output, folder) == 1
    said = capsys.readouterr()
    order = ["A.tif", "a.jpg", "a.png", "broken.png", "c.avi", "b/a.gif", "b/a.jpg", "b/deep.PNG"]
    pictures = ["A.png", "a_2.jpg", "a_3.png", "c.mp4", "b/a.png", "b/a_2.jpg", "b/deep.png"]
    assert files_in(output) == sorted([*pictures, "predictions.json"])
    assert f"skipped: {folder / 'broken.png'}" in said.err and "Traceback" not in said.err
    entries = read_predictions(output)
    assert f"6 images, 1 video (6 frames), {len(entries)} detections, 3 skipped; " in said.out
    assert f"{folder}: skipped: 2 files by their suffix (1 .heic, 1 .txt), 1 hidden; no reader" in said.err
    assert "; no reader for .heic: save such images as JPEG or PNG" in said.err
    assert str(output) in said.out

    # Image ids follow the order; the broken file uses up an id, and the video one per frame.
    numbers = {(entry["file_name"], entry.get("frame")): entry["image_id"] for entry in entries}
    first = {"A.tif": 1, "a.jpg": 2, "a.png": 3, "c.avi": 5, "b/a.gif": 11, "b/a.jpg": 12, "b/deep.PNG": 13}
    for name in order:
        if name == "c.avi":
            assert [numbers[str(folder / name), frame] for frame in range(6)] == list(range(5, 11))
        elif name != "broken.png":
            assert numbers[str(folder / name), None] == first[name]
            with Image.open(output / pictures[[n for n in order if n != "broken.png"].index(name)]) as picture:
                assert picture.size == (480, 384) and picture.mode == "RGB"
    assert len(numbers) == 12

    # The entries are the detector's results in COCO format.
    found = detector(folder / "a.png")
    mine = [entry for entry in entries if entry["image_id"] == 3]
    assert [entry["category_id"] for entry in mine] == found.category_ids
    boxes = torch.tensor([entry["bbox"] for entry in mine])
    boxes[:, 2:] += boxes[:, :2]
    torch.testing.assert_close(boxes, found.boxes, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.tensor([entry["score"] for entry in mine]), found.scores, rtol=0, atol=1e-5)


def test_folders_are_searched_through_links_and_without_hidden_files(tmp_path):
    root, pool, output = tmp_path / "in", tmp_path / "pool", tmp_path / "in" / "out"
    for name in ("in/b.jfif", "in/a.tga", "in/.c.jpg", "in/.d/e.jpg", "pool/f.mp4", "in/out/g.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "link").symlink_to(pool)
    (pool / "round").symlink_to(root)
    files, searched = predict.find_files([str(root)], output)
    assert [place.as_posix() for _, place in files] == ["a.tga", "b.jfif", "link/f.mp4"]
    assert len(searched[str(root)].hidden) == 2 and len(searched[str(root)].again) == 1
    # A hidden file or folder that the user names is taken.
    assert len(predict.find_files([str(root / ".c.jpg"), str(root / ".d")], output)[0]) == 2
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "a.heic").touch()
    with pytest.raises(UserError, match=r"no image or video .*skipped: 1 file by its suffix \(1 \.heic\)"):
        predict.find_files([str(tmp_path / "phone")], output)


def test_images_without_detections_are_written(checkpoint, photo, tmp_path, capsys):
    assert call(checkpoint, tmp_path / "out", photo, threshold=1) == 0
    assert files_in(tmp_path / "out") == sorted([photo.name, "predictions.json"])
    assert read_predictions(tmp_path / "out") == []
    assert "1 image, 0 detections, 0 skipped" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / photo.name) as picture, Image.open(photo) as original:
        difference = np.asarray(picture.resize(original.size, Image.Resampling.BOX)).astype(int) - np.asarray(original)
        assert np.abs(difference).mean() < 2


def test_predicting_again_into_the_input_folder_gives_the_same(checkpoint, photo, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / photo.name).write_bytes(photo.read_bytes())
    seen = []
    for _ in range(2):
        # A file that is given twice is predicted once.
        assert call(checkpoint, folder / "found", folder, folder / photo.name) == 0
        seen.append((files_in(folder), read_predictions(folder / "found")))
    assert seen[0] == seen[1] and len(seen[0][0]) == 3


def test_a_video_keeps_its_rate_and_size(checkpoint, tmp_path, capsys):
    video = write_video(tmp_path / "clip.avi", codec="MJPG")
    assert call(checkpoint, tmp_path / "out", video) == 0
    rate, frames = read_video(tmp_path / "out" / "clip.mp4")
    assert rate == 12.5 and len(frames) == 6 and frames[0].shape == (48, 64, 3)
    entries = read_predictions(tmp_path / "out")
    assert sorted(Counter((entry["image_id"], entry["frame"]) for entry in entries)) == [(i + 1, i) for i in range(6)]
    assert {entry["file_name"] for entry in entries} == {str(video)}
    assert "0 images, 1 video (6 frames)" in capsys.readouterr().out
    assert files_in(tmp_path / "out") == ["clip.mp4", "predictions.json"]


def test_a_video_with_an_odd_rate_and_later_files_are_written(checkpoint, photo, tmp_path):
    video = write_video(tmp_path / "clip.avi", codec="MJPG", rate=239.987)
    assert call(checkpoint, tmp_path / "out", video, photo) == 0
    assert files_in(tmp_path / "out") == sorted(["clip.mp4", photo.name, "predictions.json"])
    rate, frames = read_video(tmp_path / "out" / "clip.mp4")
    assert len(frames) == 6 and rate == pytest.approx(239.987, abs=0.01)


@pytest.mark.parametrize(
    "rate, written",
    [(30000 / 1001, 29.97), (24000 / 1001, 23.976), (655.3456, 655.35), (1e5, FINEST_TIME), (1e12, FINEST_TIME)]
    + [(1 / 3, 0.333), (1e-4, 0.01)],
)
def test_videos_of_any_rate_can_be_written(rate, written, tmp_path):
    with VideoFile(tmp_path / "clip.mp4", rate) as video:
        for shade in (50, 200):
            video.write(np.full((48, 64, 3), shade, np.uint8))
    found, frames = read_video(tmp_path / "clip.mp4")
    assert found == pytest.approx(written, rel=1e-4) and len(frames) == 2


def test_a_video_that_cannot_be_written_is_skipped(checkpoint, photo, tmp_path, capsys):
    # MPEG-4 stores a side in 13 bits, so 8200 pixels are too many.
    wide = write_video(tmp_path / "wide.avi", count=2, size=(8200, 16), codec="MJPG")
    assert call(checkpoint, tmp_path / "out", wide, photo) == 1
    said = capsys.readouterr()
    assert f"skipped: {tmp_path / 'out' / 'wide.mp4'}: cannot be written as MPEG-4 of 8200 x 16 pixels" in said.err
    assert "1 image, " in said.out and "1 skipped;" in said.out and "video" not in said.out.split(";")[0]
    assert files_in(tmp_path / "out") == sorted([photo.name, "predictions.json"])
    assert {entry["image_id"] for entry in read_predictions(tmp_path / "out")} == {2}


def test_frames_of_odd_or_changing_size_are_all_written(tmp_path):
    with VideoFile(tmp_path / "clip.mp4", 10) as video:
        for height, width in ((47, 65), (47, 65), (30, 40)):
            video.write(np.full((height, width, 3), (250, 20, 20), np.uint8))
        assert not (tmp_path / "clip.mp4").exists()
    rate, frames = read_video(tmp_path / "clip.mp4")
    assert rate == 10 and [frame.shape for frame in frames] == [(48, 66, 3)] * 3
    for frame in frames:  # OpenCV's order is blue, green, red
        assert frame[..., 2].min() > 200 and frame[..., 0].max() < 70
    assert files_in(tmp_path) == ["clip.mp4"]


def test_truncated_and_unreadable_videos_are_named_and_counted(checkpoint, photo, tmp_path, capsys):
    whole = write_video(tmp_path / "whole.avi", count=12, codec="MJPG").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.mp4").write_text("no video")
    assert call(checkpoint, tmp_path / "out", tmp_path / "cut.avi", tmp_path / "none.mp4", photo) == 1
    said = capsys.readouterr()
    frames = len(read_video(tmp_path / "out" / "cut.mp4")[1])
    assert 0 < frames < 12
    assert f"incomplete: {tmp_path / 'cut.avi'}: ends after {frames} of its 12 frames" in said.err
    assert f"skipped: {tmp_path / 'none.mp4'}: not a readable video" in said.err
    assert f"1 image, 1 video ({frames} frames)" in said.out and "1 skipped, 1 incomplete;" in said.out
    assert files_in(tmp_path / "out") == sorted(["cut.mp4", photo.name, "predictions.json"])
    # The unreadable video uses up the image id after the last frame.
    assert read_predictions(tmp_path / "out")[-1]["image_id"] == frames + 2


def test_a_video_with_longer_sound_counts_as_complete(checkpoint, tmp_path, capsys):
    video = write_video(tmp_path / "clip.mkv", codec="MJPG")
    # Matroska has no frame count; this element holds the duration of the longest track.
    before, mark, after = video.read_bytes().partition(b"\x44\x89\x88")
    (duration,) = struct.unpack(">d", after[:8])
    video.write_bytes(before + mark + struct.pack(">d", 2 * duration) + after[8:])
    assert cv2.VideoCapture(str(video)).get(cv2.CAP_PROP_FRAME_COUNT) == 12
    assert call(checkpoint, tmp_path / "out", video) == 0
    said = capsys.readouterr()
    assert "1 video (6 frames)" in said.out and "incomplete" not in said.out + said.err


def turned_photo(path: Path, orientation: int, **options) -> Path:
    """Write a photo of random blocks, stored as 64 x 80 pixels, with this EXIF orientation; return its path."""
    blocks = np.random.default_rng(3).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(blocks.repeat(16, axis=0).repeat(16, axis=1)).save(path, exif=exif, **options)
    return path


def upright_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_photos_of_all_formats_are_rotated_as_in_viewers(suffix, orientation, tmp_path):
    options = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"lossless": True}}.get(suffix, {})
    path = turned_photo(tmp_path / f"photo{suffix}", orientation, **options)
    pixels = as_pixels(path).permute(1, 2, 0).numpy()
    assert np.abs(pixels.astype(int) - upright_pixels(path)).max() <= 2
    # In a TIFF the orientation is part of the format, not EXIF.
    upright = orientation == 1 or suffix == ".tif"
    assert torch.equal(as_pixels(path, exif=False), as_pixels(path)) == upright
    with Image.open(path) as image:
        # Images that the caller opened keep their stored pixels, so boxes refer to those.
        assert suffix == ".tif" or as_pixels(image).shape == (3, 64, 80)


@pytest.mark.slow
@pytest.mark.parametrize("orientation, flag", [(1, ()), (3, ()), (6, ()), (8, ()), (8, ("--no_exif",))])
def test_boxes_pictures_and_sizes_have_the_same_orientation(orientation, flag, checkpoint, detector, tmp_path):
    pytest.importorskip("matplotlib")
    path = turned_photo(tmp_path / "photo.jpg", orientation, quality=95)
    show = ("--threshold", 0, "--show", "entropy")
    assert call(checkpoint, tmp_path / "out", path, *show, *flag) == 0
    found = detector(path, exif=not flag)
    height, width = as_pixels(path, exif=not flag).shape[1:]
    assert (width > height) == (orientation in (1, 3) or bool(flag))
    entries = read_predictions(tmp_path / "out")
    assert len(entries) == len(found) > 0
    assert {(entry["width"], entry["height"]) for entry in entries} == {(width, height)}
    for entry, (left, top, right, bottom) in zip(entries, found.boxes.tolist(), strict=True):
        assert entry["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=0.01)
    # The picture is oriented like the detections, and has no EXIF flag that would rotate it again.
    with Image.open(tmp_path / "out" / "photo.jpg") as picture:
        assert picture.getexif().get(0x0112, 1) == 1 and picture.width * height == picture.height * width


def fail_at(monkeypatch, number: int, fail: Callable[[], object]) -> None:
    """Call `fail` when the detector gets image `number`, counted from 1."""
    detect, calls = LoadedDetector.detect, []

    def failing(self, *args):
        calls.append(args)
        if len(calls) == number:
            fail()
        return detect(self, *args)

    monkeypatch.setattr(LoadedDetector, "detect", failing)


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "stop, status",
    [
        (lambda: raising(KeyboardInterrupt()), 130),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143),
        (lambda: os.kill(os.getpid(), signal.SIGHUP), 129),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP"],
)
def test_results_before_an_interruption_are_kept(
    stop, status, checkpoint, shapes, tmp_path, capsys, monkeypatch, heard_signals
):
    images = sorted((shapes / "val2017").iterdir())[:3]
    video = write_video(tmp_path / "clip.mp4")
    # Image 1 is a picture and images 2, 3 and 4 are frames; the interruption comes in image 5, the fourth frame.
    fail_at(monkeypatch, 5, stop)
    assert call(checkpoint, tmp_path / "out", images[0], video, *images[1:]) == status
    assert {entry["image_id"] for entry in read_predictions(tmp_path / "out")} == {1, 2, 3, 4}
    assert files_in(tmp_path / "out") == sorted([images[0].name, "clip.mp4", "predictions.json"])
    assert len(read_video(tmp_path / "out" / "clip.mp4")[1]) == 3
    said = capsys.readouterr()
    assert "interrupted" in said.err and "1 image, 1 video (3 frames)" in said.out


def test_a_signal_does_not_separate_a_frame_from_its_detections(checkpoint, tmp_path, monkeypatch):
    write = VideoFile.write

    def stop_after(self, frame):
        write(self, frame)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(VideoFile, "write", stop_after)
    assert call(checkpoint, tmp_path / "out", write_video(tmp_path / "clip.mp4")) == 143
    assert {entry["frame"] for entry in read_predictions(tmp_path / "out")} == {0}
    assert len(read_video(tmp_path / "out" / "clip.mp4")[1]) == 1


def test_a_failure_leaves_no_partial_video(checkpoint, tmp_path, monkeypatch):
    fail_at(monkeypatch, 3, lambda: raising(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        call(checkpoint, tmp_path / "out", write_video(tmp_path / "clip.mp4"))
    assert files_in(tmp_path / "out") == ["predictions.json"]
    assert {entry["frame"] for entry in read_predictions(tmp_path / "out")} == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["photo.png", "photo_attention.png", "clip.mp4"])
def test_a_picture_that_cannot_be_written_is_named(name, checkpoint, photo, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    Image.open(photo).save(tmp_path / "photo.png")
    video = write_video(tmp_path / "clip.mp4")
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert call(checkpoint, tmp_path / "out", video, tmp_path / "photo.png", "--show", "attention") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'out' / name}: cannot be written ({os.strerror(errno.ENOSPC)})" in error
    written = files_in(tmp_path / "out")
    assert name not in written and "predictions.json" in written and not any(".partial" in path for path in written)


@pytest.mark.parametrize("name", ["photo.png", "photo_attention.png", "clip.mp4", "predictions.json"])
def test_a_folder_with_the_name_of_an_output_is_refused_before_any_work(name, checkpoint, photo, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    Image.open(photo).save(tmp_path / "photo.png")
    video = write_video(tmp_path / "clip.mp4")
    place = tmp_path / "out" / name
    place.mkdir(parents=True)
    assert call(checkpoint, tmp_path / "out", tmp_path / "photo.png", video, "--show", "attention") == 2
    assert f"error: {place}: cannot be written, there is a folder of this name" in capsys.readouterr().err
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize(
    "change, said",
    [
        ({"inputs": ["nowhere.jpg"]}, "nowhere.jpg: no such file or folder"),
        ({"inputs": ["photo.jpg", "empty"]}, "empty: no image or video in this folder"),
        ({"inputs": ["alone"], "output_dir": "alone"}, "alone: no image or video in this folder"),
        ({"inputs": ["photo.jpg"], "output_dir": "."}, "photo.jpg is an input and would be overwritten"),
        ({"output_dir": "photo.jpg"}, "photo.jpg: cannot be created"),
        ({"checkpoint": "nowhere.pth"}, "nowhere.pth: no such file"),
        ({"checkpoint": "photo.jpg"}, "photo.jpg: not a file of tensors but a JPEG image"),
        ({"device": "warp"}, "--device warp: not a device's name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_inputs_and_options_are_refused_before_any_work(
    change, said, checkpoint, photo, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "alone"):
        Path(folder).mkdir()
    for copy in ("photo.jpg", "alone/photo.jpg"):
        Path(copy).write_bytes(photo.read_bytes())
    before = files_in(tmp_path)
    chosen = {"inputs": ["photo.jpg"], "output_dir": "out", "checkpoint": checkpoint, "device": "cpu", **change}
    flags = [str(word) for name, value in chosen.items() if name != "inputs" for word in (f"--{name}", value)]
    assert predict.main([*flags, *chosen["inputs"]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m enact_common.predict: error: ") and said in error and "Traceback" not in error
    assert files_in(tmp_path) == before and not Path("out").exists()


@pytest.mark.parametrize("threshold", ["1.5", "-0.1", "high", "nan"])
def test_a_threshold_outside_0_to_1_is_refused(threshold, checkpoint, photo, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        call(checkpoint, tmp_path / "out", photo, threshold=threshold)
    assert stop.value.code == 2 and "--threshold" in capsys.readouterr().err


def test_help_states_units_and_defaults(capsys):
    with pytest.raises(SystemExit):
        predict.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for said in (
        "0 to 1 (default: 0.5; 0.85 for panoptic models)",
        "a GPU if there is one",
        "image_id numbers",
        "in pixels",
        "sub-folders",
    ):
        assert said in text


def test_pictures_with_equal_names_are_numbered(tmp_path):
    places = [Path(p) for p in ("a.jpg", "A.png", "a_2.gif", "b/a.jpg", "a.mp4", "a_entropy.png")]
    files = [(tmp_path / str(i) / place, place) for i, place in enumerate(places)]
    output = Path("out")

    def pictures(*kinds):
        return [item.picture.relative_to(output).as_posix() for item in plan(files, output, kinds)]

    assert pictures() == ["a.jpg", "A_2.png", "a_2_2.png", "b/a.jpg", "a_3.mp4", "a_entropy.png"]
    # Names of figures that --show writes are avoided too.
    assert pictures("entropy")[-1] == "a_entropy_2.png"
    assert plan(files, output)[0] == Input(files[0][0], output / "a.jpg")


@pytest.fixture
def inside(monkeypatch):
    """A list that records the calls of `write_introspection`, which is replaced."""
    asked = []

    def write_introspection(detector, pixels, found, kinds, folder, stem):
        asked.append((tuple(pixels.shape), len(found), tuple(kinds), folder, stem))
        return []

    monkeypatch.setattr(predict, "write_introspection", write_introspection)
    monkeypatch.setattr(predict, "check_kinds", lambda detector, kinds: None)
    return asked


SIZES = {
    "detr": "--num_queries 5 --enc_layers 2 --dec_layers 1 --hidden_dim 64 --dim_feedforward 48 --pre_norm",
    "conditional": "--num_queries 5 --enc_layers 2 --dec_layers 1 --position_embedding learned --backbone_stages 4",
    "anchor": "--num_query_position 5 --num_query_pattern 3 --enc_layers 2 --attention_type nn.MultiheadAttention",
}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_model_sizes_are_inferred_from_a_file_of_weights(variant, attention, photo, tmp_path, caplog):
    argv = [*SMALL_MODEL[variant], *SIZES[variant].split(), "--encoder_attention", attention, "--num_classes", "3"]
    model, _, _ = build(variant, *argv)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    detector = load_detector(tmp_path / "weights.pth", "cpu", 0.0, nheads=4, dilation=False, eval_size=64, max_size=96)
    assert not caplog.text
    args = parse(variant, *argv)
    assert all(getattr(detector.args, flag) == getattr(args, flag) for flag in MODEL_FLAGS if hasattr(args, flag))
    assert len(detector(photo)) > 0
    # A warning names the settings that weights do not show.
    load_detector(tmp_path / "weights.pth", "cpu")
    assert "nheads 8" in caplog.text and "dilation" in caplog.text
    with pytest.raises(UserError, match="no flag colour"):
        load_detector(tmp_path / "weights.pth", "cpu", colour=1)


def test_show_writes_the_introspection_figures(checkpoint, photo, tmp_path):
    pytest.importorskip("matplotlib")
    assert call(checkpoint, tmp_path / "out", photo, "--show", *predict.SHOWN) == 0
    drawn = {path.name for path in (tmp_path / "out").glob(f"{photo.stem}_*.png")}
    assert drawn == {f"{photo.stem}_{kind}.png" for kind in ("entropy", "clusters", "attention")}


def test_show_applies_to_images_and_not_to_videos(inside, checkpoint, detector, photo, tmp_path):
    pytest.importorskip("matplotlib")
    video = write_video(tmp_path / "clip.mp4")
    assert call(checkpoint, tmp_path / "out", photo, video, "--show", "clusters", "entropy", "clusters") == 0
    expected = ((3, 64, 80), len(detector(photo)), ("clusters", "entropy"), tmp_path / "out", photo.stem)
    assert inside == [expected]


def refuse(detector, kinds):
    raise UserError(f"--show {kinds[0]}: a plain model has none")


@pytest.mark.parametrize(
    "fault, said", [("kinds", "a plain model has none"), ("videos", "only for images"), ("matplotlib", "plots")]
)
def test_show_is_refused_before_any_work_if_impossible(
    fault, said, inside, checkpoint, photo, tmp_path, capsys, monkeypatch
):
    if fault == "kinds":
        pytest.importorskip("matplotlib")
        monkeypatch.setattr(predict, "check_kinds", refuse)
    if fault == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = write_video(tmp_path / "clip.mp4") if fault == "videos" else photo
    assert call(checkpoint, tmp_path / "out", file, "--show", "clusters") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and inside == []


def test_real_images_are_predicted(checkpoint, tmp_path):
    folder = real_data("ENACT_BCCD") / "val2017"
    images = sorted(folder.glob("*.jpg"))[:3]
    assert call(checkpoint, tmp_path / "out", *images) == 0
    for image in images:
        with Image.open(tmp_path / "out" / image.name) as picture, Image.open(image) as original:
            assert picture.size == original.size


# ---------------------------------------------------------------------------------------------------------- bundled


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_detector_finds_objects_in_its_image(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bundled_file(name).stat().st_size < 5_000_000
    assert predict.main(["--checkpoint", name, "--output_dir", "predicted", "--threshold", "0.4"]) == 0
    assert "1 image" in capsys.readouterr().out
    detections = json.loads(Path("predicted/predictions.json").read_text())
    assert len(detections) > 3 and Path(f"predicted/{name}.jpg").is_file()
    # A file of the name is meant, if there is one.
    Path(name).write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=f"{name}: "):
        load_detector(name, "cpu")


def test_without_inputs_only_a_bundled_detector_has_an_image(checkpoint, tmp_path, capsys):
    assert predict.main(["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "predicted")]) == 2
    assert "pass at least one INPUT" in capsys.readouterr().err and not (tmp_path / "predicted").exists()
