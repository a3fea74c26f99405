"""`--batch_size auto`: the search, the trial step, the images per step, and refusals. No GPU is needed."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ALL_STAGES, SMALL_MODEL, build, parse, read_log, train

from enact_common import UserError
from enact_common.training import auto_batch
from enact_common.training import run as run_module
from enact_common.training.auto_batch import fits, trial_step, worst_shape
from enact_common.training.setup import Network

CPU = torch.device("cpu")


@pytest.fixture
def memory(monkeypatch):
    """A pretended GPU with 1,000 bytes free, of which a step's peak is `memory["peak"]`."""
    state = {"peak": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(auto_batch, "peak_memory", lambda device: state["peak"])
    return state


@pytest.mark.parametrize("peak, fitting", [(100, True), (900, True), (901, False)])
def test_a_step_must_leave_a_margin(peak, fitting, memory):
    memory["peak"] = peak
    assert fits(lambda: None, CPU) is fitting


def test_a_step_without_enough_memory_does_not_fit_and_other_errors_are_raised(memory):
    def fail(error):
        raise error

    assert fits(lambda: fail(torch.cuda.OutOfMemoryError("out of memory")), CPU) is False
    with pytest.raises(RuntimeError, match="another"):
        fits(lambda: fail(RuntimeError("another")), CPU)


@pytest.mark.parametrize(
    "sizes, flags, shape",
    [
        ([(640, 480)], "--train_sizes 480 800 --max_size 1333", (1250, 1250)),  # crops may be 1.56 times as high
        ([(100, 800)], "--train_sizes 480 800 --max_size 1333", (1333, 1250)),
        ([(640, 480), (480, 480)], "--no_augmentation --eval_size 480 --max_size 1333", (480, 640)),
        ([(640, 480), (480, 640)], "--no_augmentation --eval_size 480 --max_size 1333", (640, 640)),
        ([(640, 480), (480, 640)], "--no_augmentation --eval_size 480 --max_size 500", (500, 500)),
        ([(float("inf"), float("inf"))], "--no_augmentation --eval_size 480 --max_size 1333", (1333, 1333)),
    ],
)
def test_the_worst_shape_of_a_batch(sizes, flags, shape):
    assert worst_shape(parse("detr", *flags.split()), sizes) == shape


@pytest.mark.parametrize(
    "variant, more", [("conditional", ()), ("detr", ("--masks", *ALL_STAGES)), ("detr", ("--sgd",))]
)
def test_a_trial_step_leaves_no_trace(variant, more):
    args, model, criterion, postprocessors = trial(variant, *more)
    network = Network(model, model, criterion, postprocessors, None, 0)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    trial_step(network, args, CPU, batch=2, shape=(64, 96), objects=3)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def trial(variant, *argv):
    """Arguments and a small model with trained batch norms, whose statistics a step changes."""
    words = [*SMALL_MODEL[variant], "--num_classes", "5", *argv]
    return parse(variant, *words), *build(variant, *words)


def test_without_objects_a_trial_step_works():
    args, model, criterion, postprocessors = trial("conditional")
    trial_step(Network(model, model, criterion, postprocessors, None, 0), args, CPU, 1, (64, 64), objects=0)


# A training, in which a pretended GPU decides what fits -------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Trial steps really run, on the CPU, and fit up to `gpu["batch"]` images; "tried" lists batches and shapes."""
    state = {"batch": 4, "tried": []}

    def fitting(step, device):
        step()
        return state["tried"][-1][0] <= state["batch"]

    def record(network, args, device, batch, shape, objects):
        state["tried"].append((batch, shape))

    monkeypatch.setattr(auto_batch, "fits", fitting)
    monkeypatch.setattr(auto_batch, "trial_step", record)
    monkeypatch.setattr(run_module, "check_auto_device", lambda args, device: None)
    return state


@pytest.mark.parametrize(
    "flags, batch, accumulate",
    [((), 4, 2), (("--effective_batch_size", "6"), 3, 2), (("--effective_batch_size", "4"), 4, 1)],
)
def test_the_images_per_step_stay(flags, batch, accumulate, gpu, shapes, tmp_path, capsys):
    argv = ["--batch_size", "auto", *flags, "--epochs", "1", "--limit_val", "2"]
    assert train("conditional", shapes, tmp_path, *argv) == 0
    text = capsys.readouterr().out
    assert f"--batch_size {batch} --accumulate {accumulate}, {batch * accumulate} images per step" in text
    assert f"{batch * accumulate} = {batch} images x {accumulate} accumulated" in text
    assert gpu["tried"] and all(shape == (96, 96) or n == 1 for n, shape in gpu["tried"])
    assert len(gpu["tried"]) == len(set(gpu["tried"])) <= 3
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (settings["batch_size"], settings["accumulate"]) == (batch, accumulate)
    assert settings["effective_batch_size"] is None
    # The written settings make the same training without measuring.
    assert train("conditional", shapes, tmp_path / "again", "--config", tmp_path / "config.yaml", "--epochs", "0") == 0


def test_the_found_batch_trains_as_the_same_number(gpu, shapes, tmp_path):
    argv = ["--epochs", "1", "--limit_val", "2"]
    assert train("conditional", shapes, tmp_path / "auto", *argv, "--batch_size", "auto") == 0
    assert train("conditional", shapes, tmp_path / "same", *argv, "--batch_size", "4", "--accumulate", "2") == 0
    losses = [read_log(tmp_path / name)[0]["train_loss"] for name in ("auto", "same")]
    assert losses[0] == losses[1]


def test_a_model_too_large_for_one_image_is_refused(gpu, shapes, tmp_path, capsys):
    gpu["batch"] = 0
    assert train("conditional", shapes, tmp_path / "out", "--batch_size", "auto") == 2
    assert "not even one image of 72 x 96 pixels fits" in capsys.readouterr().err
    assert gpu["tried"][-1] == (1, (72, 96))


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, said",
    [
        (("--batch_size", "auto"), "--batch_size auto measures a GPU's memory: pass a number with --device cpu"),
        (("--batch_size", "auto", "--accumulate", "2"), "pass --effective_batch_size N"),
        (("--batch_size", "auto", "--eval", "--resume", "x.pth"), "pass a number with --eval"),
        (("--batch_size", "auto", "--compile"), "pass a number with --compile"),
        (("--effective_batch_size", "8"), "--effective_batch_size needs --batch_size auto"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(argv, said, shapes, tmp_path, capsys):
    assert train("conditional", shapes, tmp_path / "out", *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not Path(tmp_path / "out").exists()


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(auto_batch, "get_world_size", lambda: 2)
    args = parse("detr", "--batch_size", "auto")
    with pytest.raises(UserError, match="works in a single process"):
        auto_batch.check_auto_device(args, torch.device("cuda"))


@pytest.mark.parametrize("value", ["0", "-1", "many", "Auto"])
def test_other_batch_sizes_are_refused(value, capsys):
    with pytest.raises(SystemExit):
        parse("detr", f"--batch_size={value}")
    assert "--batch_size" in capsys.readouterr().err
