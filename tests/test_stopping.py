"""Runs that are stopped, killed or out of disk space resume without a loss and with the same result."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import equal_states, read_log, start, train
from processes import Forked

from enact_common.benchmark.isolated import run_isolated
from enact_common.checkpoints.files import load_checkpoint, save_checkpoint
from enact_common.training import run
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import write_file
from enact_common.utils.signals import (
    ENDING,
    SIGNALS,
    STOPPED,
    Interrupted,
    cancelling,
    interruptible,
    listening,
    stop_requested,
    uninterrupted,
)

# An epoch of twelve batches of one image and six steps, with dropout and EMA, whose state a checkpoint must hold.
STEPS = "--batch_size 1 --accumulate 2 --epochs 2 --dropout 0.1 --ema 0.9 --print_freq 1 --limit_val 2".split()


def wait_for_line(process: subprocess.Popen, start_of_line: str) -> None:
    """Read a process's output up to a line that starts with `start_of_line`."""
    for line in process.stdout:
        if line.startswith(start_of_line):
            return
    raise AssertionError(f"the process ended without printing {start_of_line!r}")


def end(processes: list[subprocess.Popen]) -> list[int]:
    """Wait for the processes, store their output in `said` and `complained`, and return their exit statuses."""
    for process in processes:
        process.said, process.complained = process.communicate(timeout=300)
    return [process.returncode for process in processes]


def assert_same_training(ours: Path, theirs: Path) -> None:
    """Assert that two folders hold bitwise equal trainings."""
    first, second = (load_checkpoint(str(folder / "checkpoint.pth")) for folder in (ours, theirs))
    for key in ("model", "model_ema", "optimizer", "scaler", "epoch", "random_states", "train_stats"):
        assert equal_states(first[key], second[key]), key
    assert "within_epoch" not in first
    assert read_log(ours) == read_log(theirs)


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def whole_training(request, shapes, tmp_path_factory):
    """(number of processes, output folder) of an uninterrupted training."""
    output = tmp_path_factory.mktemp("whole") / "run"
    statuses = end(start(request.param, "detr", shapes, output, *STEPS))
    assert statuses == [0] * request.param
    return request.param, output


@pytest.mark.parametrize(
    "number, workers", [(signal.SIGTERM, "2"), (signal.SIGUSR1, "0")], ids=["SIGTERM to all", "SIGUSR1 to one"]
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(whole_training, shapes, tmp_path, number, workers):
    count, theirs = whole_training
    argv = [*STEPS, "--num_workers", workers, "--auto_resume"]
    processes = start(count, "detr", shapes, tmp_path, *argv)
    # The first line, so that a busy machine does not deliver the signal after the epoch.
    wait_for_line(processes[0], "epoch 0 [ 1/12]" if count == 1 else "epoch 0 [1/6]")
    if number == signal.SIGTERM:
        # Like schedulers, signal all processes, including the data loaders'.
        for process in processes:
            os.killpg(process.pid, number)
    else:
        # Signal one process, with two processes not the main one; all must stop in the same step.
        processes[-1].send_signal(number)
    assert end(processes) == [STOPPED] * count
    assert f"received {number.name} in epoch 0, after " in processes[0].complained
    assert "Traceback" not in "".join(process.complained for process in processes)
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert state["epoch"] == -1 and 0 < state["within_epoch"]["images"] < 12
    assert state["within_epoch"]["images"] % (2 * count) == 0  # whole steps
    assert not (tmp_path / "log.txt").exists()

    assert end(start(count, "detr", shapes, tmp_path, *argv)) == [0] * count
    assert_same_training(tmp_path, theirs)


def test_kills_at_any_moment_leave_a_checkpoint_that_resumes(whole_training, shapes, tmp_path):
    count, theirs = whole_training
    argv = [*STEPS, "--auto_resume", "--save_every_steps", "1"]
    latest, partial = tmp_path / "checkpoint.pth", tmp_path / "checkpoint.pth.partial"
    during_saves = 0
    for kills in range(4):
        before = latest.stat().st_mtime_ns if latest.exists() else 0
        processes = start(count, "detr", shapes, tmp_path, *argv)
        # Kill the run after a new checkpoint, then in the middle of a save, which may need several tries.
        while processes[0].poll() is None:
            moved = latest.exists() and latest.stat().st_mtime_ns > before
            if moved and (kills == 0 or partial.exists()):
                break
            time.sleep(0.001)
        for process in processes:
            process.kill()
        statuses = end(processes)
        during_saves += partial.exists()
        torch.load(latest, weights_only=True)
        if during_saves or statuses == [0] * count:
            break
    assert during_saves
    assert end(start(count, "detr", shapes, tmp_path, *argv)) == [0] * count
    assert_same_training(tmp_path, theirs)
    assert not partial.exists()


def test_torchrun_passes_the_signal_on(shapes, tmp_path):
    argv = [*STEPS, "--auto_resume", "--epochs", "30"]
    # Others stop several processes; one starts faster.
    (process,) = start(1, "detr", shapes, tmp_path, *argv, torchrun=True)
    wait_for_line(process, "epoch 0 [ 5/12]")
    process.send_signal(signal.SIGTERM)
    (status,) = end([process])
    # torchrun returns its own status, but waits for the processes.
    assert status != 0 and "received SIGTERM in epoch" in process.complained
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
    assert "note: the epoch started with batches of 1 images in 1 processes and resumes with 2 in 2" in said
    assert f"epoch 0 [{done // 4 * 2 + 1}/6]" in said and f"epoch 0 [{done // 4 * 2}/6]" not in said
    assert [row["epoch"] for row in read_log(tmp_path)] == [0, 1]


def test_after_a_signal_in_an_evaluation_the_resumed_run_evaluates_the_epoch(shapes, tmp_path, monkeypatch, capsys):
    argv = ["--epochs", "1", "--auto_resume"]
    original = torch.nn.Module.eval
    with monkeypatch.context() as patch:
        # An evaluation starts with `eval()`.
        patch.setattr(torch.nn.Module, "eval", lambda self: os.kill(os.getpid(), signal.SIGTERM) or original(self))
        assert train("detr", shapes, tmp_path, *argv) == STOPPED
    assert "received SIGTERM in the evaluation of epoch 0" in capsys.readouterr().err
    assert not (tmp_path / "log.txt").exists()
    assert train("detr", shapes, tmp_path, *argv) == 0
    assert [len(row["test_coco_eval_bbox"]) for row in read_log(tmp_path)] == [12]


def test_signal_handlers_are_restored_after_listening():
    told = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
    try:
        with listening():
            assert stop_requested() is None
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            # The first signal counts.
            assert stop_requested() == signal.SIGUSR1 and told == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert told == [signal.SIGUSR1]
        with listening():
            assert stop_requested() is None
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert signal.SIGTERM in SIGNALS and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ctrl_c_ends_without_a_traceback(shapes, tmp_path):
    (process,) = start(1, "detr", shapes, tmp_path, *STEPS, "--epochs", "50", "--num_workers", "1")
    wait_for_line(process, "epoch 1 [ 2/12]")
    os.killpg(process.pid, signal.SIGINT)
    assert end([process]) == [130]
    assert process.complained.splitlines()[-1] == "main.py: interrupted; earlier checkpoints are complete"
    # A loader process may print a traceback from the thread that sends its batches, whole or in part.
    assert "KeyboardInterrupt" not in process.complained
    assert "Traceback" not in process.complained or "resource_sharer.py" in process.complained
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 0


# Code that started processes run first: at exit, they write the names of their threads.
TELL_THREADS = """
import atexit, os, time
from pathlib import Path

def names():
    for task in os.listdir("/proc/self/task"):
        try:
            yield Path(f"/proc/self/task/{task}/comm").read_text()
        except OSError:
            # The thread has just ended.
            pass

def tell():
    # The system lists threads for a moment after they end.
    deadline = time.monotonic() + 2
    while any("gloo" in name for name in names()) and time.monotonic() < deadline:
        time.sleep(0.01)
    Path(__file__).with_name(f"threads_{os.getpid()}").write_text("".join(names()))

atexit.register(tell)
"""


@pytest.fixture
def threads_at_the_end(tmp_path_factory, monkeypatch):
    """A function from a process to the names of the threads that it had at exit."""
    folder = tmp_path_factory.mktemp("threads")
    (folder / "sitecustomize.py").write_text(TELL_THREADS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
    return lambda process: (folder / f"threads_{process.pid}").read_text().split()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_reported_and_the_old_checkpoint_stays(shapes, tmp_path, threads_at_the_end, processes):
    assert train("detr", shapes, tmp_path, "--epochs", "1", "--limit_val", "1") == 0
    latest = tmp_path / "checkpoint.pth"
    before = latest.read_bytes()
    # The partial file is written to a device that is always full.
    (tmp_path / "checkpoint.pth.partial").symlink_to("/dev/full")
    argv = ["--epochs", "3", "--limit_val", "1", "--auto_resume", "--batch_size", str(4 // processes)]
    running = start(processes, "detr", shapes, tmp_path, *argv, fresh=processes > 1)
    assert end(running) == [2] * processes
    complaints = "".join(process.complained for process in running)
    assert complaints.count(f"{latest}: cannot be written (No space left on device); its previous content is kept") == 1
    assert "Traceback" not in complaints and latest.read_bytes() == before
    # A remaining gloo thread of the process group could abort the process.
    if processes > 1:
        assert not [name for process in running for name in threads_at_the_end(process) if "gloo" in name]
    # With free space the run resumes.
    assert train("detr", shapes, tmp_path, *argv[:-2], "--epochs", "2") == 0
    assert [row["epoch"] for row in read_log(tmp_path)] == [0, 1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_reported_for_the_log(shapes, tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    assert train("detr", shapes, tmp_path, "--epochs", "1", "--limit_val", "1") == 2
    assert f"error: {tmp_path / 'log.txt'}: cannot be written (No space left on device)" in capsys.readouterr().err
    # The epoch is not lost.
    (tmp_path / "log.txt").unlink()
    assert train("detr", shapes, tmp_path, "--epochs", "1", "--limit_val", "1", "--auto_resume") == 0
    assert [row["epoch"] for row in read_log(tmp_path)] == [0]


def test_a_file_that_cannot_be_replaced_is_reported(tmp_path):
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
def test_numbered_checkpoints_are_kept_as_the_flags_say(shapes, tmp_path, argv, kept):
    (tmp_path / "checkpoint_of_mine.pth").write_bytes(b"not numbered")
    few = ["--epochs", "5", "--limit_train", "4", "--limit_val", "1", "--eval_every", "9"]
    assert train("detr", shapes, tmp_path, *few, *argv) == 0
    names = {path.name for path in tmp_path.glob("*.pth")}
    always = {"checkpoint.pth", "best.pth", "checkpoint_of_mine.pth"}
    assert names == always | {f"checkpoint{epoch:04}.pth" for epoch in kept}
    for epoch in kept:
        assert torch.load(tmp_path / f"checkpoint{epoch:04}.pth", weights_only=True)["epoch"] == epoch


def test_the_best_checkpoint_has_the_highest_ap(shapes, tmp_path, monkeypatch):
    figures = iter([0.2, 0.5, 0.3])
    original = run.report_evaluation

    def report(*args, **kwargs):
        original(*args, **kwargs)
        return {"test_coco_eval_bbox": [next(figures)] * 12}

    monkeypatch.setattr(run, "report_evaluation", report)
    argv = ["--epochs", "3", "--limit_train", "4", "--limit_val", "1"]
    assert train("detr", shapes, tmp_path, *argv) == 0
    assert load_checkpoint(str(tmp_path / "best.pth"))["epoch"] == 1


@pytest.fixture
def nothing_to_find(shapes, tmp_path):
    """A function that copies the data set with changed validation annotations; returns the copy's root."""

    def make(change) -> Path:
        root = shutil.copytree(shapes, tmp_path / "data")
        path = root / "annotations" / "instances_val2017.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "annotations": change(content["annotations"])}))
        return root

    return make


EMPTY = {
    "no objects": lambda annotations: [],
    "only crowds": lambda annotations: [{**annotation, "iscrowd": 1} for annotation in annotations],
    "beyond the limit": lambda annotations: [a for a in annotations if a["image_id"] > 2],  # --limit_val 2
}


@pytest.mark.parametrize("change", EMPTY.values(), ids=EMPTY)
def test_without_a_measurable_ap_there_is_no_best_checkpoint(nothing_to_find, change, tmp_path, capsys):
    root = nothing_to_find(change)
    few = ["--epochs", "2", "--limit_train", "4", "--limit_val", "2", "--auto_resume"]
    assert train("detr", root, tmp_path / "out", *few, "--early_stop", "1") == 2
    refused = capsys.readouterr()
    file = root / "annotations" / "instances_val2017.json"
    assert f"error: --early_stop 1: AP cannot be computed, because {file} has no objects" in refused.err
    assert "epoch 0" not in refused.out and not list((tmp_path / "out").glob("*.pth"))

    assert train("detr", root, tmp_path / "out", *few) == 0
    out = capsys.readouterr().out
    assert out.count(f"AP cannot be computed (COCO's metrics are -1), because {file} has no objects") == 1
    assert "the 2 images that --limit_val 2 leaves; best.pth is not written" in out and "highest AP" not in out
    assert [row["test_coco_eval_bbox"] for row in read_log(tmp_path / "out")] == [[-1] * 12] * 2
    assert sorted(path.name for path in (tmp_path / "out").glob("*.pth")) == ["checkpoint.pth"]
    # An earlier best.pth stays.
    (tmp_path / "out" / "best.pth").write_bytes(b"of before")
    assert train("detr", root, tmp_path / "out", *few, "--epochs", "3") == 0
    assert (tmp_path / "out" / "best.pth").read_bytes() == b"of before"


@pytest.mark.parametrize("number", [-1.0, float("nan")])
def test_an_ap_of_minus_one_or_nan_does_not_count(shapes, tmp_path, monkeypatch, number):
    figures = iter([number, 0.2, number, number, 0.3])
    monkeypatch.setattr(run, "report_evaluation", lambda *args, **kwargs: {"test_coco_eval_bbox": [next(figures)] * 12})
    argv = ["--limit_train", "4", "--limit_val", "1", "--early_stop", "2", "--auto_resume"]
    for epochs, best in ((1, None), (4, 1), (5, 4)):
        assert train("detr", shapes, tmp_path, "--epochs", str(epochs), *argv) == 0
        assert (tmp_path / "best.pth").is_file() == (best is not None)
        assert best is None or load_checkpoint(str(tmp_path / "best.pth"))["epoch"] == best
    assert [row["epoch"] for row in read_log(tmp_path)] == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------ other commands


def send(number: int = signal.SIGTERM, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_a_signal_ends_a_command_like_ctrl_c(number, tmp_path, capsys, heard_signals):
    handlers = {other: signal.getsignal(other) for other in ENDING}

    def command() -> int:
        def write(file) -> None:
            file.write(b"half")
            send(number, times=2)  # like `timeout`, which signals the process and its group
            file.write(b"whole")

        write_file(tmp_path / "file", write)
        return 0

    assert exit_status("program", command) == 128 + number
    assert capsys.readouterr() == ("", f"program: interrupted by {number.name}\n")
    assert list(tmp_path.iterdir()) == []
    assert {other: signal.getsignal(other) for other in ENDING} == handlers


def test_a_signal_waits_for_the_end_of_an_uninterrupted_block():
    done = []
    with pytest.raises(Interrupted), interruptible():
        with uninterrupted():
            with uninterrupted():
                send()
                done.append(1)
            done.append(2)
        done.append(3)
    assert done == [1, 2]


def test_an_interruption_that_other_code_turned_into_an_error_counts(capsys):
    def command() -> int:
        try:
            send()
        except KeyboardInterrupt as error:
            raise RuntimeError("terminate called, frame #0: ...") from error

    assert exit_status("program", command) == 143
    assert capsys.readouterr().err == "program: interrupted by SIGTERM\n"


def test_a_signal_before_an_error_does_not_reach_later_commands(capsys):
    def command() -> int:
        with uninterrupted():
            send()
            raise UserError("no room")

    assert exit_status("program", command) == 2
    with uninterrupted():
        pass


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert exit_status("program", lambda: send(signal.SIGHUP) or 5) == 5
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_can_run_commands():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(exit_status, "program", lambda: 5).result() == 5


def test_a_second_signal_ends_a_command_at_once(capfd):
    def command() -> int:
        try:
            send()
        finally:
            time.sleep(1.1)  # after a second it counts as another request
            send()
            time.sleep(60)

    assert status_of_fork(lambda: exit_status("program", command)) == -signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_a_forked_child_does_not_clean_up_for_its_parent():
    def command() -> int:
        return status_of_fork(lambda: send() or 5)

    assert exit_status("program", command) == -signal.SIGTERM


def status_of_fork(function: Callable[[], int]) -> int:
    """The exit status of a forked process that calls a function; negative for a signal."""
    child = os.fork()
    if not child:
        os._exit(function())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def sleep_in(folder: str) -> None:
    """Create a file, sleep, and remove the file; for a child process."""
    partial = Path(folder) / "temporary"
    partial.touch()
    try:
        time.sleep(60)
    finally:
        partial.unlink()


def interrupt_when(path: Path) -> None:
    """Send this process SIGTERM from a thread, once the file exists."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        send()

    ThreadPoolExecutor(1).submit(watch)


def test_processes_that_a_command_started_clean_up_and_end(tmp_path, capsys):
    interrupt_when(tmp_path / "temporary")
    begin = time.monotonic()
    assert exit_status("program", lambda: run_isolated(sleep_in, str(tmp_path)).status) == 143
    assert time.monotonic() - begin < 55
    assert list(tmp_path.iterdir()) == [] and multiprocessing.active_children() == []
    assert capsys.readouterr().err == "program: interrupted by SIGTERM\n"


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_pending_tasks_of_a_pool_are_cancelled(tmp_path, kind):
    context = multiprocessing.get_context("spawn")
    pool = ThreadPoolExecutor(1) if kind == "threads" else ProcessPoolExecutor(1, context)
    begin = time.monotonic()
    with pytest.raises(Interrupted), interruptible(), pool, cancelling(pool):
        futures = [pool.submit(time.sleep, 0.5 if kind == "threads" else 30) for _ in range(8)]
        send()
        futures[-1].result()
    # Another thread of the pool may be about to note the end of a process.
    while multiprocessing.active_children() and time.monotonic() - begin < 25:
        time.sleep(0.01)
    assert time.monotonic() - begin < 25


# {module: arguments of a long run of its command}; FOLDER is replaced by the output folder.
COMMANDS = {
    "enact_common.data.synthetic": ["--output_dir", "FOLDER/out", "--train", "100000"],
    "enact_common.demo": ["--output_dir", "FOLDER/out"],
}


@pytest.mark.parametrize("module", COMMANDS)
def test_sigterm_ends_a_command_in_one_line(module, tmp_path):
    argv = [word.replace("FOLDER", str(tmp_path)) for word in COMMANDS[module]]
    process = Forked(["-m", module, *argv])
    while not list(tmp_path.glob("**/*.jpg")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, complained = process.communicate(timeout=60)
    assert (process.returncode, complained) == (143, f"python -m {module}: interrupted by SIGTERM\n")
    assert list(tmp_path.glob("**/*.partial")) == []
