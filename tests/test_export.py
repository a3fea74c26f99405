"""Exported detectors for other runtimes: outputs, metadata and refusals."""

import argparse
import functools
import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ALL_STAGES, SMALL_MODEL, build, parse
from torch import nn

from enact_common import UserError, load_detector
from enact_common.attention.clustering import clusterings
from enact_common.attention.clusters import Windows
from enact_common.attention.layer import EnactSelfAttention
from enact_common.attention.rivals import RIVALS
from enact_common.benchmark import agreement, runtimes
from enact_common.benchmark.__main__ import main as benchmark
from enact_common.benchmark.isolated import attempt
from enact_common.boxes import box_cxcywh_to_xyxy
from enact_common.data.annotations import find_split
from enact_common.data.coco import CocoDetection
from enact_common.export import __main__ as command
from enact_common.export import formats, load_exported
from enact_common.export.formats import EXPORTING, FORMATS
from enact_common.export.graph import calibrated_lengths, fix_window_lengths
from enact_common.inference.detector import LoadedDetector, as_pixels
from enact_common.nested_tensor import NestedTensor
from enact_common.utils.device import TORCH_VERSION

exporting = pytest.mark.skipif(TORCH_VERSION < EXPORTING, reason="this PyTorch's torch.export is too old")

# One layer each, because the export time grows with the number of layers.
ONE_LAYER = "--enc_layers 1 --dec_layers 1".split()

# (height, width); no graph is traced with these sizes, and the last is not a multiple of the stride.
SIZES = ((64, 96), (128, 64), (97, 131))


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """A function of (variant, attention, *flags) that returns a checkpoint of random weights, made on first use.

    Checkpoints of plain models hold a namespace, as in the original repositories.
    """
    folder, checkpoints = tmp_path_factory.mktemp("checkpoints"), {}

    def checkpoint(variant: str, attention: str, *flags: str) -> Path:
        key = "-".join((variant, attention, *flags))
        if key not in checkpoints:
            argv = [*SMALL_MODEL[variant], *ONE_LAYER, "--encoder_attention", attention, *flags]
            torch.manual_seed(0)
            model, args = build(variant, *argv)[0], parse(variant, *argv)
            for name, parameter in model.named_parameters():
                # Make scores and boxes vary and depend on the encoder's clusters.
                if "class_embed" in name or "bbox_embed" in name:
                    nn.init.normal_(parameter, std=0.2)
                elif "encoder" in name and ("self_attn" in name or "ENACT" in name):
                    parameter.data.mul_(3)
            state = {"model": model.state_dict(), "args": args}
            if attention != "mhsa":
                state |= {"args": vars(args), "variant": variant}
            checkpoints[key] = folder / f"{key}.pth"
            torch.save(state, checkpoints[key])
        return checkpoints[key]

    return checkpoint


def export(checkpoint: Path, output: Path, *flags: str) -> int:
    """Run the export command in the format of the output's suffix; the exit status."""
    form = next(name for name, form in FORMATS.items() if form.suffix == output.suffix)
    return command.main([str(checkpoint), "--format", form, "--output", str(output), *map(str, flags)])


def padded_batch(batch: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Different images uint8 (batch, 3, height, width) and their padding mask; every second image has padding."""
    height, width = size
    images = command.blurred_noise(batch, size)
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    mask[1::2, height - 20 :], mask[1::2, :, width - 30 :] = True, True
    return images, mask


@functools.lru_cache(maxsize=1)
def loaded(checkpoint: Path) -> LoadedDetector:
    """Load a checkpoint's detector, cached."""
    return load_detector(checkpoint, "cpu")


def model_outputs(checkpoint: Path, images, mask, lengths=None) -> dict[str, torch.Tensor]:
    """The outputs of the PyTorch model."""
    detector = loaded(checkpoint)
    fix_window_lengths(detector.model, lengths)
    with torch.no_grad():
        return detector.model(NestedTensor(images, mask))


def inferred_dims(onnx, path: Path) -> list[bool]:
    """For every dimension of every value in an ONNX file, whether it is a fixed number."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    dims = [dim for value in model.graph.value_info for dim in value.type.tensor_type.shape.dim]
    assert len(dims) > 50
    return [dim.HasField("dim_value") for dim in dims]


# ------------------------------------------------------------------------------------------------------- outputs


def assert_matches(exported: formats.ExportedDetector, checkpoint: Path, tolerance: float) -> None:
    """Compare an exported detector's raw outputs with the model's, for several sizes and batches with padding."""
    for size in SIZES:
        for batch in (1, 3):
            images, mask = padded_batch(batch, size)
            expected = model_outputs(checkpoint, images, mask)
            outputs = exported(images, mask)
            assert list(outputs) == list(exported.metadata["outputs"])
            for name, value in outputs.items():
                torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)


# Exports are slow, so each one covers another model: DETR's masks become an ONNX file below, and the benchmark of
# agreement makes one of Anchor DETR with ENACT.
@exporting
@pytest.mark.slow
def test_an_exported_program_matches_the_model(checkpoint_of, tmp_path):
    checkpoint = checkpoint_of("conditional", "enact")
    assert export(checkpoint, tmp_path / "model.pt2", "--dynamic", "--mask", "--raw") == 0
    exported = load_exported(tmp_path / "model.pt2")
    assert list(exported.metadata["outputs"]) == ["pred_logits", "pred_boxes"]
    assert exported.metadata["clusters"] == "follow from the image" and not exported.metadata["quantized"]
    assert_matches(exported, checkpoint, 1e-5)


def test_torchscript_matches_the_model(variant_and_attention, checkpoint_of, tmp_path):
    checkpoint = checkpoint_of(*variant_and_attention)
    assert export(checkpoint, tmp_path / "model.pt", "--dynamic", "--mask", "--raw") == 0
    assert_matches(load_exported(tmp_path / "model.pt"), checkpoint, 1e-5)


@pytest.mark.parametrize(
    "suffix, attention, queries",
    [
        (".pt", "enact", "20"),  # more than one chunk of the mask head
        pytest.param(".onnx", "mhsa", "8", marks=[exporting, pytest.mark.slow]),
    ],
)
def test_exported_masks_match_the_model(suffix, attention, queries, checkpoint_of, tmp_path, capsys):
    checkpoint = checkpoint_of("detr", attention, *ALL_STAGES, "--masks", "--num_queries", queries)
    assert export(checkpoint, tmp_path / f"model{suffix}", "--dynamic", "--mask", "--raw") == 0
    assert "logits, boxes and masks" in capsys.readouterr().out
    if suffix == ".onnx":
        onnx = pytest.importorskip("onnx")
        onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)
    exported = load_exported(tmp_path / f"model{suffix}")
    assert list(exported.metadata["outputs"]) == ["pred_logits", "pred_boxes", "pred_masks"]
    assert exported(*padded_batch(1, SIZES[0]))["pred_masks"].std() > 0.1
    assert_matches(exported, checkpoint, 1e-4)


def test_exported_masks_match_the_detector(checkpoint_of, shapes, tmp_path):
    checkpoint = checkpoint_of("detr", "mhsa", *ALL_STAGES, "--masks")
    assert export(checkpoint, tmp_path / "model.pt", "--dynamic") == 0
    exported = load_exported(tmp_path / "model.pt")
    assert exported.metadata["things"] is None
    detector = load_detector(checkpoint, "cpu", threshold=0)
    pixels = as_pixels(next((shapes / "val2017").iterdir()))  # 64 x 80, not resized for the model
    logits = exported(detector.model_input(pixels))["masks"]
    detections = detector.detect(pixels)
    masks = nn.functional.interpolate(logits, size=(64, 80), mode="bilinear")[0] > 0
    assert torch.equal(masks[detections.queries], detections.masks) and 0 < detections.masks.float().mean() < 1


def test_decoded_outputs_match_the_detector(variant_and_attention, checkpoint_of, shapes, tmp_path):
    checkpoint = checkpoint_of(*variant_and_attention)
    assert export(checkpoint, tmp_path / "model.pt", "--dynamic") == 0
    exported = load_exported(tmp_path / "model.pt")
    detector = load_detector(checkpoint, "cpu", threshold=0)
    pixels = as_pixels(next((shapes / "val2017").iterdir()))  # 64 x 80
    outputs = exported(detector.model_input(pixels))
    assert list(outputs) == ["scores", "labels", "boxes"] == list(exported.metadata["outputs"])
    boxes = outputs["boxes"][0].clamp(0, 1) * torch.tensor([80, 64, 80, 64])
    known = torch.tensor([i is not None for i in exported.metadata["category_ids"]])[outputs["labels"][0]]
    expected = detector.detect(pixels)
    order = outputs["scores"][0].argsort(descending=True, stable=True)
    order = order[known[order]]
    assert len(expected) > 5
    torch.testing.assert_close(outputs["scores"][0][order], expected.scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(boxes[order], expected.boxes, rtol=1e-4, atol=1e-3)
    names = [exported.metadata["names"][label] for label in outputs["labels"][0][order]]
    assert names == expected.names


@pytest.mark.parametrize(
    "checkpoint, name", [("runs/best.pth", "best"), ("blood_cells", "blood_cells"), (".", "folder"), ("a/b", "b")]
)
def test_the_output_is_named_after_the_checkpoint(checkpoint, name, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    assert command.own_name(checkpoint) == name


@exporting
def test_a_file_with_fixed_size_and_windows(checkpoint_of, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    checkpoint = checkpoint_of("conditional", "enact")
    assert command.main([str(checkpoint), "--size", "64", "96", "--batch", "2", "--clusters", "3"]) == 0
    assert all(inferred_dims(onnx, Path(f"{checkpoint.stem}.onnx")))
    exported = load_exported(checkpoint.with_suffix(".onnx").name)
    assert (exported.metadata["batch"], exported.metadata["size"], exported.metadata["sides"]) == (2, [64, 96], None)
    assert exported.metadata["window_lengths"] == [3]
    assert exported.metadata["clusters"] == "windows of fixed length"
    images, mask = padded_batch(2, (64, 96))
    expected = model_outputs(checkpoint, images, torch.zeros_like(mask), [3])
    outputs = exported(images)
    scores = expected["pred_logits"].sigmoid().flatten(1).sort(descending=True).values[:, :100]
    torch.testing.assert_close(outputs["scores"], scores, rtol=1e-4, atol=1e-4)
    best = expected["pred_logits"].amax(-1).argmax(-1)
    boxes = box_cxcywh_to_xyxy(expected["pred_boxes"])[torch.arange(2), best]
    torch.testing.assert_close(outputs["boxes"][:, 0], boxes, rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match="(?i)dimension"):
        exported(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))


# ----------------------------------------------------------------------------------------------- ENACT's clusters


class Attention(nn.Module):
    """ENACT's layer as a function of tokens (batch, N, d) and their padding mask."""

    def __init__(self, settings: dict):
        super().__init__()
        self.layer = EnactSelfAttention(16, 4, batch_first=True, **settings)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x, x, key_padding_mask=mask)[0]


class Attentions(nn.ModuleList):
    """Several layers with the same input, as one function."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x, mask) for layer in self)


def tokens(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens similar to their neighbours, as in a feature map, and a padding mask that grows from image to image."""
    mask = torch.arange(length) >= length - 3 * torch.arange(batch).unsqueeze(1) - 2
    return torch.randn(batch, length, 16).cumsum(dim=1) / 3, mask


SETTINGS = [
    {},
    {"max_clusters": 5, "temperature": 0.1},
    {"per_image": True},
    {"mask_padding": True},
    {"per_image": True, "mask_padding": True, "max_clusters": 4, "temperature": 0.5},
    {"clusters": "regions"},
    {"clusters": "regions", "mask_padding": True, "max_clusters": 3},
    {"clusters": "equal", "max_clusters": 5},
    {"clusters": "equal"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings) or "default")
def test_clusters_depend_on_the_data_in_a_traced_graph(settings):
    layer = Attention(settings).eval()
    with torch.no_grad():
        graph = torch.jit.trace(layer, tokens(2, 60), check_trace=False)
        for batch, length in ((2, 60), (1, 33), (3, 77), (4, 14)):
            x, mask = tokens(batch, length)
            torch.testing.assert_close(graph(x, mask), layer(x, mask), rtol=1e-5, atol=1e-6)


@exporting
def test_clusters_depend_on_the_data_in_onnx(tmp_path):
    """Windows of each image, regions, and clusters of equal information, as outputs of one graph."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layers = Attentions(Attention(SETTINGS[i]) for i in (4, 6, 7)).eval()
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=4, max=9999)}
    program = torch.export.export(
        layers, tokens(2, 60), dynamic_shapes=(sizes, sizes), prefer_deferred_runtime_asserts_over_guards=True
    )
    torch.onnx.export(program, f=tmp_path / "layer.onnx", input_names=["x", "mask"], dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
    for batch, length in ((2, 60), (1, 33), (3, 77)):
        x, mask = tokens(batch, length)
        outputs = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(tuple(map(torch.from_numpy, outputs)), layers(x, mask), rtol=1e-5, atol=1e-5)


def test_fixed_windows_match_the_model_with_that_window_length(checkpoint_of, tmp_path, capsys):
    checkpoint = checkpoint_of("anchor", "enact")
    images, mask = padded_batch(2, (160, 224))
    none = torch.zeros_like(mask)
    assert export(checkpoint, tmp_path / "model.pt", "--dynamic", "--raw", "--clusters", 3) == 0
    assert "tokens by encoder layer: 3" in capsys.readouterr().out
    outputs = load_exported(tmp_path / "model.pt")(images)
    expected = model_outputs(checkpoint, images, none, [3])
    data_dependent = model_outputs(checkpoint, images, none)
    assert not torch.allclose(data_dependent["pred_logits"], expected["pred_logits"], atol=1e-3)
    for name, value in outputs.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def test_fixed_windows_longer_than_the_feature_map_become_one_window(checkpoint_of, tmp_path):
    checkpoint = checkpoint_of("detr", "enact")
    assert export(checkpoint, tmp_path / "model.pt", "--dynamic", "--raw", "--clusters", 99) == 0
    images, mask = padded_batch(1, (64, 64))  # 8 x 8 cells
    outputs = load_exported(tmp_path / "model.pt")(images)
    expected = model_outputs(checkpoint, images, mask, [64])
    torch.testing.assert_close(outputs["pred_logits"], expected["pred_logits"], rtol=1e-5, atol=1e-5)


def test_fixed_windows_can_be_calibrated_on_images(checkpoint_of, shapes, tmp_path):
    checkpoint = checkpoint_of("conditional", "enact", "--enc_layers", "2")
    images = sorted((shapes / "val2017").iterdir())
    detector = load_detector(checkpoint, "cpu")
    lengths = [[], []]
    for i, layer in enumerate(clusterings(detector.model)):
        layer.register_cluster_hook(lambda _, clusters, i=i: lengths[i].append(clusters.weights.shape[-1]))
    for image in images:
        detector(image)
    medians = [sorted(of_layer)[(len(of_layer) - 1) // 2] for of_layer in lengths]
    assert export(checkpoint, tmp_path / "model.pt", "--clusters", shapes / "val2017") == 0
    assert load_exported(tmp_path / "model.pt").metadata["window_lengths"] == medians
    one = calibrated_lengths(detector.model, [detector.model_input(as_pixels(images[0]))])
    assert one == [of_layer[0] for of_layer in lengths]
    assert all(len(layer._cluster_hooks) == 1 for layer in clusterings(detector.model))


def test_calibrated_length_of_regions_is_their_mean(checkpoint_of, shapes):
    detector = load_detector(checkpoint_of("detr", "enact"), "cpu", enact_clusters="regions")
    (layer,) = clusterings(detector.model)
    counts = []
    layer.register_cluster_hook(lambda _, clusters: counts.append(clusters.shape[1]))
    image = detector.model_input(as_pixels(next((shapes / "val2017").iterdir())))
    detector.model(image)
    assert not isinstance(layer.cluster(torch.randn(1, 9, 32)), Windows)
    cells = 8 * 10  # for 64 x 80 pixels
    assert calibrated_lengths(detector.model, [image]) == [round(cells / counts[0])]


# -------------------------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize("attention, clusters", [("mhsa", None), ("enact", "follow from the image")])
def test_metadata_describes_the_file(attention, clusters, checkpoint_of, tmp_path):
    checkpoint = checkpoint_of("detr", attention)
    assert export(checkpoint, tmp_path / "model.pt", "--size", 64, 64, "--mask") == 0
    metadata = load_exported(tmp_path / "model.pt").metadata
    assert json.loads(json.dumps(metadata)) == metadata
    assert "uint8" in metadata["inputs"]["images"] and "normalises" in metadata["inputs"]["images"]
    assert list(metadata["inputs"]) == ["images", "mask"]
    assert list(metadata["outputs"]) == ["scores", "labels", "boxes"]
    assert (metadata["variant"], metadata["encoder_attention"], metadata["clusters"]) == ("detr", attention, clusters)
    assert (metadata["batch"], metadata["size"], metadata["quantized"]) == (1, [64, 64], False)
    assert metadata["evaluation"] == {"shorter_side": 64, "longer_side_at_most": 96}
    assert metadata["names"][1] == "person" and metadata["category_ids"][:2] == [None, 1]
    assert metadata["checkpoint"] == str(checkpoint)


def test_clustering_settings_can_be_changed_and_are_in_the_metadata(checkpoint_of, tmp_path):
    checkpoint = checkpoint_of("conditional", "enact", "--enact_per_image")
    flags = ["--dynamic", "--raw", "--no-enact_per_image", "--enact_max_clusters", 4, "--enact_temperature", 0.5]
    assert export(checkpoint, tmp_path / "model.pt", *flags) == 0
    exported = load_exported(tmp_path / "model.pt")
    assert exported.metadata["settings"] == {
        "enact_per_image": False, "enact_max_clusters": 4, "enact_temperature": 0.5
    }  # fmt: skip
    assert exported.metadata["sides"] == [64, 4096] and exported.metadata["batch"] is None
    assert "sigmoid" in exported.metadata["outputs"]["pred_logits"]


# -------------------------------------------------------------------------------------------------------- int8


def test_int8_products_cannot_saturate(tmp_path):
    """The sum of two products of the largest activations and weights exceeds 16 bits."""
    onnx = pytest.importorskip("onnx")
    weight = torch.full((64, 3), 0.5)
    weight[:, 1] *= -1
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", kind, [2, 64])],
        [helper.make_tensor_value_info("y", kind, [2, 3])],
        [onnx.numpy_helper.from_array(weight.numpy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    formats.save_onnx(onnx, model, {"outputs": {"y": ""}}, tmp_path / "whole.onnx")
    formats.quantize(tmp_path / "whole.onnx", tmp_path / "int8.onnx")
    x = torch.full((2, 64), 3.0)
    x[1, ::2] = -1
    product = load_exported(tmp_path / "int8.onnx")(x)["y"]
    torch.testing.assert_close(product, x @ weight, rtol=0.01, atol=0.3)
    # CPUs with VNNI never saturate; CPUs without it need unsigned weights.
    kinds = {item.data_type for item in onnx.load(tmp_path / "int8.onnx").graph.initializer if len(item.dims) == 2}
    assert kinds == {onnx.TensorProto.UINT8}


@exporting
def test_int8_makes_smaller_files_that_nearly_agree(checkpoint_of, tmp_path, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx")
    monkeypatch.setattr(command, "INT8_TOLERANCE", 1e-9)
    checkpoint = checkpoint_of("detr", "mhsa", "--dim_feedforward", "4096")
    assert export(checkpoint, tmp_path / "int8.onnx", "--size", 96, 128, "--raw", "--quantize") == 0
    printed = capsys.readouterr()
    (loss,) = re.findall(r"up to (\S+) on this machine", printed.err)
    assert 0 < float(loss) < 0.5 and f"{float(loss):.1e}" in printed.out and "without --quantize" in printed.err
    int8 = load_exported(tmp_path / "int8.onnx")
    assert int8.metadata["quantized"]
    operations = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert "MatMulInteger" in operations and "ConvInteger" not in operations
    assert (tmp_path / "int8.onnx").stat().st_size < checkpoint.stat().st_size - 2**20
    images, mask = padded_batch(1, (96, 128))
    expected, outputs = model_outputs(checkpoint, images, mask), int8(images)
    assert 1e-5 < (outputs["pred_boxes"] - expected["pred_boxes"]).abs().max() < 0.05


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "attention, settings, flags, message",
    [
        ("mhsa", "", "--clusters 4", "--clusters: this is a plain model"),
        ("enact", "--enact_clusters regions", "--clusters 4", "pass --enact_clusters windows"),
        ("enact", "--enact_order hilbert", "", "--enact_order hilbert: exported files only cluster row by row"),
        ("enact", "--enact_mask_padding", "--clusters 4 --mask", "--clusters with --mask"),
        ("enact", "", "--clusters /nowhere/at/all", "--clusters /nowhere/at/all: neither a number"),
        ("enact", "", "--clusters 0", "--clusters 0: neither a number of at least 1"),
        ("enact", "", "--clusters {folder}", "no image in this folder"),
        ("enact", "", "--size 32 64", "--size 32 64: each side must be from 64 to 4096 pixels"),
        ("enact", "", "--dynamic --size 64 64", "leave out --dynamic, or --size and --batch"),
        ("enact", "", "--dynamic --batch 2", "leave out --dynamic, or --size and --batch"),
        ("enact", "", "--quantize", "--quantize does not work with --format torchscript"),
        ("enact", "", "--output {folder}/model.onnx", "the name must end with .pt for --format torchscript"),
        ("enact", "", "--output {folder}", "there is a folder of this name"),
        ("enact", "--position_embedding learned", "--size 64 416", "from 64 to 400 pixels for this model"),
    ],
)  # fmt: skip
def test_bad_export_flags_are_refused(attention, settings, flags, message, checkpoint_of, tmp_path, capsys):
    checkpoint = checkpoint_of("detr", attention, *settings.split())
    flags = flags.format(folder=tmp_path).split()
    output = [] if "--output" in flags else ["--output", str(tmp_path / "model.pt")]
    assert command.main([str(checkpoint), "--format", "torchscript", *output, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, suffix",
    [
        *((name, ".pt") for name, rival in RIVALS.items() if not rival.export_fault),
        pytest.param("act", ".pt2", marks=[exporting, pytest.mark.slow]),
    ],
)
def test_rivals_are_exported_at_one_size(name, suffix, checkpoint_of, tmp_path, capsys):
    checkpoint = checkpoint_of("detr", name)
    assert export(checkpoint, tmp_path / f"model{suffix}", "--size", 64, 96, "--token_budget", 5) == 0
    settings = load_exported(tmp_path / f"model{suffix}").metadata["settings"]
    assert settings == ({"token_budget": 5} if RIVALS[name].takes_budget else {})
    if RIVALS[name].takes_budget:
        assert export(checkpoint, tmp_path / "any.pt", "--dynamic") == 2
        assert f"--encoder_attention {name} " in capsys.readouterr().err


def test_a_rival_that_cannot_be_exported_is_refused(checkpoint_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RIVALS["avgpool"], "export_fault", "it sorts by magic")
    assert export(checkpoint_of("detr", "avgpool"), tmp_path / "model.pt") == 2
    assert "--encoder_attention avgpool cannot be exported: it sorts by magic; run" in capsys.readouterr().err
    argv = ["runtimes", "--attentions", "avgpool", "--runtimes", "torchscript", "--output_dir", str(tmp_path / "out")]
    assert benchmark(argv) == 2 and "it sorts by magic" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_extra(module, checkpoint_of, tmp_path, monkeypatch, capsys):
    real = importlib.import_module

    def without(name: str):
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name) if name == "torch" else argparse.Namespace()

    path = checkpoint_of("detr", "enact")
    monkeypatch.setattr(importlib, "import_module", without)
    assert export(path, tmp_path / "model.onnx") == 2
    error = capsys.readouterr().err
    assert f"package {module}" in error and "pip install 'enact-detection[export]'" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["onnx", "exported_program"])
def test_an_older_pytorch_gets_the_format_that_works(form, checkpoint_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "TORCH_VERSION", (2, 4))
    monkeypatch.setattr(formats, "needed", lambda *_: None)
    monkeypatch.setattr(command, "needed", lambda *_: None)
    assert export(checkpoint_of("detr", "enact"), tmp_path / f"model{FORMATS[form].suffix}") == 2
    assert "pass --format torchscript" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("model.txt", b"", "unknown suffix for an exported detector"),
        ("missing.pt", None, "no such file"),
        ("model.pt", b"neither", "cannot be loaded"),
        pytest.param("model.onnx", b"neither", "cannot be loaded", marks=exporting),
        pytest.param("model.pt2", b"neither", "cannot be loaded", marks=exporting),
    ],
)
def test_files_that_are_not_exported_detectors_are_refused(name, content, message, tmp_path):
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_exported(tmp_path / name)


def test_a_file_without_metadata_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "relu.pt")
    with pytest.raises(UserError, match=r"relu\.pt: has no metadata .*python -m enact_common\.export"):
        load_exported(tmp_path / "relu.pt")


def test_a_file_that_differs_from_the_model_is_reported(checkpoint_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "TOLERANCE", -1.0)
    assert export(checkpoint_of("detr", "enact"), tmp_path / "model.pt") == 1
    captured = capsys.readouterr()
    assert "warning: the difference is more than -1" in captured.err and "scores and boxes" in captured.out


def test_detections_are_compared_in_any_order():
    scores, labels = torch.tensor([[0.9, 0.8, 0.7, 0.1]]), torch.tensor([[1, 2, 1, 3]])
    boxes = torch.rand(1, 4, 4)
    expected = {"scores": scores, "labels": labels, "boxes": boxes}
    order = [1, 0, 2, 3]
    permuted = {name: value[:, order] for name, value in expected.items()}
    assert command.difference(expected, permuted) == 0
    assert command.difference(expected, permuted | {"boxes": permuted["boxes"] + 0.02}) == pytest.approx(0.02, abs=1e-6)
    assert command.difference(expected, permuted | {"labels": permuted["labels"] + 1}) == torch.inf
    # The last detection may be another one with an equal score.
    last = torch.tensor([[0, 0, 0, 1]])
    assert command.difference(expected, expected | {"labels": labels + last}) == 0
    assert command.difference(expected, expected | {"scores": scores * torch.nan}) == torch.inf


# ---------------------------------------------------------------------------------------------------------- benchmarks


def run_benchmark(name: str, folder: Path, *argv: str) -> tuple[int, dict]:
    """Run a benchmark; (exit status, parsed JSON)."""
    status = benchmark([name, "--output_dir", str(folder), *map(str, argv)])
    assert {path.name for path in folder.iterdir()} == {f"{name}.{suffix}" for suffix in ("json", "md", "csv")}
    return status, json.loads((folder / f"{name}.json").read_text())


# Plain models have no windows, so onnx_fixed is skipped for them.
@pytest.mark.parametrize(
    "attentions, names, expected",
    [
        (
            "enact mhsa",
            "pytorch torchscript",
            [("enact", "pytorch"), ("enact", "torchscript"), ("mhsa", "pytorch"), ("mhsa", "torchscript")],
        ),
        pytest.param("enact", "onnx_fixed", [("enact", "onnx_fixed")], marks=[exporting, pytest.mark.slow]),
        pytest.param("mhsa", "onnx_fixed onnx_int8", [("mhsa", "onnx_int8")], marks=[exporting, pytest.mark.slow]),
    ],
)
def test_runtimes_are_timed(attentions, names, expected, tmp_path, monkeypatch, capsys):
    if "onnx" in names:
        pytest.importorskip("onnxruntime")
    monkeypatch.setattr(runtimes, "run_isolated", lambda function, *args, limit: attempt(function, *args))
    small = "--backbone resnet18 --backbone_stages 2 --hidden_dim 32 --nheads 4 --dim_feedforward 64".split()
    argv = ["--variants", "detr", "--attentions", *attentions.split(), "--runtimes", *names.split()]
    argv = [*argv, "--size", 96, 128, "--repeat", 2, "--warmup", 0, "--", *small, *ONE_LAYER]
    status, figures = run_benchmark("runtimes", tmp_path / "out", *argv)
    assert status == 0
    assert [(row["attention"], row["runtime"]) for row in figures["rows"]] == expected
    for row in figures["rows"]:
        assert row["status"] == "done" and len(row["runs"]) == 2 and row["seconds"]["least"] > 0
        assert (row["bytes"] is None) == (row["runtime"] == "pytorch")
    assert f"| DETR-C5, R18 | {'ENACT' if 'enact' in attentions else 'plain'} |" in capsys.readouterr().out


@exporting
@pytest.mark.slow
def test_agreement_with_pytorch_is_counted(checkpoint_of, shapes, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    checkpoint = checkpoint_of("anchor", "enact", "--num_classes", "6", "--eval_size", "128", "--max_size", "160")
    state = torch.load(checkpoint, weights_only=True)
    label_map = CocoDetection(*find_split(shapes, "val"), None).label_map
    torch.save(state | {"label_map": label_map.to_dict()}, tmp_path / "labelled.pth")
    write, lengths_of_files = agreement.write, []

    def write_once(detector, interface, lengths, path):
        """Copy the file with free windows for fixed ones: `test_a_file_with_fixed_size_and_windows` exports those."""
        lengths_of_files.append(lengths)
        if lengths is None:
            write(detector, interface, lengths, path)
            shutil.copy(path, tmp_path / "free.onnx")
        else:
            shutil.copy(tmp_path / "free.onnx", path)

    monkeypatch.setattr(agreement, "write", write_once)
    argv = ["--checkpoint", tmp_path / "labelled.pth", "--coco_path", shapes, "--threshold", 0.3, "--limit", 3]
    status, figures = run_benchmark("agreement", tmp_path / "out", *argv)
    assert status == 0 and figures["settings"]["images"] == 3
    rows = {row["runtime"]: row for row in figures["rows"]}
    assert list(rows) == ["PyTorch", *agreement.FILES]
    assert rows["PyTorch"]["kept"] == 1 and rows["PyTorch"]["detections"] > 5
    exact, int8 = rows["ONNX Runtime"], rows["ONNX Runtime, int8"]
    assert exact["kept"] == 1 and exact["new"] == 0 and exact["score_difference"] < 1e-4
    assert int8["score_difference"] > exact["score_difference"]
    lengths = figures["settings"]["window_lengths"]
    assert lengths_of_files == [None, lengths] and len(lengths) == 1 and lengths[0] > 0
    assert f"tokens by encoder layer: {lengths[0]}." in capsys.readouterr().out


def test_each_detection_is_matched_once_by_label():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    expected = {"scores": torch.tensor([0.9, 0.8, 0.7, 0.2]), "labels": torch.tensor([1, 1, 2, 3]), "boxes": boxes}
    detections = {
        "scores": torch.tensor([0.8, 0.6, 0.9]),
        "labels": torch.tensor([1, 1, 2]),
        # The second is shifted by half its width; the third matches.
        "boxes": torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30.5]]),
    }
    comparison = agreement.Comparison(threshold=0.5)
    comparison.add(expected, detections)
    assert comparison.figures() == {
        "detections": 3,
        "kept": pytest.approx(2 / 3),
        "new": pytest.approx(1 / 3),
        "score_difference": pytest.approx((0.1 + 0.2) / 2),
    }
    comparison.add({name: value[:0] for name, value in expected.items()}, detections)
    assert comparison.figures()["new"] == pytest.approx(4 / 6)
    assert agreement.Comparison(0.5).figures()["kept"] is None
