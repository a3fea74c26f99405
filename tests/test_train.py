"""Runs of the whole command line on small data: training, evaluation, resuming, and how a run can fail."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODEL, read_log, run

from enact_common.checkpoint import load_checkpoint, save_checkpoint
from enact_common.engine import describe_non_finite
from enact_common.logs import AverageMeter
from enact_common.nested_tensor import nested_tensor_from_tensor_list
from enact_common.run import learning_rate_factor
from enact_common.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[1]


def train(variant, shapes, output, *argv):
    """Train a small model of a variant on the shapes; the exit status."""
    return run(variant, "--coco_path", shapes, "--output_dir", output, *SMALL_MODEL, *argv)


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """The output folder of two epochs, uninterrupted."""
    output = tmp_path_factory.mktemp("trained") / "run"
    torch.manual_seed(0)
    assert train("detr", shapes, output, "--epochs", "2", "--dropout", "0.1") == 0
    return output


def test_train_then_evaluate(variant_and_attention, shapes, tmp_path, capsys):
    variant, attention = variant_and_attention
    argv = ["--encoder_attention", attention]
    assert train(variant, shapes, tmp_path, "--epochs", "1", *argv) == 0
    text = capsys.readouterr().out
    for said in (
        "train images       12 with",
        "effective batch    4 =",
        "classes            6 (circle",
        "epoch 0 [3/3]",
    ):
        assert said in text
    (epoch,) = read_log(tmp_path)
    # The original's keys.
    wanted = {"train_lr", "train_loss", "train_loss_ce", "train_loss_bbox_0", "train_class_error", "test_loss",
              "train_loss_giou_unscaled", "train_cardinality_error_unscaled", "epoch", "n_parameters"}  # fmt: skip
    assert wanted <= set(epoch) and len(epoch["test_coco_eval_bbox"]) == 12
    assert list((tmp_path / "tensorboard").iterdir())

    assert train(variant, shapes, tmp_path, "--resume", tmp_path / "checkpoint.pth", "--eval", *argv) == 0
    text = capsys.readouterr().out
    assert text.count("Average Precision") == 6 and "crescent" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 6 * 8  # images times queries
    assert {r["category_id"] for r in results} <= set(range(1, 7))
    # Evaluating again gives what the epoch's own evaluation gave.
    figure = f"{epoch['test_coco_eval_bbox'][0]:.3f}"
    assert f"area=   all | maxDets=100 ] = {figure}" in text


def equal_states(first, second) -> bool:
    """Whether two nested states hold the same tensors and values."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal_states(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal_states, first, second))
    return first == second


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_resumed_run_equals_the_uninterrupted_one(shapes, trained, tmp_path, workers):
    argv = ["--dropout", "0.1", "--num_workers", workers]
    assert train("detr", shapes, tmp_path, "--epochs", "1", *argv) == 0
    torch.manual_seed(99)
    assert train("detr", shapes, tmp_path, "--epochs", "2", "--resume", tmp_path / "checkpoint.pth", *argv) == 0
    ours, theirs = (load_checkpoint(str(folder / "checkpoint.pth")) for folder in (tmp_path, trained))
    for key in ("model", "optimizer", "scaler", "epoch", "random_states", "train_stats"):
        assert equal_states(ours[key], theirs[key]), key
    assert read_log(tmp_path) == read_log(trained)


def test_a_killed_run_goes_on_where_it_stopped(shapes, trained, tmp_path):
    command = [sys.executable, str(ROOT / "DETR-ENACT" / "main.py"), "--coco_path", str(shapes), "--output_dir",
               str(tmp_path), *SMALL_MODEL, "--epochs", "2", "--dropout", "0.1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint.pth").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (
        subprocess.run([*command, "--resume", str(tmp_path / "checkpoint.pth")], stdout=subprocess.DEVNULL).returncode
        == 0
    )
    # It was killed before it had evaluated the first epoch, or after: the log has both all the same.
    ours, theirs = read_log(tmp_path), read_log(trained)
    assert [row["epoch"] for row in ours] == [0, 1]
    for name, value in theirs[1].items():
        assert ours[1][name] == pytest.approx(value, rel=1e-5), name


def test_checkpoints_are_plain_and_whole(trained):
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
    with pytest.raises(OSError):
        save_checkpoint(path, {"model": {"a": torch.zeros(1)}})
    assert load_checkpoint(str(path))["model"]["a"].item() == 1
    assert list(tmp_path.iterdir()) == [path]


def test_numbered_checkpoints_before_the_rate_drops(shapes, tmp_path):
    assert train("detr", shapes, tmp_path, "--epochs", "2", "--lr_drop", "1", "--limit_val", "1") == 0
    assert {p.name for p in tmp_path.glob("*.pth")} == {"checkpoint.pth", "checkpoint0000.pth", "checkpoint0001.pth"}
    rates = [row["train_lr"] for row in read_log(tmp_path)]
    assert rates == pytest.approx([1e-3, 1e-4])


def test_evaluation_can_be_rarer_than_epochs(shapes, tmp_path):
    assert train("detr", shapes, tmp_path, "--epochs", "3", "--eval_every", "2", "--limit_val", "1") == 0
    assert ["test_coco_eval_bbox" in row for row in read_log(tmp_path)] == [False, True, True]


def test_original_checkpoints_load(shapes, trained, tmp_path):
    # The original keeps its arguments in a Namespace, and knows nothing of label maps.
    state = load_checkpoint(str(trained / "checkpoint.pth"))
    path = tmp_path / "original.pth"
    original_args = Namespace(hidden_dim=32, position_embedding="sine", lr=1e-4)
    torch.save(
        {"model": state["model"], "optimizer": {}, "lr_scheduler": {}, "epoch": 299, "args": original_args}, path
    )
    assert train("detr", shapes, "", "--resume", path, "--eval") == 0
    # Weights alone, as published: training starts from them.
    torch.save({"model": state["model"]}, path)
    assert train("detr", shapes, tmp_path / "tuned", "--resume", path, "--epochs", "1", "--limit_val", "1") == 0
    assert read_log(tmp_path / "tuned")[0]["epoch"] == 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path, state: path.write_bytes(b"PK not a checkpoint"), "truncated, or no checkpoint"),
        (lambda path, state: path.write_bytes(torch_bytes(state)[:20000]), "truncated, or no checkpoint"),
        (lambda path, state: torch.save(state["model"], path), "not a checkpoint .*the key 'model'"),
        (lambda path, state: torch.save([1], path), "not a checkpoint"),
        (lambda path, state: torch.save({"model": Path("x")}, path), "truncated, or no checkpoint"),
        (lambda path, state: None, "no such checkpoint file"),
        (lambda path, state: torch.save({**state, "variant": "other"}, path), "is a checkpoint of the variant other"),
        (
            lambda path, state: torch.save({**state, "args": {**state["args"], "nheads": 2}}, path),
            "--nheads was 2, is 4",
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
    ids=["garbage", "truncated", "weights", "list", "objects", "missing", "variant", "flags", "part", "classes"],
)
def test_checkpoints_that_do_not_fit_are_named(shapes, trained, tmp_path, capsys, make, message):
    path = tmp_path / "bad.pth"
    make(path, load_checkpoint(str(trained / "checkpoint.pth")))
    assert train("detr", shapes, tmp_path / "out", "--resume", path, "--eval") == 2
    error = capsys.readouterr().err
    assert "bad.pth" in error and re.search(message, error)


def torch_bytes(state) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def without(state, name):
    """A state dict without one tensor."""
    return {key: value for key, value in state.items() if key != name}


def test_a_second_run_does_not_overwrite_the_first(shapes, trained, capsys):
    before = (trained / "checkpoint.pth").read_bytes()
    assert train("detr", shapes, trained, "--epochs", "1") == 2
    assert "holds a run already; go on with --resume" in capsys.readouterr().err
    assert (trained / "checkpoint.pth").read_bytes() == before


def test_an_unevaluated_epoch_is_evaluated_on_resuming(shapes, trained, tmp_path):
    shutil.copy(trained / "checkpoint.pth", tmp_path)
    first = (trained / "log.txt").read_text().splitlines()[0]
    (tmp_path / "log.txt").write_text(first + "\n")
    argv = ["--epochs", "2", "--dropout", "0.1", "--resume", tmp_path / "checkpoint.pth"]
    assert train("detr", shapes, tmp_path, *argv) == 0
    assert read_log(tmp_path) == read_log(trained)


def test_a_loss_that_is_not_finite_stops_the_run(shapes, tmp_path, capsys):
    assert train("detr", shapes, tmp_path, "--epochs", "1") == 0
    good = (tmp_path / "checkpoint.pth").read_bytes()
    argv = ["--epochs", "3", "--resume", tmp_path / "checkpoint.pth"]
    state = load_checkpoint(str(tmp_path / "checkpoint.pth"))
    state["model"]["transformer.decoder.layers.1.linear1.weight"][0, 0] = math.inf
    poisoned = tmp_path / "poisoned" / "checkpoint.pth"
    poisoned.parent.mkdir()
    torch.save(state, poisoned)
    argv[-1] = poisoned
    assert train("detr", shapes, tmp_path / "poisoned", *argv) == 1
    error = capsys.readouterr().err
    assert "not finite at epoch 1, step 0, images" in error
    assert "parameter transformer.decoder.layers.1.linear1.weight" in error
    assert poisoned.read_bytes() != good and load_checkpoint(str(poisoned))["epoch"] == 0


class Diverging(torch.nn.Module):
    """Overflows in its second module."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 1)
        self.second = torch.nn.Conv2d(4, 4, 1)
        self.third = torch.nn.ReLU()
        torch.nn.init.constant_(self.first.weight, 1e30)
        torch.nn.init.constant_(self.second.weight, 1e30)

    def forward(self, samples):
        return self.third(self.second(self.first(samples.tensors)))


def test_the_first_module_at_fault_is_named():
    samples = nested_tensor_from_tensor_list([torch.ones(3, 4, 4)])
    targets = [{"image_id": torch.tensor([17]), "boxes": torch.zeros(0, 4)}]
    text = describe_non_finite(Diverging(), samples, targets, {}, epoch=2, step=5)
    assert "epoch 2, step 5, images 17" in text and "output of second (Conv2d)" in text


def test_bad_pixels_and_boxes_are_named_before_weights():
    good = nested_tensor_from_tensor_list([torch.zeros(3, 4, 4)])
    bad = nested_tensor_from_tensor_list([torch.full((3, 4, 4), math.nan)])
    targets = [{"image_id": torch.tensor([1]), "boxes": torch.zeros(1, 4)}]
    assert "input images" in describe_non_finite(Diverging(), bad, targets, {}, 0, 0)
    targets[0]["boxes"][0, 2] = math.inf
    assert "target boxes" in describe_non_finite(Diverging(), good, targets, {}, 0, 0)


@pytest.mark.parametrize("accumulate, batch", [(1, 4), (2, 2), (4, 1)])
def test_accumulated_batches_make_the_same_step(shapes, tmp_path, accumulate, batch):
    # Without batch norm (frozen) and with one image's objects each, the mean of gradients is what differs by
    # grouping of objects only; the number of optimizer steps is the same.
    argv = ["--backbone_norm", "frozen", "--epochs", "1", "--limit_train", "8", "--limit_val", "1"]
    argv += ["--accumulate", str(accumulate), "--batch_size", str(batch)]
    assert train("detr", shapes, tmp_path, *argv) == 0
    state = load_checkpoint(str(tmp_path / "checkpoint.pth"))["optimizer"]["state"]
    assert {int(entry["step"]) for entry in state.values()} == {2}


def test_a_last_group_that_is_smaller_still_steps(shapes, tmp_path):
    argv = ["--epochs", "1", "--limit_train", "12", "--limit_val", "1", "--accumulate", "2"]
    assert train("detr", shapes, tmp_path, *argv) == 0  # three batches: a group of two, and one
    state = load_checkpoint(str(tmp_path / "checkpoint.pth"))["optimizer"]["state"]
    assert {int(entry["step"]) for entry in state.values()} == {2}


def test_bf16_trains_like_float32(shapes, trained, tmp_path):
    assert train("detr", shapes, tmp_path, "--epochs", "2", "--dropout", "0.1", "--amp", "bf16") == 0
    for ours, theirs in zip(read_log(tmp_path), read_log(trained), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.1)


def test_two_processes_train_and_evaluate_as_one(shapes, tmp_path):
    def launch(output, *argv):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   str(ROOT / "DETR-ENACT" / "main.py"), "--coco_path", str(shapes), "--output_dir", str(output),
                   *SMALL_MODEL, "--limit_val", "5", *argv]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        return result.stdout

    text = launch(tmp_path, "--epochs", "1", "--batch_size", "2", "--backbone_norm", "batch")
    assert text.count("effective batch    4 = 2 images x 1 accumulated x 2 processes") == 1
    (epoch,) = read_log(tmp_path)
    # One process evaluates the same five images, none of them twice.
    assert train("detr", shapes, tmp_path, "--limit_val", "5", "--resume", tmp_path / "checkpoint.pth", "--eval") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 5 * 8
    launch(tmp_path / "two", "--resume", tmp_path / "checkpoint.pth", "--eval")
    both = json.loads((tmp_path / "two" / "results.json").read_text())
    for ours, theirs in zip(results, both, strict=True):
        assert ours["image_id"] == theirs["image_id"]
    assert len(epoch["test_coco_eval_bbox"]) == 12


@pytest.mark.parametrize("variant", VARIANTS)
def test_main_runs_from_anywhere_without_the_package(variant, shapes, tmp_path):
    # A checkout whose dependencies alone are installed: nothing but the script says where enact_common is.
    script = ROOT / VARIANTS[variant][0] / "main.py"
    code = (
        "import runpy, sys; sys.path = [p for p in sys.path if 'enact' not in p.lower()]; "
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        f"sys.argv = ['main.py', '--help']; sys.path.insert(0, {str(script.parent)!r}); "
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--encoder_attention" in result.stdout


def test_overfitting_one_image_drives_the_loss_down(variant_and_attention, shapes, tmp_path):
    variant, attention = variant_and_attention
    argv = ["--encoder_attention", attention, "--limit_train", "1", "--batch_size", "1", "--limit_val", "1"]
    argv += ["--no_augmentation", "--epochs", "30", "--dropout", "0", "--backbone_norm", "frozen"]
    assert train(variant, shapes, tmp_path, *argv) == 0
    losses = [row["train_loss"] for row in read_log(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]


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


def test_average_meter():
    meter = AverageMeter()
    assert meter.averages() == meter.synchronized() == {}
    meter.update({"a": torch.tensor(1.0), "b": torch.tensor(4.0)})
    meter.update({"a": torch.tensor(2.0), "b": torch.tensor(0.0)})
    assert meter.averages() == meter.synchronized() == {"a": 1.5, "b": 2.0}
