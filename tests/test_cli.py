"""The command line: help, defaults, and errors with advice before any work starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALL_STAGES, SMALL_MODEL, parse, run
from processes import Forked

from enact_common import UserError, demo, load_detector, predict
from enact_common.attention.rivals import RIVALS
from enact_common.benchmark.__main__ import main as benchmark
from enact_common.cli.arguments import add_focal_flags, add_query_flags, common_parser
from enact_common.compare.__main__ import main as compare
from enact_common.study.__main__ import main as study
from enact_common.utils.device import find_device
from enact_common.variants import VARIANTS, load_variant

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_help_shows_every_flag_in_a_group_with_its_default(variant):
    parser = load_variant(variant).main.get_args_parser()
    text = " ".join(parser.format_help().split())
    for title in ("data:", "model:", "matching and losses:", "training:", "run:"):
        assert title in text
    assert [action.dest for action in parser.group("options")._group_actions] == ["help"]
    for action in parser._actions:
        assert action.help, action.option_strings
        switch = isinstance(action.default, bool) and action.nargs == 0
        if action.default not in (None, "", "==SUPPRESS==") and not switch:
            assert "default" in " ".join(parser._get_formatter()._expand_help(action).split()), action.option_strings


def test_the_default_learning_rate_depends_on_the_attention():
    assert parse("detr").lr == 5e-5
    assert {parse("detr", "--encoder_attention", name).lr for name in ("mhsa", *RIVALS)} == {1e-4}
    assert parse("detr", "--encoder_attention", "mhsa", "--lr", "5e-5").lr == 5e-5
    assert parse("detr", "--lr", "2e-4", "--encoder_attention", "mhsa").lr == 2e-4


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], None),
        (["--dilation"], True),
        (["--no-dilation"], False),
        *((["--dilation", word], True) for word in ("True", "true", "1", "yes")),
        *((["--dilation", word], False) for word in ("False", "false", "0", "no")),
        (["--dilation", "--no-dilation"], False),
        (["--no-dilation", "--dilation", "--eval"], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_dilation_can_be_switched_on_and_off(default, argv, expected):
    parser = common_parser("")
    assert parser.parse_args([]).dilation is False
    parser.set_defaults(dilation=default)
    assert parser.parse_args(argv).dilation is (default if expected is None else expected)


def test_cache_mode_is_off_encoded_or_decoded(capsys):
    modes = [parse("detr", *argv).cache_mode for argv in ([], ["--cache_mode"], ["--cache_mode", "decoded", "--eval"])]
    assert modes == [False, "encoded", "decoded"]
    assert parse("detr", "--cache_mode", "--eval").cache_mode == "encoded"
    with pytest.raises(SystemExit):
        parse("detr", "--cache_mode", "pixels")
    assert "--cache_mode: invalid choice: 'pixels'" in capsys.readouterr().err


def test_query_flags_exist_only_where_a_variant_adds_them(capsys):
    parser = common_parser("")
    assert not {"num_queries", "position_embedding", "pre_norm"} & set(vars(parser.parse_args([])))
    with pytest.raises(SystemExit):
        parser.parse_args(["--num_queries", "5"])
    add_query_flags(parser, num_queries=7)
    args = parser.parse_args(["--coco_path", "data", "--position_embedding", "learned", "--max_size", "1632"])
    assert args.num_queries == 7 and args.pre_norm is False
    with pytest.raises(UserError, match="needs 51: use sine, a smaller --max_size, or --no-dilation"):
        parser.check(args)
    assert "num_queries" in [action.dest for action in parser.group("model")._group_actions]


def test_focal_flags_change_the_matching_costs_default(capsys):
    parser = common_parser("")
    assert parser.parse_args([]).set_cost_class == 1
    add_focal_flags(parser)
    args = parser.parse_args([])
    assert (args.set_cost_class, args.cls_loss_coef, args.focal_alpha) == (2, 2, 0.25)
    assert parser.parse_args(["--focal_alpha", "1"]).focal_alpha == 1
    for value in ("-0.1", "1.1", "nan"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--focal_alpha", value])
        assert "--focal_alpha: must be a number from 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_accepts_the_demos_flags(variant):
    parser = load_variant(variant).main.get_args_parser()
    argv = ["--coco_path", "data", *demo.TRAINING, *demo.OWN[variant], "--dim_feedforward", "64"]
    args = parser.parse_args(argv)
    parser.check(args)
    assert args.dilation is False and args.dim_feedforward == 64


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--coco_path", "/nowhere/at/all"], "--coco_path /nowhere/at/all: no such folder"),
        (["--frozen_weights", "x.pth"], "--frozen_weights .* pass --masks too"),
        (["--masks", "--frozen_weights", "x.pth", "--pretrained", "y.pth"], "both set the initial weights"),
        (["--masks", *ALL_STAGES, "--frozen_weights", "/nowhere.pth"], "/nowhere.pth: no such file"),
        (["--dataset_file", "coco_panoptic"], "--coco_panoptic_path DIR go together"),
        (["--coco_panoptic_path", "/nowhere"], "go together"),
        (["--dataset_file", "coco_panoptic", "--coco_panoptic_path", "/nowhere"], "/nowhere: no such folder"),
        (["--dataset_file", "voc"], "--dataset_file voc"),
        (["--eval"], "--eval needs the checkpoint"),
        (["--hidden_dim", "30"], "--hidden_dim 30"),
        (["--max_size", "60"], "--max_size 60"),
        (["--smoothing_sigma", "0.2"], "--smoothing_sigma 0.2"),
        (["--dropout", "1"], "--dropout 1"),
        (["--amp", "fp16"], "--amp fp16 needs a GPU"),
        (["--lr_backbone", "0"], "--lr_backbone 0"),
        (["--set_cost_class", "0", "--set_cost_bbox", "0", "--set_cost_giou", "0"], "are all 0"),
        (["--position_embedding", "learned", "--max_size", "408"], "--position_embedding learned .* needs 51"),
        (["--world_size", "4"], "torchrun --nproc_per_node=4"),
        (["--num_classes", "3"], "--num_classes 3: .* at least 6 are needed; pass --num_classes 6, or leave"),
        (["--batch_size", "64"], "--batch_size 64: .* the 12 images"),
        (["--resume", "/nowhere.pth"], "/nowhere.pth: no such file"),
        (["--backbone_weights", "/nowhere.pth"], "--backbone_weights /nowhere.pth: no such file"),
        (["--auto_resume", "--output_dir", ""], "--auto_resume needs the folder .* pass --output_dir DIR"),
        (["--auto_resume", "--eval"], "--eval needs the checkpoint"),
        (["--eval_set", "test"], "--eval_set test: .* no annotations, .* pass --eval --resume CKPT"),
        (["--eval_set", "test", "--eval"], "--eval needs the checkpoint"),
        (["--eval_set", "test", "--eval", "--resume", "x.pth", "--output_dir", ""], "pass --output_dir DIR"),
        (["--lr_linear_proj_names", "query_embed", "moon"], "--lr_linear_proj_names moon: .* a name such as .*backb"),
        (["--lr_backbone_names", "neck"], "--lr_backbone_names neck: no parameter's name contains it; .*transformer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_name_the_flag_and_give_advice(shapes, tmp_path, capsys, argv, message):
    output = tmp_path / "out"
    assert run("detr", "--coco_path", shapes, "--output_dir", output, *SMALL_MODEL["detr"], "--epochs", "1", *argv) == 2
    error = capsys.readouterr().err
    assert re.search(message, error.replace("\n", " ")), error
    assert "Traceback" not in error
    # No training has started.
    assert not output.exists() or not list(output.iterdir())


def test_a_missing_coco_path_is_reported(capsys):
    assert run("detr", "--device", "cpu") == 2
    assert "--coco_path is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--batch_size", "0"],
        ["--lr", "-1"],
        ["--seed", "-1"],
        ["--accumulate", "0"],
        ["--epochs", "-1"],
        ["--backbone", "vgg"],
        ["--dilation", "maybe"],
        ["--dilation", "2"],
        ["--lr_drop_epochs", "3", "0"],
        ["--lr_linear_proj_mult", "-1"],
        ["--eval_set", "minival"],
        ["--token_budget", "-1"],
        ["--encoder_attention", "none"],
    ],
    ids=" ".join,
)
def test_values_out_of_range_are_refused_by_the_parser(argv, capsys):
    with pytest.raises(SystemExit):
        parse("detr", *argv)
    assert argv[0] in capsys.readouterr().err


@pytest.mark.slow
def test_the_exit_status_reaches_the_shell(tmp_path):
    script = str(ROOT / "DETR-ENACT" / "main.py")
    process = Forked([script, "--coco_path", str(tmp_path / "none"), "--device", "cpu"])
    _, error = process.communicate()
    assert process.returncode == 2 and "no such folder" in error and "Traceback" not in error


@pytest.mark.parametrize("buffered", [True, False])
def test_a_closed_output_pipe_ends_a_command_quietly(buffered, tmp_path):
    # This command starts in half a second, since it does not import PyTorch.
    command = [sys.executable, "-m", "enact_common.data.synthetic", "--output_dir", str(tmp_path), "--train", "1"]
    command += ["--val", "1"]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, env=environment)
    assert (result.returncode, result.stderr) == (141, "")


# Every command with --device: a function of (device, data set, output folder) that returns the exit status.
DEVICE_COMMANDS = {
    **{
        variant: lambda device, shapes, output, variant=variant: run(
            variant, "--coco_path", shapes, "--output_dir", output, "--device", device
        )
        for variant in VARIANTS
    },
    "predict": lambda device, shapes, output: predict.main(
        ["--checkpoint", "x.pth", "--output_dir", str(output), "--device", device, str(shapes / "val2017")]
    ),
    "compare": lambda device, shapes, output: compare(["run", "--output_dir", str(output), "--device", device]),
    "study": lambda device, shapes, output: study(["--preset", "cpu", "--output_dir", str(output), "--device", device]),
    **{
        f"benchmark {name}": lambda device, shapes, output, words=(name, *more): benchmark(
            [*(word or str(shapes) for word in words), "--device", device]
        )
        for name, *more in (
            ["table"], ["parts"], ["scaling"], ["masks"], ["rowcol"], ["pipeline", "--coco_path", None],
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "device", ["mps", "xpu", "hpu", "cuda", "cuda:7", "cuda:300", "cpu:1", "meta", "gpu", "0", "CPU"]
)
@pytest.mark.parametrize("command", [*DEVICE_COMMANDS, "load_detector", "find_device"])
def test_every_command_refuses_an_unavailable_device(command, device, shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "device_count", lambda: 0)
    output = tmp_path / "out"
    if command in DEVICE_COMMANDS:
        assert DEVICE_COMMANDS[command](device, shapes, output) == 2
        error = capsys.readouterr().err
    else:
        with pytest.raises(UserError) as raised:
            load_detector("x.pth", device) if command == "load_detector" else find_device(device)
        error = f"{raised.value}\n"
    missing, misspelt = "PyTorch sees no such device here; pass --device cpu", "not a device's name; use cuda, cuda:1"
    assert f"--device {device}: {misspelt if device in ('gpu', '0', 'CPU') else missing}" in error
    assert error.count("\n") == 1
    assert not output.exists()


def test_the_message_names_the_available_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.mps, "device_count", lambda: 0)
    assert find_device("cuda:1") == torch.device("cuda:1") and find_device("cuda") == torch.device("cuda")
    assert find_device("cpu:0") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda:2: .* here are cpu, cuda:0, cuda:1: pass one of these$"):
        find_device("cuda:2")
