"""Compatibility with scripts for the original DETR: imports, `torch.jit.script` and `torch.onnx.export`.

Modelled on the original repository's tests (`test_all.py`).
"""

import importlib
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ALL_STAGES, SMALL_MODEL, build
from processes import Forked
from torch import Tensor, nn

from enact_common.boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, generalized_box_iou, masks_to_boxes
from enact_common.export.formats import EXPORTING
from enact_common.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from enact_common.utils.device import TORCH_VERSION
from enact_common.variants import VARIANTS, load_variant

ROOT = Path(__file__).resolve().parents[1]

# Ignore the warnings that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")

SIZES = ([(200, 200), (200, 250)], [(64, 90)], [(64, 90), (128, 40), (97, 131)])


def module_of(variant: str, name: str):
    """The module that a script in a variant's folder imports as `models.NAME`."""
    return importlib.import_module(f"{load_variant(variant).models.__name__}.{name}")


def batch(sizes: list[tuple[int, int]]) -> NestedTensor:
    return nested_tensor_from_tensor_list([torch.rand(3, *size) for size in sizes])


def small(variant: str, attention: str, *flags: str) -> nn.Module:
    argv = (*SMALL_MODEL[variant], "--encoder_attention", attention, "--no_aux_loss", *flags)
    return build(variant, *argv)[0].eval()


SCRIPT = """
    import torch
    from models import build_model
    from models.backbone import Backbone, BackboneBase, Joiner, build_backbone
    from models.matcher import HungarianMatcher, build_matcher
    from models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine, build_position_encoding
    from datasets import build_dataset
    from main import get_args_parser
    from enact_common.boxes import box_cxcywh_to_xyxy, generalized_box_iou, masks_to_boxes
    from enact_common.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
    from hubconf import detr_resnet50

    targets = [{"labels": torch.tensor([3, 1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1]])}]
    logits = torch.zeros(1, 4, 92)
    logits[0, 2, 3] = logits[0, 1, 1] = 5
    boxes = torch.full((1, 4, 4), 0.9)
    boxes[0, 2], boxes[0, 1] = targets[0]["boxes"]
    ((queries, objects),) = HungarianMatcher()({"pred_logits": logits, "pred_boxes": boxes}, targets)
    assert dict(zip(queries.tolist(), objects.tolist())) == {2: 0, 1: 1}

    args = get_args_parser().parse_args(["--backbone", "resnet18", "--backbone_weights", "none", "--enc_layers", "1"])
    model, criterion, postprocessors = build_model(args)
    assert set(postprocessors) == {"bbox"} and model(torch.rand(1, 3, 64, 64))["pred_logits"].shape == (1, 100, 92)
"""


def test_a_script_in_the_folder_finds_its_imports():
    process = Forked(["-c", textwrap.dedent(SCRIPT)], folder=ROOT / "DETR-ENACT")
    _, complained = process.communicate()
    assert process.returncode == 0, complained


def test_box_functions_keep_the_originals_results():
    boxes = torch.rand(10, 4)
    torch.testing.assert_close(box_xyxy_to_cxcywh(box_cxcywh_to_xyxy(boxes)), boxes)
    corners = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0]])
    # Overlap 1, union 7, hull 9.
    torch.testing.assert_close(generalized_box_iou(corners[:1], corners[1:]), torch.tensor([[1 / 7 - 2 / 9]]))
    masks = torch.zeros(2, 8, 9, dtype=torch.bool)
    masks[0, 2:5, 3:8] = masks[1, 7, 0] = True
    assert masks_to_boxes(masks).tolist() == [[3, 2, 7, 4], [0, 7, 0, 7]]


# --------------------------------------------------------------------------------------------------- torch.jit.script


@pytest.mark.parametrize("name", ["PositionEmbeddingSine", "PositionEmbeddingLearned"])
def test_position_encodings_can_be_scripted(name):
    encoding = getattr(module_of("detr", "position_encoding"), name)()
    features = NestedTensor(torch.rand(2, 3, 7, 9), torch.rand(2, 7, 9) > 0.9)
    assert torch.jit.script(encoding)(features).equal(encoding(features))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("interm_layers", [False, True])
def test_backbones_can_be_scripted(variant, interm_layers):
    backbone = module_of(variant, "backbone").Backbone("resnet18", True, interm_layers, False, weights="none")
    scripted, images = torch.jit.script(backbone), batch([(97, 64), (80, 131)])
    expected, found = backbone(images), scripted(images)
    assert list(expected) == list(found) and len(found) == (4 if interm_layers else 1)
    for name, level in expected.items():
        assert found[name].tensors.equal(level.tensors) and found[name].mask.equal(level.mask)
    # Scripting leaves the original modules unchanged.
    assert not any(isinstance(module, torch.jit.ScriptModule) for module in backbone.modules())


def test_a_backbone_with_position_encoding_can_be_scripted():
    backbones, encodings = module_of("detr", "backbone"), module_of("detr", "position_encoding")
    backbone = backbones.Backbone("resnet18", weights="none")
    joiner = backbones.Joiner(backbone, encodings.PositionEmbeddingSine())
    images = batch([(97, 64), (80, 131)])
    (expected, places), (found, found_places) = joiner(images), torch.jit.script(joiner)(images)
    assert found[0].tensors.equal(expected[0].tensors) and found_places[0].equal(places[0])
    assert not any(isinstance(module, torch.jit.ScriptModule) for module in joiner.modules())


def test_models_can_be_scripted(variant_and_attention, tmp_path):
    model = small(*variant_and_attention)
    scripted = torch.jit.script(model)
    torch.jit.save(scripted, tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    # In a graph, ENACT and Anchor DETR sum in another order.
    exact = variant_and_attention[0] != "anchor" and variant_and_attention[1] != "enact"
    with torch.no_grad():
        for sizes in SIZES:
            images = batch(sizes)
            expected = model(images)
            for outputs in (scripted(images), loaded(images)):
                assert list(outputs) == ["pred_logits", "pred_boxes"]
                for name, value in outputs.items():
                    tolerance = 0 if exact else 1e-5
                    torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)
    assert not any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())


def test_a_model_with_masks_can_be_scripted():
    model = small("detr", "enact", *ALL_STAGES, "--masks", "--num_queries", "20")
    scripted, images = torch.jit.script(model), batch([(97, 64), (80, 131), (64, 64)])
    with torch.no_grad():
        expected = model(images)
        found = scripted(images)
    assert found.keys() == expected.keys() == {"pred_logits", "pred_boxes", "pred_masks"}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def test_a_scripted_model_follows_its_weights():
    model = small("detr", "mhsa")
    scripted, images = torch.jit.script(model), batch([(64, 96)])
    with torch.no_grad():
        before = scripted(images)["pred_logits"]
        model.class_embed.bias += 1
        torch.testing.assert_close(scripted(images)["pred_logits"], before + 1)


class Wrapped(nn.Module):
    """A user's module around a model, which takes a list of images of any sizes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: list[Tensor]) -> dict[str, Tensor]:
        return self.model(nested_tensor_from_tensor_list(inputs))


def test_a_module_that_contains_a_model_can_be_scripted():
    wrapped = Wrapped(small("detr", "mhsa"))
    images = [torch.rand(3, 200, 200), torch.rand(3, 200, 250)]
    with torch.no_grad():
        expected = wrapped(images)
        for found in (torch.jit.script(wrapped)(images), wrapped(images)):
            assert all(value.equal(expected[name]) for name, value in found.items())


def test_a_scripted_batch_is_the_same_batch():
    script = torch.jit.script(nested_tensor_from_tensor_list)
    images = [torch.rand(3, 20, 30), torch.rand(3, 25, 10)]
    expected, found = nested_tensor_from_tensor_list(images), script(images)
    assert found.tensors.equal(expected.tensors) and found.mask.equal(expected.mask)
    with pytest.raises(Exception, match="at least one image"):
        script([])


# --------------------------------------------------------------------------------------------------- torch.onnx.export


@pytest.mark.skipif(TORCH_VERSION < EXPORTING, reason="the torch.export of this PyTorch is too old")
def test_a_bare_model_can_be_exported_to_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = small("detr", "enact", "--dec_layers", "1")
    names = ["pred_logits", "pred_boxes"]
    images = torch.rand(1, 3, 75, 80)
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", input_names=["inputs"], output_names=names)
    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(names, {"inputs": images.numpy()})
    with torch.no_grad():
        expected = model(images)
    for name, value in zip(names, found, strict=True):
        torch.testing.assert_close(torch.from_numpy(value), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["mhsa", "enact"])
def test_models_take_a_padded_batch_a_tensor_or_a_list(attention):
    model = small("detr", attention)
    images = torch.rand(2, 3, 64, 80)
    with torch.no_grad():
        outputs = [model(samples)["pred_logits"] for samples in (batch([(64, 80)] * 2), images, list(images))]
    assert [value.shape for value in outputs] == [(2, 8, 92)] * 3
    assert outputs[1].equal(outputs[2])
