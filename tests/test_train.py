"""The training command on small data: training, evaluation, resuming, and failures."""

import copy
import hashlib
import io
import json
import math
import multiprocessing
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODEL, build, equal_states, parse, read_log, start, train

from enact_common import UserError, load_detector
from enact_common.attention.packed import is_packing, note_overflow
from enact_common.checkpoints.files import check_model_flags, load_checkpoint, optimizer_state_by_name, save_checkpoint
from enact_common.data import cache, images
from enact_common.data.synthetic import make_shapes
from enact_common.inference.introspection import check_kinds
from enact_common.nested_tensor import nested_tensor_from_tensor_list
from enact_common.training import engine
from enact_common.training.engine import NonFiniteLossError, TrainStep, describe_non_finite, first_non_finite_output
from enact_common.training.logs import AverageMeter
from enact_common.training.optimization import Optimization, build_optimization, learning_rate_factor, parameter_groups
from enact_common.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """The output folder of an uninterrupted run of two epochs."""
    output = tmp_path_factory.mktemp("trained") / "run"
    torch.manual_seed(0)
    assert train("detr", shapes, output, "--epochs", "2", "--dropout", "0.1") == 0
    return output


@pytest.fixture(scope="module")
def unannotated(shapes, tmp_path_factory):
    """The validation images in the form of COCO's test images: a list without annotations."""
    root = tmp_path_factory.mktemp("unannotated")
    shutil.copytree(shapes / "val2017", root / "test2017")
    content = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    del content["annotations"]
    (root / "annotations").mkdir()
    (root / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(content))
    return root


def test_train_then_evaluate(variant_and_attention, shapes, unannotated, tmp_path, capsys):
    variant, attention = variant_and_attention
    argv = ["--encoder_attention", attention]
    assert train(variant, shapes, tmp_path, "--epochs", "1", *argv) == 0
    text = capsys.readouterr().out
    for said in (
        "train images       12 with",
        "effective batch    4 =",
        "classes            6 (circle",
        "epoch 0 [3/3]",
        ", 8 queries",
    ):
        assert said in text
    (epoch,) = read_log(tmp_path)
    # The keys of the original's log.
    wanted = {"train_lr", "train_loss", "train_loss_ce", "train_loss_bbox_0", "train_class_error", "test_loss",
              "train_loss_giou_unscaled", "epoch", "n_parameters"}  # fmt: skip
    # Anchor DETR's log has no cardinality error.
    wanted |= {"train_cardinality_error_unscaled"} if variant != "anchor" else set()
    assert wanted <= set(epoch) and len(epoch["test_coco_eval_bbox"]) == 12
    assert list((tmp_path / "tensorboard").iterdir())

    assert train(variant, shapes, tmp_path, "--resume", tmp_path / "checkpoint.pth", "--eval", *argv) == 0
    text = capsys.readouterr().out
    assert text.count("Average Precision") == 6 and "crescent" in text
    results = json.loads((tmp_path / "results.json").read_text())
    # Every image has equally many results; DETR has one per query.
    assert len(results) >= 6 * 8 and len(set(Counter(r["image_id"] for r in results).values())) == 1
    assert variant != "detr" or len(results) == 6 * 8
    assert {r["category_id"] for r in results} <= set(range(1, 7))
    # The evaluation gives the AP that the epoch logged.
    figure = f"{epoch['test_coco_eval_bbox'][0]:.3f}"
    assert f"area=   all | maxDets=100 ] = {figure}" in text

    # The same images without annotations give the same detections, without metrics.
    argv += ["--resume", tmp_path / "checkpoint.pth", "--eval", "--eval_set", "test"]
    assert train(variant, unannotated, tmp_path / "test", *argv) == 0
    text = capsys.readouterr().out
    assert "evaluated images   6, of test" in text and "evaluation [2/2]  " in text
    assert "Average Precision" not in text and "loss" not in text and "crescent  " not in text
    assert json.loads((tmp_path / "test" / "results.json").read_text()) == results


def test_a_rival_trains_resumes_and_is_loaded(shapes, tmp_path, capsys):
    flags, resume = ["--encoder_attention", "avgpool"], ["--resume", tmp_path / "checkpoint.pth"]
    assert train("detr", shapes, tmp_path, "--epochs", "1", "--token_budget", "9", *flags) == 0
    assert "encoder attention  multi-head, avgpool, token budget 9\n" in capsys.readouterr().out
    assert "\ntoken_budget: 9\n" in (tmp_path / "config.yaml").read_text()
    # The checkpoint's budget, unless the command line says otherwise.
    assert train("detr", shapes, tmp_path, "--epochs", "2", *flags, *resume) == 0
    assert "avgpool, token budget 9\n" in capsys.readouterr().out
    assert train("detr", shapes, tmp_path / "other", "--eval", "--token_budget", "0", *flags, *resume) == 0
    assert "avgpool, token budget 1/16 of the tokens\n" in capsys.readouterr().out
    assert train("detr", shapes, tmp_path / "other", "--eval", *resume) == 2
    assert "Pass the flags of that run: --encoder_attention avgpool" in capsys.readouterr().err
    detector = load_detector(tmp_path / "checkpoint.pth", "cpu")
    assert detector.model.transformer.encoder.layers[0].self_attn.token_budget == 9
    with pytest.raises(UserError, match="--show clusters: .*no clusters"):
        check_kinds(detector, ["clusters"])


@pytest.mark.parametrize(
    "argv",
    [
        ["--num_workers", "0"],
        ["--num_workers", "2"],
        ["--auto_resume"],
        ["--cache_mode", "--num_workers", "1"],
        ["--cache_mode", "decoded", "--num_workers", "1"],
    ],
    ids=" ".join,
)
def test_a_resumed_run_equals_the_uninterrupted_one(shapes, trained, tmp_path, argv):
    argv = ["--dropout", "0.1", *argv]
    assert train("detr", shapes, tmp_path, "--epochs", "1", *argv) == 0
    torch.manual_seed(99)
    resume = [] if "--auto_resume" in argv else ["--resume", tmp_path / "checkpoint.pth"]
    assert train("detr", shapes, tmp_path, "--epochs", "2", *resume, *argv) == 0
    ours, theirs = (load_checkpoint(str(folder / "checkpoint.pth")) for folder in (tmp_path, trained))
    for key in ("model", "optimizer", "scaler", "epoch", "random_states", "train_stats"):
        assert equal_states(ours[key], theirs[key]), key
    assert read_log(tmp_path) == read_log(trained)


def test_resume_overrides_auto_resume(shapes, trained, tmp_path, capsys):
    argv = ["--auto_resume", "--epochs", "3", "--limit_train", "4", "--limit_val", "1"]
    assert train("detr", shapes, tmp_path, *argv, "--resume", trained / "checkpoint.pth") == 0
    assert f"weights            {trained / 'checkpoint.pth'}" in capsys.readouterr().out
    assert train("detr", shapes, tmp_path, *argv) == 0
    text = capsys.readouterr().out
    assert f"weights            {tmp_path / 'checkpoint.pth'}" in text and "nothing left to train: 3 epochs" in text
    # --eval also takes the latest checkpoint.
    assert train("detr", shapes, tmp_path, "--auto_resume", "--eval", "--limit_val", "1") == 0
    # Resuming another run's checkpoint does not overwrite the folder's run, with or without --auto_resume.
    assert train("detr", shapes, tmp_path, *argv, "--resume", trained / "checkpoint.pth") == 2


def test_processes_without_a_shared_folder_are_refused(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("enact_common.training.run.gather_objects", lambda value: [value, "elsewhere/checkpoint.pth"])
    assert train("detr", shapes, tmp_path, "--auto_resume") == 2
    assert "--auto_resume: only some processes see" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [["--cache_mode"], ["--cache_mode", "decoded"]], ids=" ".join)
def test_cached_images_are_read_once(shapes, trained, tmp_path, monkeypatch, capsys, mode):
    read = []
    original = images.read_file
    for module in (images, cache):
        monkeypatch.setattr(module, "read_file", lambda path: read.append(path) or original(path))
    assert train("detr", shapes, tmp_path, "--epochs", "2", "--dropout", "0.1", *mode) == 0
    assert len(read) == len(set(read)) == 12 + 6
    assert "reading train2017 and val2017 into memory [18/18]" in capsys.readouterr().out
    assert read_log(tmp_path) == read_log(trained)


def test_loading_processes_are_started_once(shapes, tmp_path, monkeypatch):
    started = []
    start = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: started.append(self) or start(self))
    assert train("detr", shapes, tmp_path, "--epochs", "2", "--num_workers", "1") == 0
    # One for training and one for evaluation, whatever the number of epochs; both end with the run.
    assert len(started) == 2 and not any(process.is_alive() for process in started)


def test_images_that_do_not_fit_into_memory_are_refused(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "physical_memory", lambda: 1024)
    assert train("detr", shapes, tmp_path, "--cache_mode") == 2
    error = capsys.readouterr().err
    assert re.search(r"--cache_mode encoded: the image files are .* GiB, .* memory is 9.537e-07 GiB", error)
    assert not list(tmp_path.iterdir())


def test_checkpoints_hold_only_plain_types_and_are_complete(trained):
    state = torch.load(trained / "checkpoint.pth", weights_only=True)
    assert {"model", "optimizer", "epoch", "args", "label_map", "variant"} <= set(state)
    assert state["label_map"]["names"][0] == "circle" and state["label_map"]["category_ids"] == [1, 2, 3, 4, 5, 6]
    assert state["args"]["hidden_dim"] == 32 and isinstance(state["args"], dict)
    assert not list(trained.glob("*.partial"))


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"model": {"a": torch.ones(1)}})

    def full_disk(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="checkpoint.pth: cannot be written .No space left on device"):
        save_checkpoint(path, {"model": {"a": torch.zeros(1)}})
    assert load_checkpoint(str(path))["model"]["a"].item() == 1
    assert list(tmp_path.iterdir()) == [path]


def test_numbered_checkpoints_are_kept_before_the_learning_rate_drops(shapes, tmp_path):
    assert train("detr", shapes, tmp_path, "--epochs", "2", "--lr_drop", "1", "--limit_val", "1") == 0
    kept = {path.name for path in tmp_path.glob("checkpoint*.pth")}
    assert kept == {"checkpoint.pth", "checkpoint0000.pth", "checkpoint0001.pth"}
    rates = [row["train_lr"] for row in read_log(tmp_path)]
    assert rates == pytest.approx([1e-3, 1e-4])


def test_the_learning_rate_drops_after_chosen_epochs(shapes, tmp_path):
    few = ["--limit_train", "4", "--limit_val", "1", "--eval_every", "9"]
    argv = ["--epochs", "4", "--lr_drop", "1", "--lr_drop_epochs", "3", "1", "3"]
    assert train("detr", shapes, tmp_path, *argv, *few) == 0
    kept = {path.name for path in tmp_path.glob("checkpoint*.pth")}
    assert kept == {"checkpoint.pth", "checkpoint0000.pth", "checkpoint0002.pth"}
    rates = [row["train_lr"] for row in read_log(tmp_path)]
    assert rates == pytest.approx([1e-3, 1e-4, 1e-4, 1e-5])


def test_each_parameter_group_has_its_learning_rate(shapes, tmp_path, capsys):
    few = ["--limit_train", "4", "--limit_val", "1", "--eval_every", "9"]
    argv = ["--lr_linear_proj_names", "query_embed", "linear", "--lr_linear_proj_mult", "0.5", *few]
    assert train("detr", shapes, tmp_path, "--epochs", "1", *argv) == 0
    said = "learning rates     0.001, backbone 0.0001, linear projections 0.0005; step schedule"
    assert said in capsys.readouterr().out
    resume = ["--resume", tmp_path / "checkpoint.pth", "--epochs", "2"]
    assert train("detr", shapes, tmp_path, *resume, *argv) == 0
    text = capsys.readouterr().out
    assert said in text and "the checkpoint's learning rates are used" not in text
    groups = load_checkpoint(str(tmp_path / "checkpoint.pth"))["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [1e-3, 1e-4, 5e-4]
    # Another number of groups does not fit the checkpoint.
    assert train("detr", shapes, tmp_path, *resume, *few) == 2
    assert "optimizer state does not fit" in capsys.readouterr().err
    # A frozen backbone has no learning rate.
    frozen = ["--lr_backbone", "0", "--backbone_norm", "frozen", "--epochs", "0", *argv]
    assert train("detr", shapes, tmp_path / "frozen", *frozen) == 0
    assert "learning rates     0.001, linear projections 0.0005; " in capsys.readouterr().out


class Named(torch.nn.Module):
    """A module with parameters of different names, for grouping by name."""

    def __init__(self):
        super().__init__()
        for name in ("backbone_conv", "backbone_offsets", "frozen", "offsets", "head"):
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(1), requires_grad=name != "frozen"))


@pytest.mark.parametrize(
    "names, expected",
    [
        ({}, {1: ["frozen", "head", "offsets"], 2: ["backbone_conv", "backbone_offsets"]}),
        (
            {"linear_proj_names": ["offsets"], "linear_proj_mult": 3},
            {1: ["head"], 2: ["backbone_conv", "backbone_offsets"], 3: ["offsets"]},
        ),
        (
            {"backbone_names": ["conv", "frozen"], "linear_proj_names": ["offsets", "head"], "linear_proj_mult": 3},
            {2: ["backbone_conv"], 3: ["backbone_offsets", "head", "offsets"]},
        ),
    ],
)
def test_parameter_groups_follow_the_names(names, expected):
    model = Named()
    groups = parameter_groups(model, lr=1, lr_backbone=2, **names)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    found = {group["lr"]: sorted(name_of[parameter] for parameter in group["params"]) for group in groups}
    assert found == {rate: [name for name in members if name != "frozen"] for rate, members in expected.items()}
    assert [group["initial_lr"] for group in groups] == list(found)


def test_sgd_trains_and_resumes(shapes, trained, tmp_path, capsys):
    few = ["--limit_train", "8", "--limit_val", "1", "--eval_every", "9", "--lr", "1e-2"]
    resume = ["--resume", tmp_path / "half" / "checkpoint.pth"]
    assert train("detr", shapes, tmp_path / "whole", "--sgd", "--epochs", "2", *few) == 0
    assert train("detr", shapes, tmp_path / "half", "--sgd", "--epochs", "1", *few) == 0
    assert train("detr", shapes, tmp_path / "half", "--sgd", "--epochs", "2", *resume, *few) == 0
    ours, theirs = (load_checkpoint(str(tmp_path / name / "checkpoint.pth")) for name in ("half", "whole"))
    assert equal_states(ours["optimizer"], theirs["optimizer"]) and equal_states(ours["model"], theirs["model"])
    assert {group["momentum"] for group in ours["optimizer"]["param_groups"]} == {0.9}
    # The state of another kind of optimizer is refused.
    for flags in (["--resume", trained / "checkpoint.pth", "--sgd"], resume):
        assert train("detr", shapes, tmp_path / "other", *flags, *few) == 2
        assert "optimizer state does not fit" in capsys.readouterr().err


def test_eval_every_skips_evaluations_except_the_last(shapes, tmp_path):
    assert train("detr", shapes, tmp_path, "--epochs", "3", "--eval_every", "2", "--limit_val", "1") == 0
    assert ["test_coco_eval_bbox" in row for row in read_log(tmp_path)] == [False, True, True]


def test_original_checkpoints_load(shapes, trained, tmp_path):
    # The original stores its arguments in a Namespace and has no label map.
    state = load_checkpoint(str(trained / "checkpoint.pth"))
    path = tmp_path / "original.pth"
    original_args = Namespace(hidden_dim=32, position_embedding="v2", lr=1e-4)
    torch.save(
        {"model": state["model"], "optimizer": {}, "lr_scheduler": {}, "epoch": 299, "args": original_args}, path
    )
    assert train("detr", shapes, "", "--resume", path, "--eval") == 0
    # A published file of only weights starts a new training.
    torch.save({"model": state["model"]}, path)
    assert train("detr", shapes, tmp_path / "tuned", "--resume", path, "--epochs", "1", "--limit_val", "1") == 0
    assert read_log(tmp_path / "tuned")[0]["epoch"] == 0


def test_a_checkpoint_of_another_parameter_order_resumes(shapes, trained, tmp_path):
    # Optimizers number parameters in order, and the reference creates its modules in another order.
    state = load_checkpoint(str(trained / "checkpoint.pth"))
    model = state["model"]
    trained_names = [
        name for name in model if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ]
    groups = [[n for n in trained_names if ("backbone" in n) == backbone] for backbone in (False, True)]
    number = {name: i for i, name in enumerate([*groups[0], *groups[1]])}
    turned = [list(reversed(group)) for group in groups]
    order = [*turned[0], *turned[1]]
    foreign = {
        "model": {name: model[name] for name in [*reversed(list(model))]},
        "epoch": 1,
        "optimizer": {
            "state": {i: state["optimizer"]["state"][number[name]] for i, name in enumerate(order)},
            # Anchor DETR's optimizer has a third, empty group, and groups without names.
            "param_groups": [
                *(
                    {key: value for key, value in g.items() if key != "name"}
                    for g in state["optimizer"]["param_groups"]
                ),
                {"params": [], "lr": 1e-5, "initial_lr": 1e-5},
            ],
        },
    }
    torch.save(foreign, tmp_path / "foreign.pth")
    argv = ["--epochs", "3", "--dropout", "0", "--limit_val", "1"]
    assert train("detr", shapes, tmp_path / "a", *argv, "--resume", tmp_path / "foreign.pth") == 0
    assert train("detr", shapes, tmp_path / "b", *argv, "--resume", trained / "checkpoint.pth") == 0
    ours, theirs = (load_checkpoint(str(tmp_path / name / "checkpoint.pth")) for name in "ab")
    assert equal_states(ours["model"], theirs["model"]) and equal_states(ours["optimizer"], theirs["optimizer"])


def test_checkpoints_are_loaded_from_urls_and_cached(shapes, trained, website, capsys):
    content = (trained / "checkpoint.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    named = f"{website.url}/right-{digest[:8]}.pth"
    wrong = f"{website.url}/wrong-00000000.pth"
    for url in (named, wrong, f"{website.url}/checkpoint.pth"):
        (website.folder / Path(url).name).write_bytes(content)
    assert train("detr", shapes, "", "--resume", named, "--eval") == 0
    assert train("detr", shapes, "", "--resume", f"{website.url}/checkpoint.pth#sha256={digest}", "--eval") == 0
    capsys.readouterr()
    assert train("detr", shapes, "", "--resume", wrong, "--eval") == 2
    assert f"error: {wrong}: is not the expected file (its SHA-256 is {digest}" in capsys.readouterr().err
    # The second load uses the cache.
    website.asked.clear()
    assert train("detr", shapes, "", "--pretrained", named, "--eval") == 0 and website.asked == []


def test_an_optimizer_state_that_does_not_fit_is_refused(shapes, trained, tmp_path, capsys):
    state = load_checkpoint(str(trained / "checkpoint.pth"))
    for optimizer in ({}, {"state": {}, "param_groups": [{"params": [0]}, {"params": [1]}]}):
        torch.save({**state, "optimizer": optimizer}, tmp_path / "bad.pth")
        assert train("detr", shapes, tmp_path / "out", "--resume", tmp_path / "bad.pth") == 2
        assert "bad.pth: the checkpoint's optimizer state does not fit" in capsys.readouterr().err


def test_a_resumed_run_keeps_the_learning_rate_of_the_checkpoint(shapes, trained, tmp_path, capsys):
    argv = ["--epochs", "3", "--lr", "5", "--limit_val", "1", "--resume", trained / "checkpoint.pth"]
    assert train("detr", shapes, tmp_path, *argv) == 0
    text = capsys.readouterr().out
    assert "the checkpoint's learning rates are used" in text and "learning rates     0.001, backbone 0.0001;" in text
    assert read_log(tmp_path)[0]["train_lr"] == 1e-3


def test_a_finished_run_reports_that_nothing_is_left_to_train(shapes, trained, tmp_path, capsys):
    assert train("detr", shapes, tmp_path, "--epochs", "2", "--resume", trained / "checkpoint.pth") == 0
    assert "nothing left to train: 2 epochs are done, --epochs is 2" in capsys.readouterr().out


def test_a_truncated_line_in_the_log_is_ignored(shapes, trained, tmp_path):
    shutil.copy(trained / "checkpoint.pth", tmp_path)
    (tmp_path / "log.txt").write_text('{"train_lo')
    argv = ["--epochs", "3", "--limit_val", "1", "--resume", tmp_path / "checkpoint.pth"]
    assert train("detr", shapes, tmp_path, *argv) == 0
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[0] == '{"train_lo' and [json.loads(line)["epoch"] for line in lines[1:]] == [1, 2]


def test_a_terminal_gets_a_bar_and_no_lines(shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert train("detr", shapes, tmp_path, "--epochs", "1", "--print_freq", "1") == 0
    text = capsys.readouterr().out
    assert re.search(r"epoch 0: 100%.*3/3 \[.*<.*loss .* images/s", text) and "epoch 0 [" not in text


@pytest.mark.parametrize(
    "saved, asked",
    [
        ({"dilation": False}, "--no-dilation"),
        ({"pre_norm": True, "nheads": 8}, "--pre_norm"),
        ({"pre_norm": False, "num_query_pattern": 3}, "--num_query_pattern 3"),
        ({"spatial_prior": "grid", "attention_type": "RCDA"}, "--spatial_prior grid"),
    ],
)
def test_differing_model_flags_are_reported_as_command_line_flags(saved, asked):
    args = Namespace(
        encoder_attention="enact", dilation=True, pre_norm=False, num_query_pattern=1, spatial_prior="learned", nheads=8
    )
    with pytest.raises(UserError, match=f"x.pth: was trained .* Pass the flags of that run: {asked}; or use"):
        check_model_flags("x.pth", saved, args)
    args.pre_norm = True
    with pytest.raises(UserError, match="no --pre_norm; or use"):
        check_model_flags("x.pth", {"pre_norm": False}, args)
    # Flags that only one side has are ignored.
    check_model_flags("x.pth", {"num_feature_levels": 3, "num_query_position": None, "lr": 1}, args)


@pytest.mark.parametrize("word", [True, "True", "False"])
def test_dilation_in_anchor_detrs_checkpoints_is_always_true(tmp_path, word):
    torch.save({"model": {"a": torch.zeros(1)}, "args": Namespace(dilation=word)}, tmp_path / "anchor.pth")
    assert load_checkpoint(str(tmp_path / "anchor.pth"))["args"]["dilation"] is True


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path, state: path.write_bytes(b"PK not a checkpoint"), "truncated, or not a file of tensors"),
        (lambda path, state: path.write_text("junk\n"), "not a file of tensors but a text file"),
        (lambda path, state: path.write_bytes(torch_bytes(state)[:20000]), "truncated, or not a file of tensors"),
        (lambda path, state: torch.save({"state": 1}, path), "not a checkpoint .*the key 'model'"),
        (lambda path, state: torch.save([1], path), "not a checkpoint"),
        (lambda path, state: torch.save({"model": Path("x")}, path), "truncated, or not a file of tensors"),
        (lambda path, state: None, "no such file"),
        (lambda path, state: torch.save({**state, "variant": "other"}, path), "is a checkpoint of the variant other"),
        (
            lambda path, state: torch.save({**state, "args": {**state["args"], "nheads": 2}}, path),
            "Pass the flags of that run: --nheads 2",
        ),
        (
            lambda path, state: torch.save({"model": without(state["model"], "class_embed.bias")}, path),
            "1 tensors differ: class_embed.bias is missing",
        ),
        (
            lambda path, state: torch.save({"model": {**state["model"], "class_embed.bias": torch.zeros(92)}}, path),
            r"class_embed.bias is \(92,\), expected \(7,\)",
        ),
    ],
    ids=[
        "garbage",
        "text",
        "truncated",
        "no-weights",
        "list",
        "objects",
        "missing",
        "variant",
        "flags",
        "part",
        "classes",
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(shapes, trained, tmp_path, capsys, make, message):
    path = tmp_path / "bad.pth"
    make(path, load_checkpoint(str(trained / "checkpoint.pth")))
    assert train("detr", shapes, tmp_path / "out", "--resume", path, "--eval") == 2
    error = capsys.readouterr().err
    assert "bad.pth" in error and re.search(message, error)


def torch_bytes(state) -> bytes:
    """The bytes that `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def without(state, name):
    """A state dict without one tensor."""
    return {key: value for key, value in state.items() if key != name}


def test_a_second_run_does_not_overwrite_the_first(shapes, trained, capsys):
    before = (trained / "checkpoint.pth").read_bytes()
    assert train("detr", shapes, trained, "--epochs", "1") == 2
    assert "already holds a run; continue it with --resume" in capsys.readouterr().err
    assert (trained / "checkpoint.pth").read_bytes() == before


def test_a_resumed_run_evaluates_an_unevaluated_epoch(shapes, trained, tmp_path):
    shutil.copy(trained / "checkpoint.pth", tmp_path)
    first = (trained / "log.txt").read_text().splitlines()[0]
    (tmp_path / "log.txt").write_text(first + "\n")
    argv = ["--epochs", "2", "--dropout", "0.1", "--resume", tmp_path / "checkpoint.pth"]
    assert train("detr", shapes, tmp_path, *argv) == 0
    assert read_log(tmp_path) == read_log(trained)


def test_a_loss_that_is_not_finite_stops_the_run(shapes, tmp_path, capsys):
    assert train("detr", shapes, tmp_path, "--epochs", "1") == 0
    state = load_checkpoint(str(tmp_path / "checkpoint.pth"))
    # Use both signs, since ReLU turns minus infinity into 0.
    state["model"]["transformer.decoder.layers.1.linear1.weight"][:2, 0] = torch.tensor([math.inf, -math.inf])
    poisoned = tmp_path / "poisoned" / "checkpoint.pth"
    poisoned.parent.mkdir()
    torch.save(state, poisoned)
    before = poisoned.read_bytes()
    assert train("detr", shapes, poisoned.parent, "--epochs", "3", "--resume", poisoned, "--eval_every", "9") == 1
    error = capsys.readouterr().err
    assert "not finite at epoch 1, step 0, images" in error
    assert "parameter transformer.decoder.layers.1.linear1.weight" in error
    assert poisoned.read_bytes() == before
    # The unfinished epoch is not in the log.
    assert [row["epoch"] for row in read_log(poisoned.parent)] == [0]


class Diverging(torch.nn.Module):
    """A model whose second module overflows."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 1)
        self.second = torch.nn.Conv2d(4, 4, 1)
        self.third = torch.nn.ReLU()
        torch.nn.init.constant_(self.first.weight, 1e30)
        torch.nn.init.constant_(self.second.weight, 1e30)

    def forward(self, samples):
        return self.third(self.second(self.first(samples.tensors)))


def test_the_first_module_with_a_non_finite_output_is_named():
    samples = nested_tensor_from_tensor_list([torch.ones(3, 4, 4)])
    targets = [{"image_id": torch.tensor([17]), "boxes": torch.zeros(0, 4)}]
    text = describe_non_finite(Diverging(), samples, targets, {}, "epoch 2, step 5", "none")
    assert "epoch 2, step 5, images 17" in text and "output of second (Conv2d)" in text


def test_bad_pixels_and_boxes_are_named_before_weights():
    good = nested_tensor_from_tensor_list([torch.zeros(3, 4, 4)])
    bad = nested_tensor_from_tensor_list([torch.full((3, 4, 4), math.nan)])
    targets = [{"image_id": torch.tensor([1]), "boxes": torch.zeros(1, 4)}]
    assert "input images" in describe_non_finite(Diverging(), bad, targets, {}, "epoch 0, step 0", "none")
    stored = nested_tensor_from_tensor_list([torch.zeros(3, 4, 4, dtype=torch.uint8)])
    targets[0]["boxes"][0, 2] = math.inf
    assert "target boxes" in describe_non_finite(Diverging(), stored, targets, {}, "epoch 0, step 0", "none")
    assert "target boxes" in describe_non_finite(Diverging(), good, targets, {}, "epoch 0, step 0", "none")


def after_one_step(shapes, folder, *argv) -> dict:
    """The checkpoint after one step on four images."""
    # With frozen norms and no dropout, only the accumulation of gradients can differ.
    flags = ["--backbone_norm", "frozen", "--dropout", "0", "--epochs", "1", "--limit_train", "4", "--limit_val", "1"]
    assert train("detr", shapes, folder, *flags, "--no_augmentation", "--encoder_attention", "mhsa", *argv) == 0
    return load_checkpoint(str(folder / "checkpoint.pth"))


@pytest.fixture
def one_object_each(tmp_path):
    """Four images with one object each, so the mean over batches equals the mean over objects."""
    return make_shapes(tmp_path / "single", train=4, val=1, size=(64, 80), seed=5, objects=(1, 1))


@pytest.mark.parametrize("accumulate, batch", [(2, 2), (4, 1)])
def test_accumulated_batches_make_the_same_step(one_object_each, tmp_path, accumulate, batch):
    whole = after_one_step(one_object_each, tmp_path / "whole")
    argv = ["--accumulate", str(accumulate), "--batch_size", str(batch)]
    parts = after_one_step(one_object_each, tmp_path / "parts", *argv)
    # Adam's first moment after one step is a tenth of the gradient; the weights do not show the gradient's size.
    for i, entry in whole["optimizer"]["state"].items():
        ours = parts["optimizer"]["state"][i]
        assert entry["step"] == ours["step"] == 1
        torch.testing.assert_close(ours["exp_avg"], entry["exp_avg"], rtol=1e-3, atol=1e-7)


def test_a_smaller_last_group_of_accumulated_batches_makes_a_step(shapes, tmp_path):
    argv = ["--epochs", "1", "--limit_train", "12", "--limit_val", "1", "--accumulate", "2"]
    assert train("detr", shapes, tmp_path, *argv) == 0  # three batches: a group of two, and one
    state = load_checkpoint(str(tmp_path / "checkpoint.pth"))["optimizer"]["state"]
    assert {int(entry["step"]) for entry in state.values()} == {2}


def test_bf16_trains_like_float32(shapes, trained, tmp_path):
    assert train("detr", shapes, tmp_path, "--epochs", "2", "--dropout", "0.1", "--amp", "bf16") == 0
    for ours, theirs in zip(read_log(tmp_path), read_log(trained), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.1)


def launch(processes: int, shapes, output, *argv) -> str:
    """Train the small model in several processes; return the output of the first."""
    running = start(processes, "detr", shapes, output, *argv)
    said, complaints = zip(*(process.communicate() for process in running), strict=True)
    assert [process.returncode for process in running] == [0] * processes, complaints
    assert not any(said[1:])
    return said[0]


def test_two_processes_make_the_same_step_as_one(one_object_each, tmp_path):
    alone = after_one_step(one_object_each, tmp_path / "one")
    flags = ["--backbone_norm", "frozen", "--dropout", "0", "--epochs", "1", "--limit_val", "1", "--no_augmentation"]
    flags += ["--encoder_attention", "mhsa", "--batch_size", "2"]
    text = launch(2, one_object_each, tmp_path / "two", *flags)
    assert text.count("effective batch    4 = 2 images x 1 accumulated x 2 processes") == 1
    together = load_checkpoint(str(tmp_path / "two" / "checkpoint.pth"))
    for i, entry in alone["optimizer"]["state"].items():
        ours = together["optimizer"]["state"][i]
        torch.testing.assert_close(ours["exp_avg"], entry["exp_avg"], rtol=1e-3, atol=1e-7)
    assert len(together["random_states"]) == 2
    # Both resume together, even if the first epoch is not logged.
    (tmp_path / "two" / "log.txt").unlink()
    launch(2, one_object_each, tmp_path / "two", *flags, "--epochs", "2", "--auto_resume", "--cache_mode")
    assert [row["epoch"] for row in read_log(tmp_path / "two")] == [0, 1]


def test_every_main_runs_from_anywhere_without_the_package(tmp_path):
    # In a checkout with only the dependencies installed, the script itself must find enact_common.
    scripts = [str(ROOT / folder / "main.py") for folder, *_ in VARIANTS.values()]
    code = f"""
import runpy, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
path = [p for p in sys.path if p not in ("", {str(ROOT)!r})]
for script in {scripts}:
    # Forget the modules of the previous script.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("enact_common", "models", "datasets")]:
        del sys.modules[name]
    sys.argv, sys.path = ["main.py", "--help"], [script.removesuffix("main.py"), *path]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("status", end.code)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\nstatus 0\n") == len(scripts) == result.stdout.count("[--encoder_attention ")
    for own in ("DETR with ENACT", "Conditional DETR", "Anchor DETR"):
        assert own in result.stdout


def test_overfitting_one_image_drives_the_loss_down(variant_and_attention, shapes, capsys):
    variant, attention = variant_and_attention
    argv = ["--encoder_attention", attention, "--limit_train", "1", "--batch_size", "1", "--limit_val", "1"]
    argv += ["--no_augmentation", "--epochs", "40", "--eval_every", "40", "--dropout", "0"]
    # No output folder, since writing slows the epochs down.
    assert train(variant, shapes, "", *argv, "--backbone_norm", "frozen", "--lr", "3e-3") == 0
    losses = [float(loss) for loss in re.findall(r"epoch \d+ \[1/1\]  loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 40 and losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    "schedule, epoch, step, expected",
    [
        ("step", 0, 0, 1 / 6),  # warm-up over five steps
        ("step", 0, 4, 5 / 6),
        ("step", 0, 5, 1),
        ("step", 1, 19, 1),
        ("step", 2, 20, 0.1),
        ("step", 4, 45, 0.01),
        ("cosine", 0, 5, 1),
        ("cosine", 5, 55, 0.5),
        ("cosine", 10, 105, 0),
    ],
)
def test_learning_rate_factor(schedule, epoch, step, expected):
    factor = learning_rate_factor(schedule, step, epoch, total_steps=105, lr_drop=2, warmup_steps=5)
    assert factor == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("epoch, expected", [(0, 1), (2, 1), (3, 0.1), (6, 0.1), (7, 0.01), (99, 0.01)])
def test_learning_rate_factor_with_drop_epochs(epoch, expected):
    factor = learning_rate_factor("step", 50, epoch, 105, lr_drop=2, warmup_steps=0, drop_epochs=[7, 3])
    assert factor == pytest.approx(expected, abs=1e-9)


def test_average_meter():
    meter = AverageMeter()
    assert meter.averages() == meter.synchronized() == {}
    meter.update({"a": torch.tensor(1.0), "b": torch.tensor(4.0)})
    meter.update({"a": torch.tensor(2.0), "b": torch.tensor(0.0)})
    assert meter.averages() == meter.synchronized() == {"a": 1.5, "b": 2.0}


class ToyCriterion(torch.nn.Module):
    """A criterion whose loss is a function of the model's output."""

    weight_dict = {"loss_toy": 1}

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, outputs, targets):
        return {"loss_toy": self.function(outputs)}

    def total(self, losses):
        return losses["loss_toy"]


class ToyModel(torch.nn.Module):
    """A model with one parameter, multiplied by the mean of the images."""

    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, samples):
        return self.number * samples.tensors.mean()


class PackingToyModel(ToyModel):
    """Counts its calls. Within `packed_windows`, batches of zeros have too many windows, and wrong results."""

    calls = 0

    def forward(self, samples):
        self.calls += 1
        too_many = is_packing() and not samples.tensors.any()
        if is_packing():
            note_overflow(torch.tensor(int(too_many), dtype=torch.int32))
        return super().forward(samples) + self.number * (7 if too_many else 1)


def toy_batch(value: float):
    """A batch of one constant image without objects."""
    target = {"image_id": torch.tensor([7]), "labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    return nested_tensor_from_tensor_list([torch.full((3, 4, 4), value)]), [target]


def toy_step(function, clip_max_norm=0.1, kind=torch.optim.AdamW, fp16=False, toy=ToyModel):
    """A training step of the toy model; `fp16` turns the gradient scaler on, but computes in float32."""
    model, device = toy(), torch.device("cpu")
    optimizer = kind(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    optimization = Optimization(optimizer, lambda *place: None, "none", scaler, clip_max_norm, 1)
    return TrainStep(model, ToyCriterion(function), optimization, device)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_a_step_that_is_not_finite_changes_nothing(kind, clip):
    step = toy_step(lambda output: output**2, clip, kind)
    step(*toy_batch(1.0), "step 0")
    number = step.model.number.item()
    assert number < 2
    step(*toy_batch(math.inf), "step 1")
    assert step.model.number.item() == number
    # The next step raises the error before it changes anything.
    with pytest.raises(NonFiniteLossError, match="not finite at step 1, images 7; first tensor at fault: input images"):
        step(*toy_batch(1.0), "step 2")
    assert step.model.number.item() == number
    # The optimizer did not count the bad step. SGD without momentum has no state.
    assert [state["step"] for state in step.optimization.optimizer.state.values() if state] in ([], [1])


def test_a_batch_with_too_many_packed_windows_is_run_again(monkeypatch, caplog):
    numbers, calls = [], []
    for packs in (True, False):
        monkeypatch.setattr(engine, "packs_windows", lambda model, packs=packs: packs)
        step = toy_step(lambda output: output**2, 0.0, torch.optim.SGD, toy=PackingToyModel)
        for i, value in enumerate((1.0, 0.0, 1.0, 0.0)):
            step(*toy_batch(value), f"step {i}", 2, complete=i % 2 == 1)
        step.check()
        numbers.append(step.model.number.item())
        calls.append(step.model.calls)
    assert numbers[0] == numbers[1] < 2 and calls == [6, 4]
    assert len(caplog.records) == 1 and "too many windows" in caplog.text


def test_check_reports_a_fault_of_the_last_step():
    step = toy_step(lambda output: output**2)
    step(*toy_batch(math.nan), "step 0")
    with pytest.raises(NonFiniteLossError, match="step 0"):
        step.check()
    step.check()


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_gradients_that_are_not_finite_are_found_despite_a_finite_loss(clip):
    step = toy_step(lambda output: output.sub(2).abs().sqrt(), clip)
    step(*toy_batch(1.0), "step 0")
    assert step.model.number.item() == 2
    with pytest.raises(NonFiniteLossError, match="first tensor at fault: the gradients"):
        step.check()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_fp16_recovers_from_an_overflow(kind, clip):
    # In half precision, a gradient of 2 overflows when scaled by 2^16 or 2^15, but not by 2^14.
    step = toy_step(lambda output: (output.half() * 2).float(), clip, kind, fp16=True)
    scaler, number = step.optimization.scaler, step.model.number.item()
    for attempt, scale in enumerate((2.0**15, 2.0**14)):
        assert step.model.number.item() == number
        step(*toy_batch(1.0), f"step {attempt}")
        assert scaler.get_scale() == scale
    step(*toy_batch(1.0), "step 2")
    step.check()
    assert scaler.get_scale() == 2.0**14 and step.model.number.item() < number
    assert [int(state["step"]) for state in step.optimization.optimizer.state.values() if "step" in state] in ([], [1])


def test_fp16_stops_if_no_scale_helps():
    step = toy_step(lambda output: output.sub(2).abs().sqrt(), fp16=True)
    with pytest.raises(NonFiniteLossError, match="not finite at step 29, images 7; first tensor at fault: the grad"):
        for attempt in range(40):
            step(*toy_batch(1.0), f"step {attempt}")
    assert step.model.number.item() == 2


def test_fp16_stops_at_a_loss_that_is_not_finite():
    step = toy_step(lambda output: output**2, fp16=True)
    step(*toy_batch(math.inf), "step 0")
    with pytest.raises(NonFiniteLossError, match="step 0, images 7; first tensor at fault: input images"):
        step.check()
    assert step.model.number.item() == 2


def test_a_step_waits_for_the_device_once(variant_and_attention, monkeypatch):
    variant, attention = variant_and_attention
    flags = [*SMALL_MODEL[variant], "--encoder_attention", attention, "--enc_layers", "3", "--num_classes", "5"]
    model, criterion, _ = build(variant, *flags)
    device = torch.device("cpu")
    step = TrainStep(model.train(), criterion, build_optimization(model, parse(variant, *flags), device), device)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((64, 72), (60, 80))]
    boxes = [torch.tensor([[0.5, 0.5, 0.2, 0.3]]), torch.zeros(0, 4)]
    labels = [torch.tensor([3]), torch.zeros(0, dtype=torch.int64)]
    targets = [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]
    batch = nested_tensor_from_tensor_list(images), targets
    step(*batch)
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            # The result of the previous step is already in host memory.
            if self is not step._votes:
                reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    step(*batch)
    # ENACT's window lengths (item) and the matching costs (cpu, then numpy on the host).
    assert reads == ["item"] * (3 if attention == "enact" else 0) + ["cpu", "numpy"]


@pytest.mark.parametrize("sgd", [False, True])
def test_the_state_of_an_optimizer_that_is_not_fused_can_be_resumed(sgd):
    """The originals' optimizers are not fused, and save contiguous moments for our channels-last parameters."""
    flags = [*SMALL_MODEL["detr"], "--weight_decay", "0", *(["--sgd"] if sgd else [])]
    model = build("detr", *flags)[0].to(memory_format=torch.channels_last)
    args, device = parse("detr", *flags), torch.device("cpu")
    groups = [{name: group[name] for name in ("params", "lr")} for group in parameter_groups(model, args.lr, 1e-4)]
    kind, more = (torch.optim.SGD, {"momentum": 0.9}) if sgd else (torch.optim.AdamW, {})
    theirs = kind(groups, weight_decay=0, **more)
    gradients = [[torch.randn_like(p) for p in model.parameters() if p.requires_grad] for _ in range(2)]

    def step(optimizer, values):
        for parameter, value in zip((p for p in model.parameters() if p.requires_grad), values, strict=True):
            parameter.grad = value
        optimizer.step()

    step(theirs, gradients[0])
    state = theirs.state_dict()
    for entry in state["state"].values():
        entry.update({name: value.contiguous() for name, value in entry.items() if torch.is_tensor(value)})
    before = copy.deepcopy(model.state_dict())
    # Our parameters are in the order of the state dict, so the numbers need no translation.
    saved = {"optimizer": copy.deepcopy(state), "model": before}
    step(theirs, gradients[1])
    expected = copy.deepcopy(model.state_dict())

    model.load_state_dict(before)
    ours = build_optimization(model, args, device).optimizer
    ours.load_state_dict(optimizer_state_by_name(saved, model, ours))
    assert all(group["fused"] for group in ours.param_groups)
    ours.found_inf = torch.zeros(())
    step(ours, gradients[1])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_a_skipped_first_step_of_sgd_leaves_no_momentum():
    args = parse("detr", *SMALL_MODEL["detr"], "--sgd")
    model = torch.nn.Sequential()
    model.backbone = torch.nn.Linear(64, 64)
    optimizer = build_optimization(model, args, torch.device("cpu")).optimizer
    model.backbone.weight.grad = torch.full((64, 64), math.inf)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(not entry["momentum_buffer"].any() for entry in optimizer.state.values())


def test_faults_inside_modules_that_return_dicts_are_found():
    model = build("detr", *SMALL_MODEL["detr"], "--backbone_norm", "frozen")[0]
    conv = model.backbone[0].body["layer2"][0].conv1
    with torch.no_grad():
        conv.weight.fill_(3e38)
    samples = nested_tensor_from_tensor_list([torch.randint(256, (3, 64, 64), dtype=torch.uint8)])
    found = first_non_finite_output(model, samples)
    assert found.startswith("output of backbone.0.body.layer2.0 ")
