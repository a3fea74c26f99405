"""The torch.hub entry points of the checkout."""

import argparse
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, parse

from enact_common import NestedTensor, UserError, hub
from enact_common.data.categories import LabelMap
from enact_common.hub import ENTRIES, MODELS, PUBLISHED, Model
from enact_common.models.backbone import load_backbone_weights
from enact_common.nested_tensor import nested_tensor_from_tensor_list

ROOT = Path(__file__).resolve().parents[1]

# The names fix the backbone (ResNet-50 or -101); everything else is as small as possible.
TINY = {"hidden_dim": 32, "nheads": 4, "dim_feedforward": 32, "enc_layers": 1, "dec_layers": 1}
QUERIES = {
    "detr": {"num_queries": 4},
    "conditional": {"num_queries": 4},
    "anchor": {"num_query_position": 2, "num_query_pattern": 2},
}


def load(name: str, **flags):
    """A model, loaded as users load it."""
    return torch.hub.load(str(ROOT), name, source="local", **flags)


def tiny(name: str = "detr_resnet50", **flags):
    model = next(model for model in MODELS if model.name == name)
    return load(name, **TINY | QUERIES[model.variant] | flags)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The repository name that torch.hub resolves to this checkout, without a download."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "enact_detection_main").symlink_to(ROOT, target_is_directory=True)
    return "enact/detection:main"


# ---------------------------------------------------------------------------------------------------------- entries


def test_torch_hub_lists_every_model_and_nothing_else(hub_cache):
    names = torch.hub.list(hub_cache, trust_repo=True)
    assert sorted(names) == sorted(ENTRIES) and len(names) == 32
    for name in (
        "detr_resnet50", "detr_resnet101_dc5", "conditional_detr_resnet50_dc5", "anchor_detr_resnet50_dc5",
        "detr_resnet50_panoptic", "detr_resnet50_dc5_panoptic", "detr_resnet101_panoptic",
    ):  # fmt: skip
        assert {name, f"{name}_enact"} <= set(names)


def test_torch_hub_describes_every_model(hub_cache):
    for name in ENTRIES:
        text = torch.hub.help(hub_cache, name, trust_repo=True)
        assert ("DC5" in text, "with ENACT" in text) == ("dc5" in name, name.endswith("enact"))
        assert f"ResNet-{re.search('resnet([0-9]+)', name)[1]}" in text and "return_postprocessor" in text
        assert ("no published checkpoint" in text) == (name not in PUBLISHED)
        assert ("pred_masks" in text, "threshold=0.85" in text) == ("panoptic" in name, "panoptic" in name)


def test_hub_dependencies_equal_the_dependencies_of_the_project():
    packages = {"cv2": "opencv-python", "PIL": "pillow", "yaml": "PyYAML"}  # import name: package
    text = (ROOT / "pyproject.toml").read_text()
    wanted = set(re.findall(r'"([\w-]+)>=', re.search(r"\ndependencies = \[(.*?)\n\]", text, re.DOTALL)[1]))
    listed = re.search(r"^dependencies = \[(.*)\]$", (ROOT / "hubconf.py").read_text(), re.MULTILINE)[1]
    names = re.findall(r'"(\w+)"', listed)
    assert {packages.get(name, name) for name in names} == wanted
    assert all(importlib.util.find_spec(name) for name in names)


# ------------------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize(
    "name", ["detr_resnet50", "conditional_detr_resnet50_dc5_enact", "anchor_detr_resnet50_enact", "detr_resnet101"]
)
def test_a_model_has_the_parts_in_its_name(name, monkeypatch):
    monkeypatch.setattr("torchvision.models.get_model_weights", None)  # fails if ImageNet weights are requested
    wanted = next(model for model in MODELS if model.name == name)
    model = tiny(name, num_classes=5)
    state = model.state_dict()
    assert any("W_prob" in key for key in state) == name.endswith("enact")
    assert ("backbone.0.body.layer3.22.conv1.weight" in state) == ("101" in name)
    assert (
        type(model).__name__
        == {"detr": "DETR", "conditional": "ConditionalDETR", "anchor": "AnchorDETR"}[wanted.variant]
    )
    body = model.backbone.body if wanted.variant == "anchor" else model.backbone[0].body
    assert (body["layer4"][2].conv2.dilation == (2, 2)) == wanted.dilation
    outputs = model.eval()([torch.rand(3, 64, 80), torch.rand(3, 70, 64)])
    assert set(outputs) == {"pred_logits", "pred_boxes"}
    assert outputs["pred_logits"].shape == (2, 4, 6 if wanted.variant == "detr" else 5)


def test_models_with_rivals_have_no_entry():
    # A name of the plain or the ENACT model would mislead in the refusal of such a checkpoint.
    model = Model("detr", "resnet50", False, "avgpool")
    assert model.name not in ENTRIES and "with avgpool" in model.title


def test_defaults_match_the_published_training():
    model = load("detr_resnet50", enc_layers=1)
    assert model.num_queries == 100 and model.class_embed.out_features == 92
    assert len(model.transformer.decoder.layers) == 6 and model.transformer.d_model == 256
    assert model.training


def test_a_model_takes_a_list_a_tensor_or_a_padded_batch():
    model, postprocess = tiny(return_postprocessor=True)
    images = torch.rand(2, 3, 64, 64)
    model.eval()
    with torch.no_grad():
        outputs = [model(samples) for samples in (list(images), images, nested_tensor_from_tensor_list(list(images)))]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    (first, _) = postprocess(outputs[0], torch.tensor([[64, 64], [64, 64]]))
    assert set(first) >= {"scores", "labels", "boxes"} and isinstance(
        nested_tensor_from_tensor_list(images), NestedTensor
    )


def test_model_flags_are_accepted():
    model = tiny("detr_resnet50_enact", enact_clusters="regions", enact_max_clusters=9, aux_loss=True, dec_layers=2)
    clustering = model.transformer.encoder.layers[0].self_attn
    assert (clustering.clusters, clustering.max_clusters) == ("regions", 9)
    assert len(model(torch.rand(1, 3, 64, 64))["aux_outputs"]) == 1


def test_backbone_weights_can_be_loaded_from_a_file(tmp_path):
    body = tiny().backbone[0].body
    torch.save({f"{key}": value for key, value in body.state_dict().items()}, tmp_path / "resnet50.pth")
    assert load_backbone_weights("resnet50", str(tmp_path / "resnet50.pth"))
    loaded = tiny(backbone_weights=str(tmp_path / "resnet50.pth")).backbone[0].body
    torch.testing.assert_close(dict(loaded.state_dict()), dict(body.state_dict()), rtol=0, atol=0)


def test_a_panoptic_model_comes_with_its_postprocessor():
    model, postprocess = tiny("detr_resnet50_panoptic", return_postprocessor=True, threshold=0.0)
    assert model.detr.class_embed.out_features == 251
    with torch.no_grad():
        # Every query predicts this label, so one segment covers all pixels.
        model.detr.class_embed.bias[187] = 50.0
    outputs = model.eval()(torch.rand(1, 3, 64, 80))
    assert outputs["pred_masks"].shape == (1, 4, 16, 20)
    (found,) = postprocess(outputs, torch.tensor([[64, 80]]))
    ((segment,), id_map) = found["segments"], found["id_map"]
    assert (segment["category_id"], segment["isthing"], segment["area"]) == (187, False, 64 * 80)
    assert id_map.shape == (64, 80) and (id_map == segment["id"]).all()
    assert postprocess.things.issuperset(range(1, 91)) and max(postprocess.things) == 90
    assert tiny("detr_resnet50_panoptic", return_postprocessor=True)[1].threshold == 0.85


# ----------------------------------------------------------------------------------------------------- pretrained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of `conditional_detr_resnet50_enact` with four labels, in the originals' format."""
    torch.manual_seed(1)
    model = tiny("conditional_detr_resnet50_enact", num_classes=4, enact_per_image=True)
    argv = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    args = parse("conditional", *argv, "--num_queries", "4", "--backbone", "resnet50", "--enact_per_image")
    path = tmp_path_factory.mktemp("hub") / "checkpoint.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(**vars(args))}, path)
    return path


@pytest.mark.parametrize("num_classes", [None, 4])
@pytest.mark.slow
def test_a_pretrained_model_has_the_weights_and_settings_of_its_checkpoint(checkpoint, num_classes):
    model = load("conditional_detr_resnet50_enact", pretrained=checkpoint, num_classes=num_classes)
    saved = torch.load(checkpoint, weights_only=True)["model"]
    torch.testing.assert_close(dict(model.state_dict()), saved, rtol=0, atol=0)
    assert model.transformer.encoder.layers[0].self_attn.per_image
    flags = {"pretrained": str(checkpoint), "enact_per_image": False}
    assert not load("conditional_detr_resnet50_enact", **flags).transformer.encoder.layers[0].self_attn.per_image


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("conditional_detr_resnet101_enact", {}, "not of Conditional DETR, with ENACT, on a ResNet-101: load condit"),
        ("conditional_detr_resnet50", {}, "load conditional_detr_resnet50_enact"),
        ("conditional_detr_resnet50_dc5_enact", {}, "load conditional_detr_resnet50_enact"),
        ("detr_resnet50_enact", {}, "load conditional_detr_resnet50_enact"),
        ("conditional_detr_resnet50_enact", {"num_classes": 7}, "has 4 labels, num_classes=7 .* --pretrained"),
        ("conditional_detr_resnet50_enact", {"num_queries": 9}, "query_embed.weight is"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused(checkpoint, name, flags, message):
    with pytest.raises(UserError, match=message):
        load(name, pretrained=checkpoint, **flags)


def test_published_files_exist_only_for_plain_detr(monkeypatch):
    asked = []

    def fetch(source: str):
        asked.append(source)
        raise UserError("no network")

    monkeypatch.setattr(hub, "load_checkpoint", fetch)
    for name in ENTRIES:
        with pytest.raises(UserError) as error:
            ENTRIES[name](pretrained=True)
        if name not in PUBLISHED:
            assert f"{name}: pretrained=True: no published file" in str(error.value)
            assert "pretrained='path/to/checkpoint.pth'" in str(error.value)
    assert [Path(url).name for url in asked] == [
        "detr-r50-e632da11.pth", "detr-r50-dc5-f0fb7ef5.pth", "detr-r101-2c7b67e5.pth", "detr-r101-dc5-a2e86def.pth",
        "detr-r50-panoptic-00ce5173.pth", "detr-r50-dc5-panoptic-da08f1b1.pth", "detr-r101-panoptic-40021d53.pth",
    ]  # fmt: skip
    assert all(url.startswith("https://") and torch.hub.HASH_REGEX.search(url) for url in asked)


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("detr_resnet50", {"num_query_position": 3}, "no flag num_query_position .*; there are .*num_queries"),
        ("detr_resnet50", {"backbone": "resnet18"}, "no flag backbone"),
        ("detr_resnet50", {"lr": 1}, "no flag lr"),
        ("detr_resnet50", {"threshold": 0.5}, "no flag threshold"),
        ("detr_resnet50_panoptic", {"masks": False}, "no flag masks"),
        ("detr_resnet50_panoptic", {"hidden_dim": 8}, "--hidden_dim 8: the mask head"),
        ("detr_resnet50_enact", {"enact_clusters": "balls"}, "enact_clusters='balls': choose from windows, regions"),
        ("detr_resnet50", {"hidden_dim": 30}, "detr_resnet50: --hidden_dim 30"),
        ("detr_resnet50", {"pretrained": "/nowhere.pth"}, "/nowhere.pth: no such file"),
        ("detr_resnet50", {"backbone_weights": "/nowhere.pth"}, "--backbone_weights /nowhere.pth: no such file"),
    ],
)  # fmt: skip
def test_invalid_flags_are_refused(name, flags, message):
    with pytest.raises(UserError, match=message):
        load(name, **flags)


def test_a_checkpoint_that_fits_no_variant_is_refused(tmp_path):
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="fits none of the variants"):
        load("detr_resnet50", pretrained=tmp_path / "other.pth")


# ------------------------------------------------------------------------------------------------ pretrained panoptic

ANIMALS = {"category_ids": [None, 1, 2], "names": ["N/A", "cat", "grass"]}


def panoptic_checkpoint(path: Path, rows: int, **more) -> Path:
    """A checkpoint with the tensor names and shapes of the reference's DETR with ENACT and masks, and `rows` logits."""
    names = json.loads(str(np.load(GOLDEN / "detr_enact.npz")["r50_masks/params"]))
    for part in ("weight", "bias"):
        names[f"detr.class_embed.{part}"][0] = rows
    # Expanded tensors, which keep the file small.
    torch.save({"model": {name: torch.full((1,), 0.5).expand(shape) for name, shape in names.items()}, **more}, path)
    return path


PANOPTIC_ARGS = {"masks": True, "dataset_file": "coco_panoptic", "nheads": 8, "dilation": False}


@pytest.mark.parametrize(
    "rows, more, things",
    [
        (251, {}, {1, 90}),  # as published: weights without arguments
        (92, {"args": PANOPTIC_ARGS}, {1, 90}),  # as the reference's parameters are recorded
        (4, {"args": PANOPTIC_ARGS, "label_map": ANIMALS | {"things": [1]}}, {1}),
    ],
)
@pytest.mark.slow
def test_the_parameters_of_the_reference_load_strictly(rows, more, things, tmp_path):
    path = panoptic_checkpoint(tmp_path / "panoptic.pth", rows, **more)
    model, postprocess = load("detr_resnet50_panoptic_enact", pretrained=path, return_postprocessor=True)
    assert model.detr.class_embed.out_features == rows
    assert all((tensor == 0.5).all() for tensor in model.state_dict().values())
    assert {min(postprocess.things), max(postprocess.things)} == things


@pytest.mark.parametrize(
    "name, more, message",
    [
        ("detr_resnet50_panoptic", {"args": PANOPTIC_ARGS}, "load detr_resnet50_panoptic_enact"),
        ("detr_resnet50_enact", {"args": PANOPTIC_ARGS}, "DETR, panoptic, with ENACT.*load detr_resnet50_panoptic_en"),
        ("detr_resnet50_panoptic_enact", {"args": PANOPTIC_ARGS | {"dataset_file": "coco"}}, "a mask head for insta"),
        ("detr_resnet50_enact", {"args": PANOPTIC_ARGS | {"dataset_file": "coco"}}, "enact_common.load_detector"),
        ("detr_resnet50_panoptic_enact", {"args": PANOPTIC_ARGS, "label_map": ANIMALS}, r"are things .*\(1 cat\).*"),
    ],
)  # fmt: skip
def test_a_panoptic_checkpoint_of_another_model_is_refused(name, more, message, tmp_path):
    path = panoptic_checkpoint(tmp_path / "masks.pth", 4 if "label_map" in more else 92, **more)
    with pytest.raises(UserError, match=message):
        load(name, pretrained=path, return_postprocessor=True)


def test_a_label_map_keeps_its_things_in_json():
    label_map = LabelMap((None, 1, 2), ("N/A", "cat", "grass"), (1,))
    assert LabelMap.from_dict(json.loads(json.dumps(label_map.to_dict()))) == label_map
    assert LabelMap.from_dict(ANIMALS).things is None and LabelMap.from_dict(ANIMALS).to_dict() == ANIMALS
