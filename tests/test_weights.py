"""Published weights, Hugging Face's weights both ways, and detectors that are saved and shared with a model card."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, SMALL_MODEL, build, parse, train
from PIL import Image
from torch import Tensor, nn

from enact_common import EnactDetector, UserError, load_detector
from enact_common.__main__ import main as enact
from enact_common.checkpoints.files import load_checkpoint
from enact_common.checkpoints.huggingface import from_hugging_face, to_hugging_face
from enact_common.checkpoints.published import FILES, HUGGING_FACE, Model
from enact_common.cli import program
from enact_common.hub import PUBLISHED
from enact_common.nested_tensor import NestedTensor
from enact_common.variants import load_variant
from enact_common.weights import __main__ as weights

ROOT = Path(__file__).resolve().parents[1]

# Two images: the first fills 96 x 128 pixels, the second 64 x 96.
PIXEL_MASK = torch.zeros(2, 96, 128, dtype=torch.long)
PIXEL_MASK[0] = 1
PIXEL_MASK[1, :64, :96] = 1


@pytest.fixture(autouse=True)
def called_by_nobody(monkeypatch):
    """Reset the command name that an earlier test set."""
    monkeypatch.setattr(program, "called_as", None)


@pytest.fixture(scope="module")
def transformers():
    """Hugging Face's library in offline mode."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    library = pytest.importorskip("transformers")
    if not library.is_torch_available():
        pytest.skip(f"transformers {library.__version__} does not support PyTorch {torch.__version__}")
    library.utils.logging.disable_progress_bar()
    return library


def randomized(model: nn.Module) -> nn.Module:
    """Draw all weights and norm statistics such that outputs differ between queries; in evaluation mode."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.8, 1.2)
            elif "quer" in name and tensor.ndim == 2:
                tensor.normal_()
            elif tensor.ndim >= 2:
                tensor.normal_(std=(tensor[0].numel()) ** -0.5)
            elif tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def hugging_face(transformers, name: str, backbone: str, **settings) -> nn.Module:
    """A small model of Hugging Face's with random weights.

    Args:
        name: "Detr" or "ConditionalDetr"; "ForSegmentation" may follow.
        backbone: "timm" for timm's ResNet-18, "transformers" for two stages of a ResNet-18, "masks" for all four.
    """
    kind, _, task = name.partition("For")
    if backbone == "timm":
        pytest.importorskip("timm")
        resnet = {"use_timm_backbone": True, "backbone": "resnet18", "use_pretrained_backbone": False}
    else:
        stages = 4 if backbone == "masks" else 2
        config = transformers.ResNetConfig(
            embedding_size=64, hidden_sizes=[64, 128, 256, 512][:stages], depths=[2] * stages, layer_type="basic",
            out_features=[f"stage{i + 1}" for i in range(0 if backbone == "masks" else stages - 1, stages)],
        )  # fmt: skip
        resnet = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
        resnet["backbone_config"] = config
    config = getattr(transformers, f"{kind}Config")(
        **resnet, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=5,
        **({"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_labels": 3} | settings),
    )  # fmt: skip
    return randomized(getattr(transformers, f"{kind}For{task or 'ObjectDetection'}")(config))


def assert_equal_outputs(theirs: nn.Module, ours: nn.Module, tolerance: float = 1e-5) -> None:
    """Compare logits, boxes and masks on a batch with padding; the logits must differ between queries and images."""
    pixels = torch.randn(2, 3, 96, 128) * PIXEL_MASK.unsqueeze(1)
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, pixel_mask=PIXEL_MASK)
        actual = ours(NestedTensor(pixels, PIXEL_MASK == 0))
    assert expected.logits.std(dim=(0, 1)).min() > 0.005
    pairs = {"pred_logits": expected.logits, "pred_boxes": expected.pred_boxes}
    if "pred_masks" in actual:
        pairs["pred_masks"] = expected.pred_masks
    for name, tensor in pairs.items():
        torch.testing.assert_close(actual[name], tensor, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------- published files


def docs_row(file) -> str:
    """The row of a published file in docs/method/weights.md."""

    def link(url: str | None, text: str) -> str:
        return f"[{text}]({url})" if url else "-"

    place = "Drive" if "drive.google" in file.url else "Model Zoo" if "github" in file.url else Path(file.url).name
    theirs = file.hugging_face and link(HUGGING_FACE.format(file.hugging_face), f"`{file.hugging_face}`")
    backbone = file.model.backbone.replace("resnet", "R")
    command = weights.evaluation("FILE", weights.published_arguments(file.model), file.model.variant)
    command = command.replace(" --coco_path DIR", "")
    return (
        f"| `{file.name}` | {file.model.authors_title} | {backbone} | {file.epochs or '-'} | {file.ap} | "
        f"{link(file.url, place)} | {link(file.log, 'log')} | {theirs or '-'} | `{command}` |"
    )


def test_the_page_has_the_row_of_every_published_file():
    page = (ROOT / "docs" / "method" / "weights.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| `\w*detr_", line)]
    assert rows == [docs_row(file) for file in FILES] and len(FILES) == 18


def test_the_list_gives_each_file_with_a_command_that_builds_its_model(capsys):
    assert enact(["weights"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    for file, block in zip(FILES, blocks, strict=False):
        assert block.startswith(f"{file.name}: ") and file.url in block and file.ap in block
        words = shlex.split(block.split("evaluate")[1])
        assert words[:2] == ["enact", "eval"]
        args = load_variant(words[2]).main.get_args_parser().parse_args(words[3:])
        assert Model.of(args, words[2]) == file.model
    assert sum(name in block for name in PUBLISHED for block in blocks) >= len(PUBLISHED) == 7


def recorded_shapes(name: str, model: str) -> dict[str, list[int]]:
    """The shapes of a reference implementation's parameters by name."""
    return json.loads(str(np.load(GOLDEN / f"{name}.npz")[f"{model}/params"]))


def recorded(name: str, model: str, path: Path, **more) -> Path:
    """Write a checkpoint with the recorded names and shapes of a reference implementation; all values are equal."""
    shapes = recorded_shapes(name, model)
    torch.save({"model": {key: torch.full((1,), 0.5).expand(shape) for key, shape in shapes.items()}, **more}, path)
    return path


def report(source: Path, capsys) -> str:
    """The output of `enact weights --check`."""
    assert enact(["weights", "--check", str(source)]) == 0
    return capsys.readouterr().out


def test_a_file_with_the_tensors_of_published_ones_is_recognized(tmp_path, capsys, monkeypatch):
    path = recorded("detr_mhsa", "table_r50", tmp_path / "detr file.pth")
    text = report(path, capsys)
    assert (
        "DETR, plain, on a ResNet-50\n" in text
        and "91 labels, 11 unused: person, bicycle, car, motorcycle, ..." in text
    )
    assert "fit the published detr_resnet50 (AP 42.0) or detr_resnet50_dc5 (AP 43.3)" in text
    command = f"enact eval detr --coco_path DIR --resume '{path}' --encoder_attention mhsa"
    assert f"evaluate    {command}\n" in text and f"evaluate    {command} --dilation\n" in text
    assert "loads here  yes" in text and "do not show whether the backbone is dilated" in text
    monkeypatch.setattr(weights, "sha256", lambda path: "f0fb7ef5" + "0" * 56)
    text = report(path, capsys)
    assert "the published detr_resnet50_dc5, by its SHA-256" in text and text.count("evaluate") == 1
    assert f"evaluate    {command} --dilation\n" in text


def test_enacts_files_and_arguments_are_recognized(tmp_path, capsys):
    text = report(
        recorded("detr_enact", "table_r50", tmp_path / "enact.pth", args={"dilation": False, "nheads": 8}), capsys
    )
    assert "fit the published detr_resnet50_enact (AP 39.0), or a training of the same model" in text
    assert text.count("evaluate") == 1 and text.rstrip().endswith("/enact.pth")


def test_other_checkpoints_are_described(transformers, tmp_path, capsys):
    model, _, _ = build("anchor", *SMALL_MODEL["anchor"])
    args = vars(parse("anchor", *SMALL_MODEL["anchor"]))
    names = {"category_ids": list(range(91)), "names": [f"thing {i}" for i in range(91)]}
    state = {"model": model.state_dict(), "args": args, "variant": "anchor", "label_map": names, "epoch": 3}
    torch.save(state, tmp_path / "own.pth")
    text = report(tmp_path / "own.pth", capsys)
    assert "origin      a training of this project, after epoch 3" in text and "--hidden_dim 32" in text
    hugging_face(transformers, "ConditionalDetr", "transformers").save_pretrained(tmp_path / "theirs")
    text = report(tmp_path / "theirs", capsys)
    assert "Conditional DETR, plain, on a ResNet-18" in text and "not a published file" in text
    del state["model"]["transformer.pattern.weight"]
    torch.save(state, tmp_path / "broken.pth")
    assert enact(["weights", "--check", str(tmp_path / "broken.pth")]) == 1
    assert "loads here  no: " in (text := capsys.readouterr().out) and "transformer.pattern.weight is missing" in text


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.mkdir(), "an empty folder; pass a checkpoint"),
        (lambda path: torch.save({"model.0.conv.weight": torch.ones(1)}, path), "a YOLO checkpoint"),
        (lambda path: path.write_text("no"), "a text file"),
        (lambda path: None, "no such file"),
    ],
)
def test_what_is_no_checkpoint_is_refused(make, message, tmp_path, capsys):
    make(tmp_path / "x")
    assert enact(["weights", "--check", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- from Hugging Face


@pytest.mark.parametrize("backbone", ["transformers", "timm"])
@pytest.mark.parametrize("name", ["Detr", "ConditionalDetr"])
def test_hugging_faces_models_give_the_same_outputs_here(transformers, name, backbone, tmp_path):
    theirs = hugging_face(
        transformers, name, backbone, id2label={0: "cat", 1: "N/A", 2: "dog"}, label2id={"cat": 0, "dog": 2}
    )
    theirs.save_pretrained(tmp_path / "folder")
    # The names of the modules in memory, which differ from those in files since transformers 5.
    torch.save(theirs.state_dict(), tmp_path / "memory.pth")
    for source in (tmp_path / "folder", tmp_path / "folder" / "model.safetensors"):
        detector = load_detector(source, "cpu")
        assert_equal_outputs(theirs, detector.model)
        assert detector.label_map.category_ids == (0, None, 2) and detector.label_map.names == ("cat", "N/A", "dog")
    detector = load_detector(tmp_path / "memory.pth", "cpu", nheads=4)
    assert_equal_outputs(theirs, detector.model)


@pytest.mark.parametrize("in_memory", [False, True])
def test_hugging_faces_masks_are_the_same_here(transformers, in_memory, tmp_path):
    # Our mask head has eight groups in a norm if the channels allow it, like theirs.
    sizes = {"d_model": 128, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
    theirs = hugging_face(transformers, "DetrForSegmentation", "masks", **sizes)
    if in_memory:
        torch.save(theirs.state_dict(), tmp_path / "file")
    else:
        theirs.save_pretrained(tmp_path / "file")
    detector = load_detector(tmp_path / "file", "cpu")
    assert detector.args.masks
    assert_equal_outputs(theirs, detector.model, tolerance=1e-4)


def test_learned_positions_are_converted(transformers, tmp_path):
    theirs = hugging_face(transformers, "Detr", "transformers", position_embedding_type="learned")
    torch.save(theirs.state_dict(), tmp_path / "memory.pth")
    detector = load_detector(tmp_path / "memory.pth", "cpu", nheads=4)
    assert detector.args.position_embedding == "learned"
    assert_equal_outputs(theirs, detector.model)


@pytest.mark.parametrize("variant, name", [("detr", "Detr"), ("conditional", "ConditionalDetr")])
@pytest.mark.parametrize("layout", ["transformers", "timm"])
def test_full_size_names_and_shapes_match_both_ways(transformers, variant, name, layout):
    backbone = "resnet50" if variant == "detr" else "resnet101"
    shapes = recorded_shapes(f"{variant}_mhsa", backbone.replace("resnet", "table_r"))
    own = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    if layout == "timm":
        pytest.importorskip("timm")
        resnet = {"backbone": backbone, "use_timm_backbone": True}
    else:
        depths = [3, 4, 6 if variant == "detr" else 23, 3]
        resnet = {"use_timm_backbone": False, "backbone": None}
        resnet["backbone_config"] = transformers.ResNetConfig(depths=depths, out_features=["stage4"])
    config = getattr(transformers, f"{name}Config")(**resnet, use_pretrained_backbone=False, num_labels=91)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{name}ForObjectDetection")(config).state_dict()
    converted = from_hugging_face(theirs, "x")
    assert {key: list(tensor.shape) for key, tensor in converted.items()} == shapes
    back = from_hugging_face(to_hugging_face(own, variant, layout == "timm"), "x")
    assert {key: list(tensor.shape) for key, tensor in back.items()} == shapes


def test_cocos_classes_keep_coco_s_label_map(transformers, tmp_path):
    theirs = hugging_face(transformers, "Detr", "transformers", num_labels=91)
    theirs.save_pretrained(tmp_path)
    label_map = load_detector(tmp_path, "cpu").label_map
    assert label_map.names[1] == "person" and label_map.category_ids[12] is None
    # Some of Hugging Face's files name the ids that COCO does not use.
    config = json.loads((tmp_path / "config.json").read_text())
    names = [name if name != "N/A" else f"unused {i}" for i, name in enumerate(label_map.names)]
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": dict(enumerate(names))}))
    assert load_detector(tmp_path, "cpu").label_map == label_map


def test_hugging_faces_folders_train_and_evaluate(transformers, shapes, tmp_path, capsys):
    theirs = hugging_face(transformers, "Detr", "transformers")
    theirs.save_pretrained(tmp_path / "theirs")
    processor = {"size": {"shortest_edge": 72, "longest_edge": 100}, "image_mean": [0.5] * 3}
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(processor))
    flags = ["--dim_feedforward", "48", "--num_queries", "5", "--encoder_attention"]
    short = ["--epochs", "1", "--limit_train", "4", "--limit_val", "2"]
    assert train("detr", shapes, tmp_path / "out", "--pretrained", tmp_path / "theirs", *flags, "enact", *short) == 0
    text = capsys.readouterr().out
    assert "converted to ENACT: 1 attention layer" in text and "skipped, other classes: class_embed" in text
    assert "image_mean is [0.5, 0.5, 0.5]; our models normalise with" in text
    assert train("detr", shapes, "", "--resume", tmp_path / "theirs", "--eval", *flags, "enact") == 2
    assert "Pass the flags of that run: --encoder_attention mhsa" in capsys.readouterr().err
    assert train("detr", shapes, "", "--resume", tmp_path / "theirs", *flags, "mhsa") == 2
    assert "cannot resume from a checkpoint in this format" in capsys.readouterr().err
    args = load_detector(tmp_path / "theirs", "cpu").args
    assert (args.eval_size, args.max_size) == (72, 100)


def edited(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: edited(folder, model_type="yolos"), "a Hugging Face model of the type 'yolos'; pass one of"),
        (lambda folder: edited(folder, decoder_attention_heads=2), "decoder_attention_heads is 2, but our models of"),
        (lambda folder: edited(folder, encoder_ffn_dim=64, decoder_ffn_dim=32), "decoder_ffn_dim is 32, .* have 64"),
        (lambda folder: edited(folder, activation_function="gelu"), "activation_function is gelu"),
        (lambda folder: edited(folder, id2label=["cat"]), "config.json: id2label is not an object, but"),
        (lambda folder: (folder / "model.safetensors").unlink(), "but no weights .*without Git LFS"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "model.safetensors.index.json"), "are split"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"version https://git-lfs"), "a Git LFS pointer"),
    ],
)  # fmt: skip
def test_unusable_folders_are_refused(spoil, message, tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    model, _, _ = build("detr", *SMALL_MODEL["detr"], "--encoder_attention", "mhsa")
    theirs = to_hugging_face(model.state_dict(), "detr", timm_backbone=True)
    save({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "model.safetensors")
    config = {"model_type": "detr", "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_detector(tmp_path, "cpu").variant == "detr"
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        load_detector(tmp_path, "cpu")


def test_tensors_without_counterpart_are_named(tmp_path):
    model, _, _ = build("detr", *SMALL_MODEL["detr"], "--encoder_attention", "mhsa")
    theirs = to_hugging_face(model.state_dict(), "detr", timm_backbone=True)
    torch.save(theirs | {"model.encoder.layernorm.weight": torch.ones(3)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth: 1 tensors .* no counterpart, model.encoder.layernorm.weight first"):
        load_checkpoint(str(tmp_path / "x.pth"))


# --------------------------------------------------------------------------------------------------- to Hugging Face


def checkpoint_of(path: Path, variant: str, *flags: str, **more) -> Path:
    """Write a checkpoint of a small model with random weights and three classes."""
    words = [*SMALL_MODEL[variant], "--num_classes", "3", *flags]
    model, _, _ = build(variant, *words)
    label_map = {"category_ids": [1, 2, 3], "names": ["cat", "dog", "owl"]}
    state = {"model": randomized(model).state_dict(), "args": vars(parse(variant, *words)), "variant": variant}
    torch.save({**state, "label_map": label_map, **more}, path)
    return path


def export(path: Path, output: Path, *flags: str) -> int:
    return enact(["export", str(path), "--format", "huggingface", "--output", str(output), *flags])


@pytest.mark.parametrize("variant", ["detr", "conditional"])
def test_an_exported_folder_detects_the_same_in_transformers(transformers, variant, tmp_path, capsys):
    path = checkpoint_of(tmp_path / "ours.pth", variant, "--encoder_attention", "mhsa", "--num_queries", "8")
    assert export(path, tmp_path / "out" / "theirs") == 0
    assert re.search(r"on noise: \d\.\de-0[5-9]", capsys.readouterr().out)
    assert sorted(file.name for file in (tmp_path / "out").rglob("*") if file.is_file()) == [
        "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    detector = load_detector(path, "cpu", threshold=0.0)
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "out" / "theirs").eval()
    assert_equal_outputs(theirs, detector.model)
    # The evaluation's size, so that the two ways to resize do not matter.
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8))
    pipeline = transformers.pipeline("object-detection", model=str(tmp_path / "out" / "theirs"), threshold=0.0)
    found = sorted(pipeline(image), key=lambda box: -box["score"])
    ours = detector(image)
    assert [box["label"] for box in found[:3]] == ours.names[:3]
    np.testing.assert_allclose([box["score"] for box in found], ours.scores[: len(found)], atol=1e-4)
    # Their boxes are whole pixels, and may leave the image.
    box = np.clip(list(found[0]["box"].values()), 0, [80, 64, 80, 64])
    np.testing.assert_allclose(box, ours.boxes[0], atol=1.01)
    back = load_detector(tmp_path / "out" / "theirs", "cpu")
    assert back.label_map == detector.label_map and back.args.eval_size == 64
    assert_same_weights(back.model, detector.model)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """Compare two models' tensors except the batch counters, which frozen norms lack."""

    def tensors(model: nn.Module) -> dict[str, Tensor]:
        return {k: t for k, t in model.state_dict().items() if not k.endswith("num_batches_tracked")}

    torch.testing.assert_close(tensors(one), tensors(other), rtol=0, atol=0)


def test_a_dilated_backbone_is_exported_as_timms(transformers, tmp_path):
    pytest.importorskip("timm")
    flags = "--encoder_attention mhsa --backbone resnet50 --backbone_stages 4 --dilation --backbone_norm frozen"
    path = checkpoint_of(tmp_path / "ours.pth", "detr", *flags.split())
    assert export(path, tmp_path / "theirs") == 0
    assert load_detector(tmp_path / "theirs", "cpu").args.dilation


@pytest.mark.parametrize(
    "variant, flags, message",
    [
        ("detr", "--encoder_attention enact", "--encoder_attention enact. .*EnactDetector.*plug_in"),
        ("detr", "--encoder_attention avgpool", "--encoder_attention avgpool. .*plug_in"),
        ("anchor", "--encoder_attention mhsa", "no model of the variant anchor"),
        ("detr", "--encoder_attention mhsa --pre_norm", "the model has --pre_norm"),
        ("detr", "--encoder_attention mhsa --position_embedding learned", "--position_embedding learned"),
        ("detr", "--encoder_attention mhsa --masks --backbone_stages 4", "the model has --masks"),
    ],
)  # fmt: skip
def test_models_that_transformers_lacks_are_refused(transformers, variant, flags, message, tmp_path, capsys):
    path = checkpoint_of(tmp_path / "ours.pth", variant, *flags.split())
    assert export(path, tmp_path / "theirs") == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "theirs").exists()


def test_flags_of_other_formats_and_full_folders_are_refused(transformers, tmp_path, capsys, monkeypatch):
    path = tmp_path / "nothing.pth"
    assert export(path, tmp_path / "theirs", "--dynamic") == 2
    assert "--dynamic does not work with --format huggingface" in capsys.readouterr().err
    assert export(path, tmp_path / "theirs", "--no-enact_per_image") == 2
    assert "--enact_per_image does not work with --format huggingface" in capsys.readouterr().err
    assert export(path, tmp_path / "theirs") == 2
    assert "nothing.pth: no such file" in capsys.readouterr().err
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    assert export(path, tmp_path / "theirs") == 2
    assert "theirs: already exists" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert export(path, tmp_path / "new") == 2
    assert "pip install 'enact-detection[huggingface]'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- saving and sharing

SETTINGS = ["--enact_clusters", "equal", "--enact_max_clusters", "12", "--lr", "0.002"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """The folder of a run of three epochs whose second was the best, with its log and latest evaluation."""
    folder = tmp_path_factory.mktemp("run")
    paths = ["--coco_path", "/data/someone/animals"]
    checkpoint_of(folder / "best.pth", "conditional", *SETTINGS, *paths, epoch=1)
    checkpoint_of(folder / "checkpoint.pth", "conditional", *SETTINGS, *paths, epoch=2)
    rows = [{"epoch": i, "test_coco_eval_bbox": [0.1 * (i + 1), 0.5, 0.25, -1.0]} for i in range(2)]
    (folder / "log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = {"AP": 0.125, "AP50": 0.375, "APS": -1.0}
    record = {"set": "val", "epoch": 2, "images": 6, "figures": figures, "recall": [], "classes": []}
    (folder / "evaluation.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("name, metrics", [("best", "0.200 | 0.500 | 0.250"), ("checkpoint", "0.125 | 0.375")])
def test_a_saved_detector_is_the_same_and_has_a_card(run_folder, name, metrics, tmp_path):
    pytest.importorskip("safetensors")
    detector = EnactDetector.from_pretrained(run_folder / f"{name}.pth", "cpu", threshold=0.0)
    detector.save_pretrained(tmp_path / "saved", license="cc-by-4.0")
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    expected = detector(image)
    for again in (
        EnactDetector.from_pretrained(tmp_path / "saved", "cpu", threshold=0.0),
        load_detector(str(tmp_path / "saved"), "cpu", threshold=0.0),
    ):
        assert torch.equal(again(image).boxes, expected.boxes) and again(image).names == expected.names
        assert again.args.enact_clusters == "equal" and again.args.enact_max_clusters == 12
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"| {metrics} |" in card and "someone" not in card + (tmp_path / "saved" / "config.json").read_text()
    assert "Data set: animals." in card and "Classes: cat, dog, owl." in card and "lr 0.002" in card
    assert "--enact_clusters equal --enact_max_clusters 12`." in card and "metrics hold" in card
    assert f"trained for {2 if name == 'best' else 3} epochs" in card and "license: cc-by-4.0" in card
    # Saved again, it says the same: what is known of the training travels along.
    again = EnactDetector.from_pretrained(tmp_path / "saved", "cpu")
    assert again.card("cc-by-4.0") == card
    again.save_pretrained(tmp_path / "saved")
    assert "Weights: unknown" in (tmp_path / "saved" / "README.md").read_text()


def test_a_shrunk_checkpoint_is_small_and_detects_alike(run_folder, tmp_path, capsys):
    source, small = run_folder / "best.pth", tmp_path / "shared" / "small.pth"
    assert weights.main(["--shrink", str(source), "--output", str(small)]) == 0
    assert small.stat().st_size < 0.6 * source.stat().st_size and str(small) in capsys.readouterr().out
    whole, half = (EnactDetector.from_pretrained(path, "cpu", threshold=0.0) for path in (source, small))
    assert half.settings() == whole.settings() and half.model.state_dict().keys() == whole.model.state_dict().keys()
    for name, tensor in half.model.state_dict().items():
        torch.testing.assert_close(tensor, whole.model.state_dict()[name], rtol=1e-3, atol=1e-6)
    for argv, message in (
        (["--shrink", source, "--output", small], "small.pth: already exists"),
        (["--shrink", source, "--output", tmp_path / "small.safetensors"], "ends with .pth"),
        (["--shrink", source], "need each other"),
        (["--shrink", source, "--output", tmp_path / "new.pth", "--check", source], "two tasks"),
    ):
        assert weights.main([str(word) for word in argv]) == 2
        assert message in capsys.readouterr().err


def test_a_card_says_what_is_unknown(tmp_path):
    model, _, _ = build("detr", *SMALL_MODEL["detr"], "--encoder_attention", "mhsa")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    card = EnactDetector.from_pretrained(tmp_path / "weights.pth", "cpu").card()
    assert "unknown number of epochs" in card and "Data set: unknown" in card and "Training: unknown" in card
    assert "metrics hold" not in card
    assert "Unknown: no evaluation of these weights" in card and "license: unknown" in card


def test_a_saved_folder_is_a_checkpoint_for_every_command(tmp_path, capsys):
    pytest.importorskip("safetensors")
    # Anchor DETR's heads share their tensors.
    detector = EnactDetector.from_pretrained(checkpoint_of(tmp_path / "own.pth", "anchor", epoch=0), "cpu")
    detector.save_pretrained(tmp_path / "saved")
    assert "trained for 1 epoch." in (tmp_path / "saved" / "README.md").read_text()
    assert_same_weights(load_detector(tmp_path / "saved", "cpu").model, detector.model)
    assert "a training of this project, after epoch 0" in report(tmp_path / "saved", capsys)
    Image.new("RGB", (80, 64)).save(tmp_path / "photo.png")
    words = ["predict", tmp_path / "photo.png", "--checkpoint", tmp_path / "saved", "--output_dir", tmp_path / "drawn"]
    assert enact([str(word) for word in [*words, "--device", "cpu"]]) == 0
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "detr"}')
    with pytest.raises(UserError, match="saved: holds another model"):
        detector.save_pretrained(tmp_path / "saved")


class Hub:
    """A stand-in for huggingface_hub with one model, `owner/animals`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.uploaded: dict[str, list[str]] = {}

    def HfApi(self, token: str | None) -> "Hub":
        return self

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
        if name != "owner/animals":
            raise OSError("403 Client Error: forbidden")
        return f"https://hub.test/{name}"

    def upload_folder(self, repo_id: str, folder_path: str) -> None:
        self.uploaded[repo_id] = sorted(file.name for file in Path(folder_path).iterdir())

    def snapshot_download(self, name: str, allow_patterns: list[str], **options) -> str:
        if name != "owner/animals":
            raise OSError("404 Client Error: no such repository\nmore")
        return str(self.folder)


def test_detectors_are_uploaded_and_fetched_by_name(run_folder, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    hub = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    detector = EnactDetector.from_pretrained(run_folder / "best.pth", "cpu")
    assert detector.push_to_hub("owner/animals") == "https://hub.test/owner/animals"
    assert hub.uploaded == {"owner/animals": ["README.md", "config.json", "model.safetensors"]}
    with pytest.raises(UserError, match="owner/mine: cannot be uploaded .* .403 Client Error: forbidden.; check"):
        detector.push_to_hub("owner/mine")
    detector.save_pretrained(tmp_path)
    assert_same_weights(EnactDetector.from_pretrained("owner/animals", "cpu").model, detector.model)
    with pytest.raises(UserError, match="owner/other: no such folder here.* fetched .*hub .404 .*repository.; check"):
        EnactDetector.from_pretrained("owner/other", "cpu")


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "./nowhere", "/nowhere", "outputs/best.pth"])
def test_names_that_are_nothing_are_refused(name):
    with pytest.raises(UserError, match=f"^{name}: no such file or folder; pass one, or a name .*OWNER/MODEL"):
        EnactDetector.from_pretrained(name, "cpu")


def test_missing_packages_are_named_with_their_extra(run_folder, tmp_path, monkeypatch):
    detector = EnactDetector.from_pretrained(run_folder / "best.pth", "cpu")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call, extra in (
        (lambda: EnactDetector.from_pretrained("owner/animals", "cpu"), "huggingface"),
        (lambda: detector.push_to_hub("owner/animals"), "huggingface"),
        (lambda: detector.save_pretrained(tmp_path), "safetensors"),
    ):
        with pytest.raises(UserError, match=rf"not installed: pip install 'enact-detection\[{extra}\]'"):
            call()
