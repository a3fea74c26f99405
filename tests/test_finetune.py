"""Fine-tuning: pretrained weights, conversion of plain attention to ENACT, frozen parts, EMA, and own data."""

import json
import logging
import re
import shutil

import pytest
import torch
from conftest import SMALL_MODEL, TOKENS, assert_close, build, parse, read_log, run, train
from torch import nn

from enact_common import UserError, load_detector
from enact_common.attention import clustering
from enact_common.attention.conversion import clustered_weights
from enact_common.attention.rivals import RIVALS
from enact_common.checkpoints.files import load_checkpoint
from enact_common.checkpoints.pretrained import fit_weights, load_pretrained
from enact_common.data.categories import LabelMap, coco_names
from enact_common.hub import ENTRIES
from enact_common.nested_tensor import nested_tensor_from_tensor_list
from enact_common.training import run as training_run
from enact_common.training.averaging import WeightAverage
from enact_common.variants import VARIANTS

# Flags for attention over tokens; only Anchor DETR has a choice.
LABELS = LabelMap((1, 2, 3), ("red", "green", "blue"))


def small(variant, *argv):
    """(small model in eval mode, its arguments)."""
    argv = [*SMALL_MODEL[variant], "--num_classes", "3", *argv]
    return build(variant, *argv)[0].eval(), parse(variant, *argv)


def checkpoint_of(variant, model, args, labels=LABELS):
    """A checkpoint with the keys of this project's checkpoints."""
    return {"model": model.state_dict(), "args": vars(args), "variant": variant, "label_map": labels.to_dict()}


def shuffle_(model):
    """Change every parameter's initial value, biases included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def clusters_of_one_token(monkeypatch):
    """Make every token a cluster."""
    monkeypatch.setattr(clustering, "region_borders", lambda signal: torch.ones_like(signal[:, 1:], dtype=torch.bool))


@pytest.fixture(scope="module")
def plain(shapes, tmp_path_factory):
    """The output folder of a plain DETR that was trained for one epoch."""
    output = tmp_path_factory.mktemp("plain") / "run"
    torch.manual_seed(0)
    assert train("detr", shapes, output, "--epochs", "1", "--encoder_attention", "mhsa") == 0
    return output


@pytest.mark.parametrize(
    "own", [[], ["--enact_mask_padding"], ["--enact_scale_logits"]], ids=["default", "mask_padding", "scale_logits"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plain_model_converts_to_enact(variant, own, clusters_of_one_token, caplog):
    caplog.set_level(logging.INFO, "enact")
    flags = ["--enc_layers", "2", *TOKENS[variant]]
    model, args = small(variant, "--encoder_attention", "mhsa", *flags)
    checkpoint = checkpoint_of(variant, shuffle_(model), args)
    converted, args = small(variant, "--pretrained", "plain.pth", *flags, *own)
    load_pretrained(converted, checkpoint, variant, args, LABELS)
    padding = "--enact_mask_padding" in own
    sizes = [(64, 96), (80, 64)] if padding else [(64, 96), (64, 96)]
    images = nested_tensor_from_tensor_list([torch.randn(3, *size) for size in sizes])
    with torch.no_grad():
        theirs, ours = model(images), converted(images)
    for key in ("pred_logits", "pred_boxes"):
        assert_close(ours[key], theirs[key], 1e-5)
    text = caplog.text
    assert "converted to ENACT: 2 attention layers" in text and "skipped" not in text
    assert "W_prob.weight" in text.split("left as initialised: ")[1]
    assert ("ENACT needs --enact_mask_padding" in text) == (not padding)


EXACT = [name for name, rival in RIVALS.items() if rival.exact_at_full_budget]


@pytest.mark.parametrize("variant, name", [*((v, EXACT[0]) for v in VARIANTS), *(("detr", name) for name in EXACT[1:])])
def test_a_plain_model_converts_to_a_rival(variant, name, caplog):
    caplog.set_level(logging.INFO, "enact")
    model, args = small(variant, "--encoder_attention", "mhsa", *TOKENS[variant])
    checkpoint = checkpoint_of(variant, shuffle_(model), args)
    flags = ["--encoder_attention", name, "--token_budget", "9999", "--pretrained", "plain.pth", *TOKENS[variant]]
    converted, args = small(variant, *flags)
    load_pretrained(converted, checkpoint, variant, args, LABELS)
    images = nested_tensor_from_tensor_list([torch.randn(3, 64, 96), torch.randn(3, 80, 64)])
    with torch.no_grad():
        assert_close(converted(images)["pred_logits"], model(images)["pred_logits"], 1e-5)
    assert f"converted to {name}: 1 attention layer" in caplog.text and "ENACT" not in caplog.text


def test_clusters_of_several_tokens_change_the_outputs():
    # Longer clusters change the outputs, so the equality above is not trivial.
    model, args = small("detr", "--encoder_attention", "mhsa", "--eval_size", "64")
    converted, args_enact = small("detr", "--pretrained", "plain.pth")
    load_pretrained(converted, checkpoint_of("detr", shuffle_(model), args), "detr", args_enact, LABELS)
    images = torch.randn(1, 3, 128, 128)
    assert not torch.allclose(model(images)["pred_logits"], converted(images)["pred_logits"], atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_converted_projections_include_the_attention_scaling(bias):
    attention = nn.MultiheadAttention(8, 2, bias=bias)
    weights = clustered_weights(attention.state_dict(), 2)
    # head_dim is 4: queries are scaled by 1/2, the output projection by 4.
    packed = attention.in_proj_weight.detach()
    assert_close(weights["W_q.weight"], packed[:8] / 2, 0)
    assert_close(weights["W_k.weight"], packed[8:16], 0)
    assert_close(weights["W_o.weight"], attention.out_proj.weight.detach() * 4, 0)
    assert set(weights) == {f"W_{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")}
    assert all(tensor.shape == (8,) for name, tensor in weights.items() if name.endswith("bias"))


def test_initial_scores_give_short_clusters_with_almost_equal_weights():
    # The docstring of `clustered_weights` states this for W_prob, which it does not convert.
    tokens = torch.randn(1, 1050, 64)
    fresh, zero = (clustering.EntropyClustering(64) for _ in range(2))
    nn.init.zeros_(zero.W_prob.weight)
    assert zero(tokens)[0].shape[1] <= 5
    weights = fresh.cluster(tokens).weights  # (1, M, length)
    length = weights.shape[-1]
    assert 3 <= length <= 10 and (weights - 1 / length).abs().max() < 0.01 / length


def test_row_column_attention_weights_are_kept_as_initialisation(caplog):
    caplog.set_level(logging.INFO, "enact")
    model, args = small("anchor", "--encoder_attention", "mhsa")
    enact, enact_args = small("anchor", "--pretrained", "plain.pth")
    load_pretrained(enact, checkpoint_of("anchor", shuffle_(model), args), "anchor", enact_args, LABELS)
    name = "transformer.encoder_layers.0.self_attn.in_proj_weight"
    assert torch.equal(enact.state_dict()[name], model.state_dict()[name])
    assert "another function than plain" in caplog.text and "slice by slice as a start" in caplog.text
    assert "left as initialised: transformer.encoder_layers.0.ENACT.W_prob.weight" in caplog.text


@pytest.mark.parametrize(
    "labels, taken",
    [
        (LABELS, True),
        (LabelMap((7, 8, 9), ("red", "green", "blue")), True),  # the same classes with other ids
        (LabelMap((1, 2, 3), ("red", "green", "violet")), False),
        (LabelMap((1, 2), ("red", "green")), False),
    ],
    ids=["same", "ids", "names", "fewer"],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_head_for_other_classes_is_reinitialised(variant, labels, taken, caplog):
    caplog.set_level(logging.INFO, "enact")
    model, args = small(variant)
    checkpoint = checkpoint_of(variant, shuffle_(model), args)
    fresh, args = small(variant, "--pretrained", "x.pth", "--num_classes", str(labels.num_classes))
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    load_pretrained(fresh, checkpoint, variant, args, labels)
    heads = [name for name in before if "class_embed" in name]
    source = checkpoint["model"] if taken else before
    assert heads and all(torch.equal(fresh.state_dict()[name], source[name]) for name in heads)
    assert ("skipped, other classes" in caplog.text) == (not taken)
    assert all(torch.equal(fresh.state_dict()[n], checkpoint["model"][n]) for n in before if n not in heads)


def test_an_original_checkpoint_of_coco_keeps_its_head_on_coco():
    model, args = small("detr", "--num_classes", "91")
    original = {"model": model.state_dict(), "args": {}}
    names = coco_names()
    coco = LabelMap(tuple(None if name == "N/A" else i for i, name in enumerate(names)), names)
    other, args = small("detr", "--num_classes", "91", "--pretrained", "x.pth")
    load_pretrained(other, original, "detr", args, coco)
    assert torch.equal(other.class_embed.weight, model.class_embed.weight)


def test_mismatched_tensors_are_listed_with_the_reason():
    own = {"a.weight": torch.zeros(2, 3), "b": torch.zeros(4), "new": torch.zeros(1)}
    fit = fit_weights({"a.weight": torch.ones(5, 3), "b": torch.ones(4), "old": torch.ones(1)}, own, 1, True, False)
    assert fit.skipped == {"a.weight": "5 x 3 in the checkpoint, 2 x 3 in the model", "old": "not in the model"}
    assert fit.fresh == ["a.weight", "new"] and list(fit.weights) == ["b"]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda state: state | {"variant": "conditional"},
            "the variant conditional, .* run Conditional-DETR-ENACT/main",
        ),
        (lambda state: {"model": {"weight": torch.zeros(1)}, "args": {}}, "fits none of the variants"),
        (lambda state: state | {"model": without_stage(state["model"])}, "has 1 stages, .* pass --backbone_stages 1"),
        (
            lambda state: {
                "model": small("detr", "--backbone", "resnet34")[0].state_dict(),
                "args": state["args"] | {"enc_layers": 5, "encoder_attention": "linear"},
            },
            "its backbone is resnet34, this run's is resnet18; pass --backbone resnet34 --enc_layers 5$",
        ),
        (lambda state: state | {"model": without_norm(state["model"])}, "1 backbone tensors are missing"),
    ],
    ids=["other variant", "unknown model", "missing stage", "other backbone", "missing tensor"],
)
def test_unsuitable_pretrained_weights_are_refused(change, message):
    model, args = small("detr", "--pretrained", "x.pth")
    with pytest.raises(UserError, match=message):
        load_pretrained(model, change(checkpoint_of("detr", model, args)), "detr", args, LABELS)


def without_stage(state):
    """A state dict without the backbone's last stage."""
    return {name: tensor for name, tensor in state.items() if "layer2" not in name}


def without_norm(state):
    """A state dict without one of the backbone's tensors."""
    return {name: tensor for name, tensor in state.items() if not name.endswith("layer1.0.bn1.running_var")}


def test_unsuitable_pretrained_weights_are_refused_before_training(shapes, plain, tmp_path, capsys):
    argv = ["--pretrained", plain / "checkpoint.pth"]
    assert train("conditional", shapes, tmp_path / "out", *argv) == 2
    assert "run DETR-ENACT/main.py" in capsys.readouterr().err
    assert train("detr", shapes, tmp_path / "out", *argv, "--backbone", "resnet34") == 2
    assert "pass --backbone resnet18" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "variant, theirs, ours",
    [
        ("detr", "--hidden_dim 64", ""),  # another hidden_dim
        ("anchor", "", "--attention_type nn.MultiheadAttention"),  # five packed projections, not three
    ],
)
def test_mismatched_attention_is_not_converted(variant, theirs, ours, caplog):
    caplog.set_level(logging.INFO, "enact")
    model, args = small(variant, "--encoder_attention", "mhsa", *theirs.split())
    enact, enact_args = small(variant, "--pretrained", "x.pth", *ours.split())
    attention = {name: tensor.clone() for name, tensor in enact.state_dict().items() if ".W_" in name}
    load_pretrained(enact, checkpoint_of(variant, shuffle_(model), args), variant, enact_args, LABELS)
    assert "converted to ENACT" not in caplog.text and "slice by slice" not in caplog.text
    assert re.search(r"skipped, .*self_attn.in_proj_weight", caplog.text)
    assert len(attention) == 10 and all(torch.equal(enact.state_dict()[name], attention[name]) for name in attention)


def test_pre_norm_with_enact_is_reported_as_post_norm(caplog):
    caplog.set_level(logging.INFO, "enact")
    model, args = small("detr", "--encoder_attention", "mhsa", "--pre_norm")
    enact, enact_args = small("detr", "--pretrained", "x.pth", "--pre_norm")
    load_pretrained(enact, checkpoint_of("detr", model, args), "detr", enact_args, LABELS)
    assert "post-norm even with --pre_norm" in caplog.text


def test_a_training_starts_from_a_pretrained_checkpoint(shapes, plain, tmp_path, capsys):
    argv = ["--pretrained", plain / "checkpoint.pth", "--epochs", "1"]
    assert train("detr", shapes, tmp_path, *argv) == 0
    text = capsys.readouterr().out
    assert "converted to ENACT: 1 attention layer" in text and f"weights            {argv[1]}" in text
    assert read_log(tmp_path)[0]["epoch"] == 0
    # A resumed training does not load the pretrained weights again.
    assert train("detr", shapes, tmp_path, *argv[:2], "--auto_resume", "--epochs", "2") == 0
    text = capsys.readouterr().out
    assert "tensors loaded" not in text and f"weights            {tmp_path / 'checkpoint.pth'}" in text


def test_a_converted_model_can_be_evaluated_without_training(shapes, plain, tmp_path, capsys):
    assert train("detr", shapes, tmp_path, "--pretrained", plain / "checkpoint.pth", "--eval") == 0
    text = capsys.readouterr().out
    assert "converted to ENACT" in text and "other classes" not in text and "Average Precision" in text


def test_resuming_with_enact_from_a_plain_checkpoint_is_refused_with_advice(shapes, plain, tmp_path, capsys):
    assert train("detr", shapes, tmp_path, "--resume", plain / "checkpoint.pth") == 2
    assert "Pass the flags of that run: --encoder_attention mhsa; or use --pretrained" in capsys.readouterr().err


def test_frozen_parts_keep_their_values(shapes, plain, tmp_path, capsys):
    argv = ["--pretrained", plain / "checkpoint.pth", "--epochs", "1", "--encoder_attention", "mhsa"]
    assert train("detr", shapes, tmp_path, *argv, "--freeze", "backbone", "encoder") == 0
    assert "frozen             parameters named with backbone, encoder" in capsys.readouterr().out
    before, after = (load_checkpoint(str(path / "checkpoint.pth"))["model"] for path in (plain, tmp_path))
    frozen = [name for name in before if "backbone" in name or "encoder" in name]
    # This includes the running statistics of batch norms.
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["class_embed.weight"], after["class_embed.weight"])


@pytest.mark.parametrize(
    "parts, message",
    [
        (["backbon", "moon"], "--freeze moon: no parameter's name"),
        (["e", "a"], "--freeze e a: no parameter is left to train"),
    ],
)
def test_freezing_nothing_or_all_is_refused(shapes, tmp_path, capsys, parts, message):
    assert train("detr", shapes, tmp_path, "--epochs", "1", "--freeze", *parts) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pth").exists()


def test_weight_average_follows_its_formula():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.5)
    expected = None
    for n, value in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0), start=1):
        nn.init.constant_(model.weight, value)
        average.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert average.model.weight.item() == pytest.approx(expected)
    restored = WeightAverage(nn.Linear(1, 1, bias=False), 0.5)
    restored.load(average.model.state_dict(), average.steps)
    for one in (average, restored):
        one.update(model)
    assert restored.model.weight.item() == average.model.weight.item()


def test_ema_weights_are_evaluated_and_resumed(shapes, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train("detr", shapes, whole, "--epochs", "2", "--ema", "0.9") == 0
    for epochs in ("1", "2"):
        assert train("detr", shapes, parts, "--epochs", epochs, "--ema", "0.9", "--auto_resume") == 0
    ours, theirs = (load_checkpoint(str(folder / "checkpoint.pth")) for folder in (parts, whole))
    assert ours["ema_steps"] == theirs["ema_steps"] == 6
    assert all(torch.equal(ours["model_ema"][name], tensor) for name, tensor in theirs["model_ema"].items())
    assert not torch.equal(ours["model_ema"]["class_embed.weight"], ours["model"]["class_embed.weight"])
    assert read_log(parts) == read_log(whole)
    # --eval also uses the EMA weights, so it gives the same loss as the epoch's evaluation.
    capsys.readouterr()
    assert train("detr", shapes, tmp_path / "eval", "--resume", whole / "checkpoint.pth", "--eval") == 0
    text = capsys.readouterr().out
    assert "using the EMA weights (--ema)" in text
    assert f"loss {read_log(whole)[-1]['test_loss']:.4g} " in text


@pytest.fixture
def ap_history(monkeypatch):
    """The AP values that successive evaluations return; tests append to it."""
    values = []
    metrics = lambda *args, **kwargs: {"test_coco_eval_bbox": [values.pop(0)] + [0.0] * 11}  # noqa: E731
    monkeypatch.setattr(training_run, "report_evaluation", metrics)
    return values


@pytest.mark.parametrize(
    "first, then, message",
    [
        ("--ema 0.9", "", "holds EMA weights, which would be lost: pass --ema 0.9"),
        ("--freeze decoder", "--freeze encoder", "was trained with --freeze decoder; pass the same"),
        ("", "--freeze encoder", "was trained with no --freeze"),
    ],
)
def test_resuming_with_other_ema_or_freeze_flags_is_refused(shapes, tmp_path, capsys, first, then, message):
    few = ["--limit_train", "4", "--limit_val", "1", "--auto_resume"]
    assert train("detr", shapes, tmp_path, "--epochs", "1", *few, *first.split()) == 0
    assert train("detr", shapes, tmp_path, "--epochs", "2", *few, *then.split()) == 2
    assert message in capsys.readouterr().err


def test_the_best_checkpoint_is_kept_after_resuming_in_another_folder(shapes, plain, tmp_path, ap_history):
    ap_history += [0.5, 0.2]
    argv = ["--resume", plain / "checkpoint.pth", "--encoder_attention", "mhsa", "--epochs", "2", "--limit_val", "1"]
    assert train("detr", shapes, tmp_path, *argv) == 0
    assert load_checkpoint(str(tmp_path / "best.pth"))["epoch"] == 0
    assert load_checkpoint(str(tmp_path / "checkpoint.pth"))["epoch"] == 1


def test_early_stop_ends_a_run_without_improvement(shapes, tmp_path, ap_history, capsys):
    ap_history += [0.1, 0.3, 0.3, 0.2, 0.9]
    argv = ["--limit_train", "4", "--limit_val", "1", "--early_stop", "2"]
    assert train("detr", shapes, tmp_path, "--epochs", "9", *argv) == 0
    assert [row["test_coco_eval_bbox"][0] for row in read_log(tmp_path)] == [0.1, 0.3, 0.3, 0.2]
    assert "has not risen in the last 2 evaluations; the highest is 0.300" in capsys.readouterr().out
    assert load_checkpoint(str(tmp_path / "best.pth"))["epoch"] == 1
    # Resuming keeps the AP history.
    assert train("detr", shapes, tmp_path, "--epochs", "9", *argv, "--auto_resume") == 0
    assert len(read_log(tmp_path)) == 4 and ap_history == [0.9]
    # With more patience the training continues and replaces the best checkpoint.
    ap_history += [0.1] * 9
    assert train("detr", shapes, tmp_path, "--epochs", "6", *argv[:-1], "3", "--auto_resume") == 0
    assert load_checkpoint(str(tmp_path / "best.pth"))["epoch"] == 4


def test_data_with_any_folder_names(shapes, tmp_path):
    (tmp_path / "own").mkdir()
    for split in ("train", "val"):
        shutil.copytree(shapes / f"{split}2017", tmp_path / "own" / f"{split} pictures")
        shutil.copy(shapes / "annotations" / f"instances_{split}2017.json", tmp_path / "own" / f"{split}.json")
    flags = {
        f"--{split}_{kind}": tmp_path / "own" / name
        for split in ("train", "val")
        for kind, name in (("images", f"{split} pictures"), ("annotations", f"{split}.json"))
    }
    argv = [word for item in flags.items() for word in item]
    assert run("detr", "--output_dir", tmp_path / "a", *SMALL_MODEL["detr"], "--epochs", "1", *argv) == 0
    assert train("detr", shapes, tmp_path / "b", "--epochs", "1") == 0
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")
    # Evaluation needs only the validation flags.
    argv = ["--eval", "--resume", tmp_path / "a" / "checkpoint.pth", *argv[4:]]
    assert run("detr", "--output_dir", tmp_path / "a", *SMALL_MODEL["detr"], *argv) == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--train_images"], "--train_annotations is missing"),
        (["--train_images", "--train_annotations"], "--val_images is missing: pass"),
        (["--val_images", "--val_annotations"], "--train_images is missing: pass"),
        (["--train_images", "--train_annotations", "--val_images", "--val_annotations"], "--train_images .*: no such"),
        (
            ["--train_images", "--train_annotations", "--eval_set test"],
            "--eval_set test: test images have no annotations",
        ),
    ],
)
def test_incomplete_data_flags_are_refused(tmp_path, capsys, flags, message):
    argv = [word for flag in flags for word in (flag.split() if " " in flag else (flag, tmp_path / "nowhere"))]
    assert run("detr", *SMALL_MODEL["detr"], "--output_dir", tmp_path / "out", *argv) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_training_checks_its_data_first(shapes, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    file = data / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = [10_000, 10, 20, 20]
    file.write_text(json.dumps(content))
    # Evaluating on a part of the training images must not skip the check of all.
    argv = ["--epochs", "1", "--eval_set", "train", "--limit_val", "1"]
    assert train("detr", data, tmp_path / "doubtful", *argv) == 0
    assert re.search(r"data: train: .*box", capsys.readouterr().out)
    file.write_text(json.dumps(content | {"annotations": []}))
    assert train("detr", data, tmp_path / "vain", "--epochs", "1") == 2
    assert "no boxes to learn from" in capsys.readouterr().err
    assert not list((tmp_path / "vain").glob("*.pth"))


def test_time_and_memory_of_an_epoch_are_logged(shapes, tmp_path):
    assert train("detr", shapes, tmp_path, "--epochs", "1", "--limit_train", "4", "--limit_val", "1") == 0
    row = json.loads((tmp_path / "log.txt").read_text())
    assert row["train_seconds"] > 0 and row["test_seconds"] > 0 and 0.05 < row["peak_memory_gib"] < 64


# ------------------------------------------------------------------------------- checkpoints of other training programs


def prefixed(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


def compiled_inside(weights):
    """Rename tensors as in a model whose backbone and encoder layers are compiled and wrapped."""
    return {
        name.replace("backbone.", "backbone._orig_mod.").replace("layers.0.", "layers.0._orig_mod.module."): tensor
        for name, tensor in weights.items()
    }


# For a state dict: the content of the file, and a part of the log message.
SHAPES = {
    "flat": (lambda w: w, "the whole file taken as weights"),
    "DataParallel": (lambda w: {"model": prefixed("module.", w)}, "module. removed"),
    "compiled": (lambda w: {"model": prefixed("_orig_mod.", w)}, "_orig_mod. removed"),
    "both": (lambda w: {"model": prefixed("module._orig_mod.", w)}, "_orig_mod., module. removed"),
    "parts": (lambda w: {"model": compiled_inside(w)}, "_orig_mod., module. removed"),
    "state_dict": (lambda w: {"state_dict": w, "epoch": 3}, "weights taken from 'state_dict'"),
    "model_state_dict": (lambda w: {"model_state_dict": prefixed("module.", w)}, "from 'model_state_dict'; module."),
    "nested": (lambda w: {"model": {"state_dict": prefixed("module.", w)}, "args": [1]}, "from 'model.state_dict'"),
    "ema": (lambda w: {"ema": {"module": w, "updates": 3}}, "from 'ema.module'"),
    "model_ema": (lambda w: {"model_ema": prefixed("module.", w)}, "from 'model_ema'; module. removed"),
    "model and ema": (
        lambda w: {"model": w, "ema": {"module": {name: t + 1 for name, t in w.items()}}},
        "weights taken from 'model', not from 'ema'",
    ),
    "AveragedModel": (lambda w: {"n_averaged": torch.tensor(3), **prefixed("module.", w)}, "module. removed"),
    "Lightning": (
        lambda w: {
            "state_dict": prefixed("model.", w) | {"criterion.empty_weight": torch.ones(4)},
            "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 1}, "epoch": 3, "callbacks": {},
        },
        "from 'state_dict'; model. removed from the tensors' names; left out: criterion.empty_weight",
    ),
    "Lightning compiled": (lambda w: {"state_dict": prefixed("net.detector._orig_mod.", w)}, "net.detector. removed"),
    "two models": (
        lambda w: {"state_dict": prefixed("teacher.", {n: t + 1 for n, t in w.items()}) | prefixed("model.", w)},
        "model. removed from the tensors' names; left out: teacher.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_found_in_checkpoints_of_other_shapes(shape, tmp_path, caplog):
    make, message = SHAPES[shape]
    model, _ = small("detr")
    torch.save(make(model.state_dict()), tmp_path / "other.pth")
    weights = load_checkpoint(str(tmp_path / "other.pth"))["model"]
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    (record,) = caplog.records
    assert str(tmp_path / "other.pth") in record.message and message in record.message and "\n" not in record.message
    if shape != "model and ema":
        with pytest.raises(UserError, match="other.pth: cannot resume .* --pretrained .* --eval"):
            load_checkpoint(str(tmp_path / "other.pth"), to_resume=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_safetensors_load(variant, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    model, _ = small(variant)
    # safetensors refuses tensors that share memory, such as Anchor DETR's heads.
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    detector = load_detector(tmp_path / "w.safetensors", "cpu", nheads=4, dilation=False)
    assert detector.variant == variant
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in detector.model.state_dict().items())


def test_a_mask_heads_tensors_are_found_with_a_prefix(tmp_path):
    model, _ = small("detr", "--masks")
    torch.save({"state_dict": prefixed("model.", model.state_dict())}, tmp_path / "masks.ckpt")
    assert load_checkpoint(str(tmp_path / "masks.ckpt"))["model"].keys() == model.state_dict().keys()


def test_every_loading_flag_takes_checkpoints_of_other_shapes(plain, shapes, tmp_path, capsys):
    weights = load_checkpoint(str(plain / "checkpoint.pth"))["model"]
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": prefixed("model._orig_mod.", weights)}, path)
    flags = ["--encoder_attention", "mhsa", "--limit_val", "2"]
    assert train("detr", shapes, "", "--resume", path, "--eval", *flags) == 0
    assert train("detr", shapes, "", "--pretrained", path, "--epochs", "1", "--limit_train", "4", *flags) == 0
    text = capsys.readouterr().out
    assert text.count("other.ckpt: weights taken from 'state_dict'; _orig_mod. removed") == 2
    assert load_detector(path, "cpu").variant == "detr"
    capsys.readouterr()
    assert train("detr", shapes, tmp_path / "out", "--resume", path, *flags) == 2
    assert "cannot resume from a checkpoint in this format" in capsys.readouterr().err


def test_two_tensors_with_the_same_name_are_refused(tmp_path):
    model, _ = small("detr")
    torch.save({"model": model.state_dict() | prefixed("module.", model.state_dict())}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth: has two tensors .*; save only one model"):
        load_checkpoint(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    "names, kind",
    [
        (["class_labels_classifier.weight", "model.encoder.layers.0.self_attn.q_proj.weight"], "a Hugging Face DETR"),
        (["backbone.bottom_up.stem.conv1.weight", "proposal_generator.rpn_head.conv.weight"], "a Detectron2"),
        (["backbone.layer1.0.conv1.weight", "bbox_head.fc_cls.weight"], "an MMDetection"),
        (["model.0.conv.weight", "model.1.bn.weight"], "a YOLO"),
        (["backbone.body.conv1.weight", "rpn.head.conv.0.0.weight"], "a torchvision detector"),
        (["transformer.decoder.layers.0.cross_attn.sampling_offsets.weight"], "a Deformable DETR"),
        (["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], "only a backbone, for --backbone_weights"),
        (["some.weight"], "its tensors are named some.weight"),
    ],
)
def test_other_libraries_models_are_named(names, kind, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": {name: torch.zeros(1) for name in names}}, path)
    for door in (lambda: load_detector(path, "cpu"), lambda: ENTRIES["detr_resnet50"](pretrained=path)):
        with pytest.raises(UserError, match=f"x.pth: fits none of the variants .*{kind}.* Pass a checkpoint of"):
            door()
