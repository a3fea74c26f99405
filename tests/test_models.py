"""The models of every variant with and without ENACT: shapes, inputs, options, copies and dtypes."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ALL_STAGES, ATTENTIONS, SMALL_MODEL, TOKENS, build, parse
from processes import FORKS, Forked
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as F

from enact_common import LoadedDetector, NestedTensor, UserError, load_variant, nested_tensor_from_tensor_list
from enact_common.attention.clustering import EntropyClustering
from enact_common.attention.clusters import Windows
from enact_common.attention.rivals import RIVALS
from enact_common.checkpoints.contents import arguments_of
from enact_common.data.categories import LabelMap
from enact_common.hub import ENTRIES
from enact_common.models import backbone
from enact_common.models.backbone import Backbone, FrozenNorm, convolve_and_norm, load_backbone_weights
from enact_common.models.normalization import IMAGENET_MEAN, IMAGENET_STD
from enact_common.models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine, encode_points
from enact_common.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[1]


SOME_OBJECTS = {"labels": torch.tensor([1, 4]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.4]])}


# Flags for three feature levels; they need all stages of a dilated ResNet-50.
LEVELS = ["--num_feature_levels", "3", "--backbone", "resnet50", "--dilation", *ALL_STAGES]


def small(variant_and_attention, *argv):
    """A small model, criterion and postprocessors for a (variant, attention) pair."""
    variant, attention = variant_and_attention
    return build(variant, *SMALL_MODEL[variant], "--encoder_attention", attention, "--num_classes", "5", *argv)


def test_forward_gives_logits_and_boxes(variant_and_attention):
    model, _, _ = small(variant_and_attention)
    outputs = model([torch.randn(3, 64, 96), torch.randn(3, 80, 64)])
    assert outputs["pred_logits"].shape[:2] == outputs["pred_boxes"].shape[:2] == (2, 8)
    assert outputs["pred_boxes"].shape[2] == 4
    assert ((outputs["pred_boxes"] >= 0) & (outputs["pred_boxes"] <= 1)).all()
    assert len(outputs["aux_outputs"]) == 1
    assert outputs["aux_outputs"][0]["pred_logits"].shape == outputs["pred_logits"].shape


def test_a_list_a_tensor_and_a_nested_tensor_give_the_same_boxes(variant_and_attention):
    model, _, _ = small(variant_and_attention)
    model.eval()
    images = torch.randn(2, 3, 64, 96)
    expected = model(nested_tensor_from_tensor_list(images))["pred_boxes"]
    assert_close(model(images)["pred_boxes"], expected)
    assert_close(model(list(images))["pred_boxes"], expected)


def test_uint8_pixels_are_normalised_by_the_model(variant_and_attention):
    model, _, _ = small(variant_and_attention)
    model.eval()
    images = [torch.randint(256, (3, *shape), dtype=torch.uint8) for shape in ((64, 96), (80, 64))]
    normalized = [F.normalize(image / 255, IMAGENET_MEAN, IMAGENET_STD) for image in images]
    expected = model(nested_tensor_from_tensor_list(normalized))
    outputs = model(nested_tensor_from_tensor_list(images))
    for name in ("pred_logits", "pred_boxes"):
        assert_close(outputs[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", ["0 1", "2 2"])
def test_losses_reach_every_trained_parameter(variant_and_attention, layers):
    # DistributedDataParallel would wait for the gradient of an unreached parameter.
    enc_layers, dec_layers = layers.split()
    model, criterion, _ = small(variant_and_attention, "--enc_layers", enc_layers, "--dec_layers", dec_layers)
    losses = criterion(model([torch.randn(3, 96, 96)]), [SOME_OBJECTS])
    # Anchor DETR lists weights for encoder losses that it does not compute.
    assert {name for name in criterion.weight_dict if not name.endswith("_enc")} <= set(losses)
    criterion.total(losses).backward()
    unreached = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unreached


def test_mixed_precision_keeps_boxes_in_float32_and_close(variant_and_attention):
    model, criterion, _ = small(variant_and_attention)
    images = torch.randn(2, 3, 96, 64)
    expected = model(images)["pred_boxes"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images)
    assert outputs["pred_boxes"].dtype == outputs["aux_outputs"][0]["pred_boxes"].dtype == torch.float32
    assert_close(outputs["pred_boxes"], expected, rtol=0, atol=0.1)
    criterion.total(criterion(outputs, [SOME_OBJECTS] * 2)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_no_aux_loss(variant_and_attention):
    model, criterion, _ = small(variant_and_attention, "--no_aux_loss")
    outputs = model(torch.randn(1, 3, 64, 64))
    assert "aux_outputs" not in outputs
    assert not any(name.endswith("_0") for name in criterion.weight_dict)


def test_postprocess_scales_boxes_to_the_target_size(variant_and_attention):
    model, _, postprocessors = small(variant_and_attention)
    width = model(torch.zeros(1, 3, 64, 64))["pred_logits"].shape[-1]
    logits = torch.full((1, 2, width), -10.0)
    logits[0, 0, 3] = 10
    logits[0, 1, 1] = 9
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]])
    # (height, width)
    (result,) = postprocessors["bbox"]({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]]))
    assert result["labels"].tolist()[:2] == [3, 1]
    assert_close(result["boxes"][:2], torch.tensor([[80.0, 30.0, 120.0, 70.0], [0.0, 0.0, 100.0, 100.0]]))
    assert (result["scores"][:2] > 0.99).all()
    with pytest.raises(ValueError, match="target_sizes"):
        postprocessors["bbox"]({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([100, 200]))


def test_detr_scores_exclude_no_object():
    _, _, postprocessors = small(("detr", "enact"))
    logits = torch.tensor([[[0.0, 1.0, 0.0, 0.0, 0.0, 9.0]]])
    (result,) = postprocessors["bbox"](
        {"pred_logits": logits, "pred_boxes": torch.full((1, 1, 4), 0.5)}, torch.tensor([[10, 10]])
    )
    assert result["labels"].tolist() == [1]
    assert_close(result["scores"], logits.softmax(-1)[0, :, 1])


def test_independent_classes_are_ranked_over_all_queries():
    _, _, postprocessors = small(("conditional", "enact"))
    logits = torch.tensor([[[0.0, 3.0, -9.0, 2.0, -9.0], [-9.0, -9.0, -9.0, -9.0, 1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.5, 0.5]]])
    (result,) = postprocessors["bbox"]({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[10, 10]]))
    # Ten (query, class) pairs, most likely first: query 0 has three of the first four.
    assert result["labels"].tolist()[:4] == [1, 3, 4, 0]
    assert_close(result["scores"][:4], torch.tensor([3.0, 2.0, 1.0, 0.0]).sigmoid())
    assert result["boxes"][:4, 2].tolist() == [10, 10, 5, 10]
    assert len(result["scores"]) == 10
    many = {"pred_logits": logits.repeat(1, 50, 1), "pred_boxes": boxes.repeat(1, 50, 1)}
    assert len(postprocessors["bbox"](many, torch.tensor([[10, 10]]))[0]["scores"]) == 100


@pytest.mark.slow
@pytest.mark.parametrize("backbone, stages", [("resnet18", 1), ("resnet18", 3), ("resnet50", 2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fewer_stages_give_finer_maps_and_are_inferred_from_the_weights(variant, backbone, stages):
    flags = ["--backbone", backbone, "--backbone_stages", str(stages)]
    model, _, _ = small((variant, "enact"), *flags)
    maps = []
    model.transformer.register_forward_pre_hook(lambda _, args: maps.append(args[1].shape))
    assert model([torch.randn(3, 64, 96)])["pred_logits"].shape[:2] == (1, 8)
    assert maps == [(1, 64 >> (stages + 1), 96 >> (stages + 1))]
    weights = model.state_dict()
    assert not any(f"layer{stages + 1}." in name for name in weights)
    # A file of weights without arguments.
    args, _ = arguments_of({"model": weights, "args": {}}, variant)
    assert (args.backbone, args.backbone_stages) == (backbone, stages)


@pytest.mark.parametrize("flag, way_out", [("--dilation", "--no-dilation"), ("--masks", "leave one of them out")])
def test_fewer_stages_are_refused_where_all_are_needed(flag, way_out):
    parser = load_variant("detr").main.get_args_parser()
    args = parser.parse_args(["--coco_path", "data", "--backbone_stages", "2", flag])
    with pytest.raises(UserError, match=f"--backbone_stages 2: {flag} needs all 4; .*{way_out}"):
        parser.check(args)


@pytest.mark.parametrize("flags", [["--pre_norm"], ["--position_embedding", "learned"], ["--enc_layers", "0"]], ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("variant", ["detr", "conditional"])
def test_options_of_detr_and_conditional_detr_build_and_run(variant, attention, flags):
    model, _, _ = small((variant, attention), *flags)
    assert model(torch.randn(1, 3, 64, 64))["pred_logits"].shape[:2] == (1, 8)


@pytest.mark.parametrize(
    "flags, queries",
    [
        (["--spatial_prior", "grid", "--num_query_position", "10"], 18),
        (["--attention_type", "nn.MultiheadAttention"], 8),
        (LEVELS, 8),
        ([*LEVELS, "--enc_layers", "1"], 8),
        (["--hidden_dim", "48"], 8),
        ([*LEVELS, "--separate_images", "--attention_type", "nn.MultiheadAttention"], 8),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_options_of_anchor_detr_build_run_and_train(attention, flags, queries):
    model, criterion, _ = small(("anchor", attention), "--enc_layers", "2", *flags)
    outputs = model([torch.randn(3, 70, 64), torch.randn(3, 64, 96)])
    assert outputs["pred_logits"].shape == (2, queries, 5) and model.num_queries == queries
    criterion.total(criterion(outputs, [SOME_OBJECTS, SOME_OBJECTS])).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_a_grid_of_anchor_points_covers_the_image_evenly():
    model, _, _ = small(("anchor", "enact"), "--spatial_prior", "grid", "--num_query_position", "5")
    points = model.transformer.anchor_points()
    # The square number nearest to 5 is 4: the centres of four quarters.
    assert sorted(points.tolist()) == [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    assert not any("grid" in name for name in model.state_dict())
    assert model.to("meta").transformer.anchor_points().device.type == "meta"


def test_boxes_start_at_the_reference_points():
    model, _, _ = small(("anchor", "enact"))
    boxes = model(torch.randn(1, 3, 64, 64))["pred_boxes"][0]
    assert_close(boxes[:, :2], model.transformer.position.weight.repeat(2, 1), rtol=1e-4, atol=1e-4)
    assert_close(boxes[:, 2:], torch.full((8, 2), -2.0).sigmoid())
    model, _, _ = small(("conditional", "enact"))
    boxes = model(torch.randn(1, 3, 64, 64))["pred_boxes"][0]
    points = model.transformer.decoder.ref_point_head(model.query_embed.weight).sigmoid()
    assert_close(boxes, torch.cat((points, torch.full((8, 2), 0.5)), dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_with_separate_images_a_result_does_not_depend_on_the_batch(attention):
    flags = (*LEVELS, "--enc_layers", "4", "--backbone_norm", "frozen")
    images = torch.randn(2, 3, 64, 64)
    differs = {}
    for own in ([], ["--separate_images"]):
        torch.manual_seed(0)
        model, _, _ = small(("anchor", attention), *flags, *own)
        # Fix the window length, so that only the flag decides whether images depend on each other.
        for module in model.modules():
            if hasattr(module, "cluster_scores"):
                module.cluster_scores = lambda logits, mask: Windows(logits.unflatten(1, (-1, 2)).softmax(-1))
        model.eval()
        together, alone = model(images)["pred_logits"][:1], model(images[:1])["pred_logits"]
        differs[len(own)] = not torch.allclose(together, alone, rtol=1e-4, atol=1e-4)
    assert differs == {0: True, 1: False}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, variant",
    [(name, variant) for variant in VARIANTS for name in (RIVALS if variant == "detr" else ("avgpool", "linear"))],
)
def test_rivals_train_in_every_variant(name, variant):
    model, criterion, _ = small((variant, name), *TOKENS[variant])
    outputs = model([torch.randn(3, 64, 96), torch.randn(3, 80, 64)])
    assert outputs["pred_boxes"].shape == (2, 8, 4)
    criterion.total(criterion(outputs, [SOME_OBJECTS] * 2)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", [name for name, rival in RIVALS.items() if rival.takes_budget])
def test_the_token_budget_reaches_the_layer(name):
    model, _, _ = small(("detr", name), "--token_budget", "5", "--dropout", "0.25")
    attention = model.transformer.encoder.layers[0].self_attn
    assert (attention.token_budget, attention.dropout) == (5, 0.25)


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_of_row_column_attention_are_refused(name):
    args = parse("anchor", "--encoder_attention", name, "--coco_path", "x")
    message = f"--encoder_attention {name} .* pass --attention_type nn.MultiheadAttention"
    with pytest.raises(UserError, match=message):
        load_variant("anchor").main.get_args_parser().check(args)
    with pytest.raises(UserError, match=message):
        small(("anchor", name))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num_feature_levels 3 --no-dilation", "--num_feature_levels 3 needs --dilation"),
        ("--separate_images", "--separate_images has no effect"),
        ("--enact_scale_logits", "--enact_scale_logits: row-column attention scales its logits .* leave it out"),
        ("--enact_scale_logits --attention_type nn.MultiheadAttention", None),
    ],
)
def test_anchor_detr_refuses_unsupported_flags(flags, message):
    args = parse("anchor", *flags.split(), "--coco_path", "x")
    check = load_variant("anchor").main.get_args_parser().check
    if message is None:
        return check(args)
    with pytest.raises(UserError, match=message):
        check(args)


def test_anchor_detr_refuses_other_orders_than_row_by_row():
    with pytest.raises(UserError, match="--enact_order hilbert: Anchor DETR .* leave it out"):
        build("anchor", *SMALL_MODEL["anchor"], "--enact_order", "hilbert")


@pytest.mark.parametrize("variant", VARIANTS)
def test_shallow_backbones_are_refused_before_any_work(variant):
    args = parse(variant, "--coco_path", "x", "--backbone", "resnet18", "--dilation")
    with pytest.raises(UserError, match="--backbone resnet18 has no dilated form: pass --no-dilation"):
        load_variant(variant).main.get_args_parser().check(args)


def test_pre_norm_leaves_enact_layers_post_norm():
    # Like the reference, whose pre-norm checkpoints were trained this way.
    for attention, before in (("enact", False), ("mhsa", True), ("avgpool", True)):
        model, _, _ = small(("detr", attention), "--pre_norm")
        assert model.transformer.encoder.layers[0].normalize_before is before
        assert model.transformer.encoder.norm is not None
        assert model.transformer.decoder.layers[0].normalize_before


def test_dilation_halves_the_stride():
    argv = ["--backbone_weights", "none", "--backbone", "resnet50"]
    images = torch.zeros(1, 3, 64, 64)
    batch = NestedTensor(images, torch.zeros(1, 64, 64, dtype=torch.bool))
    for flags, side in (([], 2), (["--dilation"], 4)):
        joiner = load_variant("detr").models.backbone.build_backbone(parse("detr", *argv, *flags))
        features, pos = joiner(batch)
        assert features[-1].tensors.shape == (1, 2048, side, side)
        assert features[-1].mask.shape == (1, side, side) and pos[-1].shape == (1, 256, side, side)


def test_shallow_backbones_cannot_be_dilated():
    with pytest.raises(UserError, match="--dilation needs --backbone resnet50"):
        build("detr", "--backbone", "resnet18", "--dilation", "--backbone_weights", "none")


def test_frozen_norm_freezes_the_stem_and_batch_norm_trains_it():
    frozen = Backbone("resnet18", weights="none", norm="frozen")
    trained = {name.split(".")[1] for name, p in frozen.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    batch = Backbone("resnet18", weights="none", norm="batch")
    assert all(p.requires_grad for p in batch.parameters())
    assert not any(p.requires_grad for p in Backbone("resnet18", False, weights="none").parameters())


@pytest.mark.parametrize(
    "name, dilation", [("resnet18", False), pytest.param("resnet50", True, marks=pytest.mark.slow)]
)
def test_folded_norms_equal_separate_norms(name, dilation, monkeypatch):
    """Compares maps and gradients in float64, where rounding flips no activation."""
    model = Backbone(name, weights="none", dilation=dilation, return_interm_layers=True).double()
    for key, buffer in model.named_buffers():
        buffer.copy_(torch.rand_like(buffer) + (0.5 if "bias" not in key and "mean" not in key else -0.5))
    images = NestedTensor(torch.randn(2, 3, 64, 96).double(), torch.zeros(2, 64, 96, dtype=torch.bool))

    def maps_and_gradients():
        model.zero_grad()
        maps = [level.tensors for level in model(images).values()]
        sum(level.square().mean() for level in maps).backward()
        return maps + [p.grad for p in model.parameters() if p.requires_grad]

    folded = maps_and_gradients()
    monkeypatch.setattr(backbone, "convolve_and_norm", lambda x, conv, norm: norm(conv(x)))
    for ours, expected in zip(folded, maps_and_gradients(), strict=True):
        assert_close(ours, expected)


def frozen_norm() -> tuple[torch.nn.Conv2d, FrozenNorm]:
    """A convolution and a frozen norm with random buffers."""
    norm = FrozenNorm(4)
    norm.load_state_dict({name: torch.rand(4) + 0.5 for name in norm.state_dict()})
    return torch.nn.Conv2d(3, 4, 3, bias=False), norm


def loaded(norm):
    norm.load_state_dict({name: torch.rand(4) + 0.5 for name in norm.state_dict()})
    return norm


def assigned(norm):
    norm.load_state_dict({name: torch.rand(4) + 0.5 for name in norm.state_dict()}, assign=True)
    return norm


def written_to(norm):
    norm.running_var.mul_(3)
    norm.bias.add_(1)
    return norm


def replaced(norm):
    norm.running_mean = torch.rand(4)
    return norm


def pickled(norm):
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CHANGES = [loaded, assigned, written_to, replaced, pickled, copy.deepcopy, lambda norm: loaded(copy.deepcopy(norm))]
CHANGES += [lambda norm: norm.double(), lambda norm: norm.double().float(), lambda norm: written_to(norm.double())]


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_frozen_norms_constants_follow_its_buffers(change, once):
    conv, norm = frozen_norm()
    norm.keeps_folded = once
    with torch.no_grad():
        convolve_and_norm(torch.randn(1, 3, 8, 8), conv, norm)
        norm = change(norm)
        conv = conv.to(norm.weight.dtype)
        for _ in range(2):
            x = torch.randn(1, 3, 8, 8, dtype=norm.weight.dtype)
            assert_close(convolve_and_norm(x, conv, norm), norm(conv(x)))
            conv.weight.mul_(2)  # in place, like an optimizer
    assert list(norm.state_dict()) == list(torchvision.ops.FrozenBatchNorm2d(4).state_dict())


def test_functional_call_uses_the_given_buffers():
    conv, norm = frozen_norm()
    other = {name: torch.rand(4) + 0.5 for name in norm.state_dict()}
    x, expected = torch.randn(1, 3, 8, 8), loaded(copy.deepcopy(norm))
    expected.load_state_dict(other)
    block = torch.nn.ModuleDict({"norm": norm})
    block.forward = lambda x: convolve_and_norm(x, conv, norm)
    with torch.no_grad():
        before = block(x)
        found = torch.func.functional_call(block, {f"norm.{name}": tensor for name, tensor in other.items()}, (x,))
        assert_close(found, expected(conv(x)))
        assert_close(block(x), before)


def test_a_frozen_norms_constants_are_computed_once(monkeypatch):
    model = Backbone("resnet18", weights="none")
    images = NestedTensor(torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    calls, rsqrt = [], torch.Tensor.rsqrt
    monkeypatch.setattr(torch.Tensor, "rsqrt", lambda self: calls.append(self) or rsqrt(self))
    model(images)
    assert calls == []
    model.body["bn1"].running_var.mul_(2)
    model(images), model(images)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_clusters_in_every_dtype_equal_those_of_float32(variant, dtype):
    """Compares cluster weights of the encoder layers for the same rounded weights and inputs."""
    model, twin = (build(variant, *SMALL_MODEL[variant], "--encoder_attention", "enact")[0] for _ in range(2))
    twin.load_state_dict(model.to(dtype).state_dict())
    clusterings = [[m for m in m.modules() if isinstance(m, EntropyClustering)] for m in (model, twin)]
    assert clusterings[0]
    for layers in zip(*clusterings, strict=True):
        weights = []
        x, y, source = (5 * torch.randn(2, *shape, 32).to(dtype) for shape in ((30,), (20,), (20, 30)))
        for layer in layers:
            layer.register_cluster_hook(lambda information, clusters, weights=weights: weights.append(clusters.weights))
            own = layer.W_prob.weight.dtype
            if variant == "anchor":
                outputs = layer(source.to(own), x.to(own), y.to(own))[:3]
            else:
                tokens = source.flatten(1, 2).transpose(0, 1).to(own)
                outputs = layer(tokens, tokens, tokens)[:1]
            assert all(torch.isfinite(output).all() and output.dtype == own for output in outputs)
        assert weights[0].dtype == torch.promote_types(dtype, torch.float32)
        assert_close(weights[0].float(), weights[1])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_backbones_compute_what_torchvision_computes(name):
    """With batch norm, the same weights give the same result as torchvision's network."""
    ours = Backbone(name, weights="none", norm="batch").eval()
    theirs = torchvision.models.get_model(name, weights=None).eval()
    theirs.load_state_dict(ours.body.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    (level,) = ours(NestedTensor(images, torch.zeros(1, 64, 64, dtype=torch.bool))).values()
    pooled = theirs.fc(level.tensors.mean(dim=(2, 3)))
    assert_close(pooled, theirs(images))


def test_backbone_weights_from_a_file(tmp_path):
    source = Backbone("resnet18", weights="none", norm="frozen")
    state = {name.removeprefix("body."): tensor for name, tensor in source.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save({"model": {**state, "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}}, path)
    loaded = Backbone("resnet18", weights=str(path), norm="frozen")
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"not tensors", "not a file of tensors"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "not a resnet18 state dict"),
        ([1, 2], "expected a state dict"),
    ],
    ids=["missing", "garbage", "part", "list"],
)
def test_unusable_backbone_weights_are_refused(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        Backbone("resnet18", weights=str(path))


def test_default_weights_without_a_network_name_the_alternatives(monkeypatch, tmp_path):
    from urllib.error import URLError

    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.OpenerDirector.open", offline)
    with pytest.raises(UserError, match="--backbone_weights PATH.*--backbone_weights none --backbone_norm batch"):
        load_backbone_weights("resnet50", "default")


def test_no_weights_are_fetched_for_a_checkpoint(monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError("fetched")

    monkeypatch.setattr("enact_common.models.backbone.download", fetch)
    build("detr", "--backbone", "resnet18", "--resume", "checkpoint.pth")
    build("detr", "--backbone", "resnet18", "--eval")
    with pytest.raises(AssertionError, match="fetched"):
        build("detr", "--backbone", "resnet18")


def test_sine_encoding_counts_cells_without_padding():
    mask = torch.zeros(1, 4, 8, dtype=torch.bool)
    mask[:, :, 4:] = True
    features = NestedTensor(torch.zeros(1, 3, 4, 8), mask)
    pos = PositionEmbeddingSine(8, normalize=True)(features)
    assert pos.shape == (1, 16, 4, 8)
    # The last column and row without padding are at the full circle.
    angle = torch.tensor(2 * torch.pi)
    assert pos[0, 8, 0, 3].item() == pytest.approx(angle.sin().item(), abs=1e-4)
    assert pos[0, 9, 0, 1].item() == pytest.approx((angle / 2).cos().item(), abs=1e-4)
    assert pos[0, 0, 0, 0].item() == pytest.approx((angle / 4).sin().item(), abs=1e-4)


def test_learned_encoding_refuses_maps_that_are_too_large():
    features = NestedTensor(torch.zeros(1, 3, 51, 8), torch.zeros(1, 51, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="--position_embedding sine"):
        PositionEmbeddingLearned(8)(features)


@pytest.mark.parametrize("images", [[], [torch.zeros(3, 4)], [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4)]])
def test_inputs_that_are_not_a_batch_of_images_are_refused(images):
    with pytest.raises(ValueError):
        nested_tensor_from_tensor_list(images)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_folder_works_as_the_working_directory(variant):
    # Users of the original repositories import it this way.
    encodings = "encode_points" if variant == "anchor" else "PositionEmbeddingSine, PositionEmbeddingLearned"
    code = (
        "from models import build_model; from models.matcher import HungarianMatcher, build_matcher; "
        f"from models.position_encoding import {encodings}; from models.backbone import Backbone, BackboneBase; "
        "from models.transformer import Transformer, build_transformer; from main import get_args_parser; "
        "from datasets import build_dataset"
    )
    process = Forked(["-c", code], folder=ROOT / VARIANTS[variant][0])
    assert (process.communicate()[1], process.returncode) == ("", 0)


def test_all_variants_load_in_one_process():
    packages = {variant: load_variant(variant) for variant in VARIANTS}
    assert len({package.models.build_model for package in packages.values()}) == len(VARIANTS) == 3
    for variant, package in packages.items():
        assert Path(package.main.__file__) == ROOT / VARIANTS[variant][0] / "main.py"


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_packages_import_relatively(variant):
    # Absolute imports of `models` or `datasets` would find those of another variant, or fail.
    folder = ROOT / VARIANTS[variant][0]
    for part in ("models", "datasets"):
        for path in (folder / part).rglob("*.py"):
            for line in path.read_text().splitlines():
                assert not line.startswith(("from models", "from datasets", "import models", "import datasets")), path


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="no variant 'yolo'.*detr"):
        load_variant("yolo")


# ------------------------------------------------------------------------------------------------- in other processes


def detector(variant, *argv) -> LoadedDetector:
    """A small detector with random weights and threshold 0, which returns every query."""
    model, _, postprocessors = build(variant, *SMALL_MODEL[variant], "--num_classes", "5", "--no_aux_loss", *argv)
    args = parse(variant, *SMALL_MODEL[variant], *argv)
    labels = LabelMap(tuple(range(5)), tuple("abcde"))
    return LoadedDetector(variant, args, model, postprocessors["bbox"], labels, 0.0, torch.device("cpu"))


KINDS = [(v, "--encoder_attention", a) for v in VARIANTS for a in ATTENTIONS] + [
    ("detr", "--masks", *ALL_STAGES),
    ("detr", "--position_embedding", "learned"),
    ("detr", "--enact_clusters", "regions"),
    ("anchor", "--spatial_prior", "grid"),
    ("anchor", "--attention_type", "nn.MultiheadAttention"),
    ("anchor", "--enact_mask_padding"),
    *(("detr", "--encoder_attention", name) for name in RIVALS),
]


@pytest.mark.slow
def test_detectors_and_models_can_be_loaded_in_a_fresh_process(tmp_path):
    pixels = torch.rand(3, 70, 90)
    expected = []
    for i, kind in enumerate(KINDS):
        made = detector(*kind)
        torch.save(made, tmp_path / f"detector{i}.pt")
        expected.append(made(pixels).scores)
    torch.save(made.model, tmp_path / "model.pt")
    torch.save(ENTRIES["detr_resnet50_enact"](enc_layers=1, dec_layers=1), tmp_path / "hub.pt")
    torch.save(pixels, tmp_path / "pixels")
    # The process does not import the project; unpickling imports the modules it needs.
    code = (
        "import sys, torch; from pathlib import Path; folder = Path(sys.argv[1])\n"
        "loaded = {path.stem: torch.load(path, weights_only=False) for path in folder.glob('*.pt')}\n"
        "assert all(sum(p.numel() for p in value.parameters()) for name, value in loaded.items() if name[0] in 'mh')\n"
        "pixels = torch.load(folder / 'pixels')\n"
        f"torch.save([loaded[f'detector{{i}}'](pixels).scores for i in range({len(KINDS)})], folder / 'scores')"
    )
    # Run in another folder, so that the package is found only by its installation or PYTHONPATH.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path, env=environment)
    for scores, theirs in zip(expected, torch.load(tmp_path / "scores"), strict=True):
        assert_close(scores, theirs)


@pytest.mark.slow
def test_a_detector_works_in_a_pool():
    made, pixels = detector("anchor"), torch.rand(3, 70, 90)
    with FORKS.Pool(1) as pool:  # pickles the detector, as a pool of new interpreters does
        found = pool.apply_async(made, (pixels,)).get(timeout=100)
    assert_close(found.scores, made(pixels).scores)


def test_a_copied_or_moved_detector_is_whole(variant_and_attention):
    variant, attention = variant_and_attention
    made, pixels = detector(variant, "--encoder_attention", attention), torch.rand(3, 70, 90)
    expected = made(pixels).scores
    twin = copy.deepcopy(made)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.zero_()
    assert_close(twin(pixels).scores, expected)
    # The detector's device follows its model.
    twin.model.to("meta")
    assert twin.device.type == "meta"


# -------------------------------------------------------------------------------------------------------------- dtypes


# dtype: largest change of boxes by rounding, as a fraction of the image
CHANGES_BY_ROUNDING = {torch.bfloat16: 0.03, torch.half: 0.005, torch.double: 1e-5}


# Every kind in bf16, and the variants with and without ENACT in all three.
@pytest.mark.parametrize(
    "kind, dtype",
    [(kind, dtype) for i, kind in enumerate(KINDS) for dtype in list(CHANGES_BY_ROUNDING)[: 3 if i < 6 else 1]],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_cast_model_detects_as_before(kind, dtype):
    tolerance = CHANGES_BY_ROUNDING[dtype]
    made, pixels = detector(*kind), torch.rand(3, 70, 90)
    made.model.requires_grad_(False)
    samples = made.model_input(pixels.mul(255).byte())
    expected = made.model(samples)
    made.model.to(dtype)
    outputs = made.model(samples)
    for name in expected:
        assert outputs[name].isfinite().all()
    assert_close(outputs["pred_boxes"].float(), expected["pred_boxes"], rtol=0, atol=tolerance)
    assert_close(outputs["pred_logits"].float().sigmoid(), expected["pred_logits"].sigmoid(), rtol=0, atol=tolerance)
    # Normalised images are cast to the model's dtype too.
    normalized = F.normalize(samples / 255, IMAGENET_MEAN, IMAGENET_STD)
    assert_close(made.model(normalized)["pred_boxes"].float(), expected["pred_boxes"], rtol=0, atol=2 * tolerance)
    found = made(pixels)
    assert found.scores.dtype == found.boxes.dtype == torch.float32
    assert found.scores.isfinite().all() and found.boxes.isfinite().all() and len(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.double])
def test_positions_keep_their_precision_in_any_dtype(dtype):
    # bf16 has 128 values between 0.5 and 1: anchor points and cells of a large image would coincide.
    transformer = small(("anchor", "enact"), "--spatial_prior", "grid", "--num_query_position", "900")[0].transformer
    points = transformer.anchor_points()
    assert torch.equal(transformer.to(dtype).anchor_points(), points) and points.dtype == torch.float32
    encodings = load_variant("anchor").models.transformer
    places = torch.linspace(0, 1, 9).to(dtype)
    exact = encodings.encode_coordinates(places.double(), 32)
    assert_close(encodings.encode_coordinates(places, 32).double(), exact, rtol=0, atol=1e-4)
    exact = encode_points(places.double().unsqueeze(-1).expand(-1, 2), 32)
    assert_close(encode_points(places.unsqueeze(-1).expand(-1, 2), 32).double(), exact, rtol=0, atol=1e-4)


def test_a_convolution_trains_after_its_frozen_norm_was_folded_in_inference_mode():
    norm, conv = FrozenNorm(4), torch.nn.Conv2d(3, 4, 1, bias=False)
    norm.running_var.fill_(2.0)  # the next call recomputes the constants
    with torch.inference_mode():
        norm.fold_into(conv.weight)
    norm.fold_into(conv.weight)[0].sum().backward()
    assert conv.weight.grad is not None
