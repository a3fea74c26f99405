"""Runs that are told to stop, killed, or out of disk, and go on: nothing is lost, and nothing changes by it."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import equal_states, read_log, start, train

from enact_common.checkpoint import load_checkpoint, save_checkpoint
from enact_common.errors import UserError
from enact_common.run import Run
from enact_common.stopping import SIGNALS, STOPPED, listening, stop_requested

# Twelve images, one at a time: twelve batches and six steps an epoch, with all that a checkpoint has to remember.
STEPS = "--batch_size 1 --accumulate 2 --epochs 2 --dropout 0.1 --ema 0.9 --print_freq 1 --limit_val 2".split()


def wait_for_line(process: subprocess.Popen, beginning: str) -> None:
    """Read what a process says until a line begins like this."""
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"the process ended without saying {beginning!r}")


def end(processes: list[subprocess.Popen]) -> list[int]:
    """The processes' exit statuses, once they have ended and all that they say is read."""
    for process in processes:
        process.said, process.complained = process.communicate(timeout=300)
    return [process.returncode for process in processes]


def assert_same_training(ours: Path, theirs: Path) -> None:
    """Two folders hold trainings that are equal to the last bit."""
    first, second = (load_checkpoint(str(folder / "checkpoint.pth")) for folder in (ours, theirs))
    for key in ("model", "model_ema", "optimizer", "scaler", "epoch", "random_states", "train_stats"):
        assert equal_states(first[key], second[key]), key
    assert "within_epoch" not in first
    assert read_log(ours) == read_log(theirs)


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "two processes"])
def uninterrupted(request, shapes, tmp_path_factory):
    """How many processes, and the folder of their training."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    statuses = end(start(request.param, "detr", shapes, output, *STEPS))
    assert statuses == [0] * request.param
    return request.param, output


@pytest.mark.parametrize(
    "number, workers", [(signal.SIGTERM, "2"), (signal.SIGUSR1, "0")], ids=["SIGTERM to all", "SIGUSR1 to one"]
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(uninterrupted, shapes, tmp_path, number, workers):
    count, theirs = uninterrupted
    argv = [*STEPS, "--num_workers", workers, "--auto_resume"]
    processes = start(count, "detr", shapes, tmp_path, *argv)
    wait_for_line(processes[0], "epoch 0 [ 3/12]" if count == 1 else "epoch 0 [2/6]")
    if number == signal.SIGTERM:
        # As schedulers do it: to everything, the loaders' processes included.
        for process in processes:
            os.killpg(process.pid, number)
    else:
        # To one process, not the main one: all stop in the same step.
        processes[-1].send_signal(number)
    assert end(processes) == [STOPPED] * count
    assert f"{number.name} came; in epoch 0, after " in processes[0].complained
    assert "Traceback" not in "".join(process.complained for process in processes)
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert state["epoch"] == -1 and 0 < state["within_epoch"]["images"] < 12
    assert state["within_epoch"]["images"] % (2 * count) == 0  # whole steps
    assert not (tmp_path / "log.txt").exists()

    assert end(start(count, "detr", shapes, tmp_path, *argv)) == [0] * count
    assert_same_training(tmp_path, theirs)


def test_kills_at_any_moment_leave_a_checkpoint_that_goes_on(uninterrupted, shapes, tmp_path):
    count, theirs = uninterrupted
    argv = [*STEPS, "--auto_resume", "--save_every_steps", "1"]
    latest, partial = tmp_path / "checkpoint.pth", tmp_path / "checkpoint.pth.partial"
    during_saves = 0
    for kills in range(4):
        before = latest.stat().st_mtime_ns if latest.exists() else 0
        processes = start(count, "detr", shapes, tmp_path, *argv)
        # Killed once it has come further: in every other try right in the middle of a save.
        while processes[0].poll() is None:
            moved = latest.exists() and latest.stat().st_mtime_ns > before
            if moved and (kills % 2 == 0 or partial.exists()):
                break
            time.sleep(0.001)
        for process in processes:
            process.kill()
        statuses = end(processes)
        during_saves += partial.exists()
        torch.load(latest, weights_only=True)
        if statuses == [0] * count or kills == 3:
            break
    assert during_saves
    assert end(start(count, "detr", shapes, tmp_path, *argv)) == [0] * count
    assert_same_training(tmp_path, theirs)
    assert not partial.exists()


def test_torchrun_passes_the_signal_on(shapes, tmp_path):
    argv = [*STEPS, "--auto_resume", "--epochs", "30"]
    (process,) = start(2, "detr", shapes, tmp_path, *argv, torchrun=True)
    wait_for_line(process, "epoch 0 [2/6]")
    process.send_signal(signal.SIGTERM)
    (status,) = end([process])
    # It has a status of its own, but waits for the processes.
    assert status != 0 and "SIGTERM came; in epoch" in process.complained
    assert "images" in torch.load(tmp_path / "checkpoint.pth", weights_only=True)["within_epoch"]


def test_the_place_in_the_epoch_survives_another_number_of_processes(shapes, tmp_path, capsys):
    argv = [*STEPS, "--auto_resume"]
    (process,) = start(1, "detr", shapes, tmp_path, *argv)
    wait_for_line(process, "epoch 0 [ 5/12]")
    process.send_signal(signal.SIGTERM)
    assert end([process]) == [STOPPED]
    done = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["within_epoch"]["images"]
    processes = start(2, "detr", shapes, tmp_path, *argv)
    assert end(processes) == [0, 0]
    said = processes[0].said
    assert "note: the epoch was begun with batches of 1 images in 1 processes, now they are of 2 in 2" in said
    assert f"epoch 0 [{done // 4 * 2 + 1}/6]" in said and f"epoch 0 [{done // 4 * 2}/6]" not in said
    assert [row["epoch"] for row in read_log(tmp_path)] == [0, 1]


def test_a_signal_in_an_evaluation_leaves_the_epoch_to_be_evaluated(shapes, tmp_path, monkeypatch, capsys):
    argv = ["--epochs", "1", "--auto_resume"]
    original = torch.nn.Module.eval
    with monkeypatch.context() as patch:
        # Evaluations begin with it.
        patch.setattr(torch.nn.Module, "eval", lambda self: os.kill(os.getpid(), signal.SIGTERM) or original(self))
        assert train("detr", shapes, tmp_path, *argv) == STOPPED
    assert "SIGTERM came; in the evaluation of epoch 0" in capsys.readouterr().err
    assert not (tmp_path / "log.txt").exists()
    assert train("detr", shapes, tmp_path, *argv) == 0
    assert [len(row["test_coco_eval_bbox"]) for row in read_log(tmp_path)] == [12]


def test_signals_do_what_they_did_before_and_after():
    told = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
    try:
        with listening():
            assert stop_requested() is None
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            # The first counts.
            assert stop_requested() == signal.SIGUSR1 and told == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert told == [signal.SIGUSR1]
        with listening():
            assert stop_requested() is None
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert signal.SIGTERM in SIGNALS and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ctrl_c_ends_without_a_traceback(shapes, tmp_path):
    # What a process ignores, those that it starts ignore: the tests may run in the background of a script.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        (process,) = start(1, "detr", shapes, tmp_path, *STEPS, "--epochs", "50", "--num_workers", "1")
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for_line(process, "epoch 1 [ 2/12]")
    os.killpg(process.pid, signal.SIGINT)
    assert end([process]) == [130]
    assert process.complained.splitlines()[-1] == "main.py: interrupted; what was saved before is whole"
    # A loader's process that was passing a batch on may complain, in a thread of Python's own, that nobody takes it.
    assert "KeyboardInterrupt" not in process.complained
    assert "Traceback" not in process.complained or "ConnectionResetError" in process.complained
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 0


# What a process that is started runs first: as it ends, it writes the names of its threads.
TELL_THREADS = """
import atexit, os, time
from pathlib import Path

def names():
    for task in os.listdir("/proc/self/task"):
        try:
            yield Path(f"/proc/self/task/{task}/comm").read_text()
        except OSError:
            # It ended just now.
            pass

def tell():
    # The system lists threads for a moment longer than they run.
    deadline = time.monotonic() + 2
    while any("gloo" in name for name in names()) and time.monotonic() < deadline:
        time.sleep(0.01)
    Path(__file__).with_name(f"threads_{os.getpid()}").write_text("".join(names()))

atexit.register(tell)
"""


@pytest.fixture
def threads_at_the_end(tmp_path_factory, monkeypatch):
    """From a started process to the names of the threads that it had as Python ended."""
    folder = tmp_path_factory.mktemp("threads")
    (folder / "sitecustomize.py").write_text(TELL_THREADS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
    return lambda process: (folder / f"threads_{process.pid}").read_text().split()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_said_and_the_old_checkpoint_stays(shapes, tmp_path, threads_at_the_end, processes):
    assert train("detr", shapes, tmp_path, "--epochs", "1", "--limit_val", "1") == 0
    latest = tmp_path / "checkpoint.pth"
    before = latest.read_bytes()
    # What is written beside it goes to a device that is full.
    (tmp_path / "checkpoint.pth.partial").symlink_to("/dev/full")
    argv = ["--epochs", "3", "--limit_val", "1", "--auto_resume", "--batch_size", str(4 // processes)]
    running = start(processes, "detr", shapes, tmp_path, *argv)
    assert end(running) == [2] * processes
    complaints = "".join(process.complained for process in running)
    assert complaints.count(f"{latest}: cannot be written (No space left on device); what it held before") == 1
    assert "Traceback" not in complaints and latest.read_bytes() == before
    # A thread of the process group that is still there may abort the process.
    assert not [name for process in running for name in threads_at_the_end(process) if "gloo" in name]
    # With room again, it goes on.
    assert train("detr", shapes, tmp_path, *argv[:-2], "--epochs", "2") == 0
    assert [row["epoch"] for row in read_log(tmp_path)] == [0, 1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_full_disk_is_said_by_the_log_too(shapes, tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    assert train("detr", shapes, tmp_path, "--epochs", "1", "--limit_val", "1") == 2
    assert f"error: {tmp_path / 'log.txt'}: cannot be written (No space left on device)" in capsys.readouterr().err
    # The epoch is not lost.
    (tmp_path / "log.txt").unlink()
    assert train("detr", shapes, tmp_path, "--epochs", "1", "--limit_val", "1", "--auto_resume") == 0
    assert [row["epoch"] for row in read_log(tmp_path)] == [0]


def test_a_file_that_cannot_be_replaced_is_said(tmp_path):
    (tmp_path / "checkpoint.pth.partial").mkdir()
    with pytest.raises(UserError, match="checkpoint.pth: cannot be written .*choose another --output_dir"):
        save_checkpoint(tmp_path / "checkpoint.pth", {})


@pytest.mark.parametrize(
    "argv, kept",
    [
        (["--save_every", "2"], [1, 3]),
        (["--save_every", "1", "--keep", "2"], [3, 4]),
        (["--lr_drop_epochs", "1", "3", "--keep", "1"], [2]),
        ([], []),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_which_checkpoints_stay(shapes, tmp_path, argv, kept):
    (tmp_path / "checkpoint_of_mine.pth").write_bytes(b"not numbered")
    few = ["--epochs", "5", "--limit_train", "4", "--limit_val", "1", "--eval_every", "9"]
    assert train("detr", shapes, tmp_path, *few, *argv) == 0
    names = {path.name for path in tmp_path.glob("*.pth")}
    always = {"checkpoint.pth", "best.pth", "checkpoint_of_mine.pth"}
    assert names == always | {f"checkpoint{epoch:04}.pth" for epoch in kept}
    for epoch in kept:
        assert torch.load(tmp_path / f"checkpoint{epoch:04}.pth", weights_only=True)["epoch"] == epoch


def test_the_best_checkpoint_is_that_of_the_highest_precision(shapes, tmp_path, monkeypatch):
    figures = iter([0.2, 0.5, 0.3])
    original = Run.report

    def report(self, *args, **kwargs):
        original(self, *args, **kwargs)
        return {"test_coco_eval_bbox": [next(figures)] * 12}

    monkeypatch.setattr(Run, "report", report)
    argv = ["--epochs", "3", "--limit_train", "4", "--limit_val", "1"]
    assert train("detr", shapes, tmp_path, *argv) == 0
    assert load_checkpoint(str(tmp_path / "best.pth"))["epoch"] == 1
