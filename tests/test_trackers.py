"""Trackers: scalars, settings and pictures arrive, runs continue, and a tracker that fails never stops a training."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import parse, read_log, train

from enact_common.cli import checks
from enact_common.training import run as run_module
from enact_common.training import trackers
from enact_common.training.logs import scalars_of
from enact_common.training.trackers import OPENERS, RUN_IDS, Tracker, Trackers
from enact_common.utils.signals import Stopped

PICTURE = np.zeros((8, 10, 3), np.uint8)


@pytest.fixture(autouse=True)
def local(monkeypatch):
    """No server: W&B offline, and MLflow in the output folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)


def track(name, folder, epoch, value, finished=True):
    """Log a scalar and a picture of an epoch with a real tracker."""
    opened = Trackers([name], folder, {"lr": 0.1, "batch_size": 4 + epoch})
    opened.scalars(epoch, {"test/AP": value})
    opened.pictures(epoch, lambda: {"pictures/photo": PICTURE})
    assert opened, "it failed"
    opened.close(finished)
    return opened


def test_tensorboard_gets_scalars_settings_and_pictures(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for epoch, value in ((0, 0.25), (1, 0.5)):
        track("tensorboard", tmp_path, epoch, value)
    read = events.EventAccumulator(str(tmp_path / "tensorboard"), {events.IMAGES: 0, events.SCALARS: 0})
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("test/AP")] == [(0, 0.25), (1, 0.5)]
    assert [event.step for event in read.Images("pictures/photo")] == [0, 1]
    assert "settings/text_summary" in read.Tags()["tensors"]
    assert not (tmp_path / RUN_IDS).exists()


def test_mlflow_writes_a_local_folder_and_continues_its_run(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    for epoch, value, finished in ((0, 0.25, False), (1, 0.5, True)):
        track("mlflow", tmp_path, epoch, value, finished)
        client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
        (run,) = client.search_runs([client.get_experiment_by_name("enact").experiment_id])
        assert run.info.status == ("FINISHED" if finished else "KILLED")
    run_id = json.loads((tmp_path / RUN_IDS).read_text())["mlflow"]
    assert run.info.run_id == run_id and run.info.run_name == tmp_path.name
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "test/AP")] == [(0, 0.25), (1, 0.5)]
    # A setting that differs in the resumed run is refused by MLflow, so the first run's stay.
    assert run.data.params == {"lr": "0.1", "batch_size": "4"}
    pictures = [item.path for item in client.list_artifacts(run_id, "pictures/photo")]
    assert pictures == ["pictures/photo/epoch_0000.png", "pictures/photo/epoch_0001.png"]


def test_an_mlflow_run_that_is_gone_is_replaced(tmp_path):
    pytest.importorskip("mlflow")
    (tmp_path / RUN_IDS).write_text(json.dumps({"mlflow": "0" * 32, "wandb": "kept"}))
    track("mlflow", tmp_path, 0, 0.25)
    ids = json.loads((tmp_path / RUN_IDS).read_text())
    assert ids["mlflow"] != "0" * 32 and ids["wandb"] == "kept"


def test_wandb_writes_offline_files_and_continues_its_run(tmp_path):
    wandb = pytest.importorskip("wandb")
    try:
        for epoch, value in ((0, 0.25), (1, 0.5)):
            track("wandb", tmp_path, epoch, value)
    finally:
        wandb.teardown()
    run_id = json.loads((tmp_path / RUN_IDS).read_text())["wandb"]
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert folders and all(folder.name.endswith(run_id) for folder in folders)
    content = b"".join(file.read_bytes() for folder in folders for file in folder.glob("*.wandb"))
    assert b"test/AP" in content and b"batch_size" in content
    assert list((tmp_path / "wandb").rglob("*.png"))


def test_a_training_sends_the_same_scalars_to_each_tracker_and_a_resumed_one_continues(shapes, tmp_path, capsys):
    mlflow = pytest.importorskip("mlflow")
    argv = ["--limit_train", "4", "--limit_val", "3", "--log", "tensorboard", "mlflow"]
    assert train("conditional", shapes, tmp_path, *argv, "--epochs", "1") == 0
    assert train("conditional", shapes, tmp_path, *argv, "--epochs", "2", "--auto_resume") == 0
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("enact").experiment_id])
    for epoch in read_log(tmp_path):
        expected = scalars_of({k: v for k, v in epoch.items() if k != "epoch"})
        assert {"train/loss", "test/AP", "train/lr"} <= set(expected)
        for name, value in expected.items():
            history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)}
            assert history[epoch["epoch"]] == pytest.approx(value), name
    assert run.data.params["variant"] == "conditional" and run.data.params["epochs"] == "1"
    best = {name for name in run.data.metrics if name.startswith("best/")}
    assert best == {"best/AP", "best/AP50", "best/epoch"}
    pictures = [item.path for item in client.list_artifacts(run.info.run_id, "pictures")]
    assert len(pictures) == 3
    assert "fails" not in capsys.readouterr().out


@pytest.mark.parametrize("stopped", [False, True])
def test_the_trackers_learn_whether_the_training_finished(stopped, shapes, tmp_path, monkeypatch):
    closed = []
    tracker = Tracker("wandb", None, lambda *_: None, lambda *_: None, closed.append)
    monkeypatch.setattr(trackers, "OPENERS", {**OPENERS, "wandb": lambda *_: tracker})
    monkeypatch.setattr(checks, "is_installed", lambda package: True)
    if stopped:
        monkeypatch.setattr(run_module, "train_one_epoch", raise_stopped)
    argv = ["--limit_train", "4", "--limit_val", "2", "--epochs", "1", "--log", "wandb"]
    assert train("conditional", shapes, tmp_path, *argv) == (75 if stopped else 0)
    assert closed == [not stopped]


def raise_stopped(*_):
    raise Stopped("received SIGTERM")


class Failing:
    """An opener whose tracker fails at one of its steps; counts the calls."""

    def __init__(self, step: str):
        self.step = step
        self.calls: list[str] = []

    def call(self, step: str):
        def act(*args):
            self.calls.append(step)
            if step == self.step:
                raise OSError("the server\nis gone")

        return act

    def __call__(self, folder, settings, run_id):
        self.call("open")()
        return Tracker("wandb", "id", *map(self.call, ("scalars", "pictures", "close")))


@pytest.mark.parametrize("step, warned", [("open", 1), ("scalars", 1), ("pictures", 1), ("close", 1), ("none", 0)])
def test_a_tracker_that_fails_never_stops_a_training(step, warned, shapes, tmp_path, monkeypatch, capsys):
    failing, other = Failing(step), Failing("none")
    monkeypatch.setattr(trackers, "OPENERS", {**OPENERS, "wandb": failing, "mlflow": other})
    monkeypatch.setattr(checks, "is_installed", lambda package: True)
    argv = ["--limit_train", "4", "--limit_val", "2", "--epochs", "1"]
    # An untrained model may measure an AP of 0, which is still the best so far.
    assert train("conditional", shapes, tmp_path, *argv, "--log", "wandb", "mlflow") == 0
    assert len(read_log(tmp_path)) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "fails and is left out" in line]
    assert len(lines) == warned
    assert all(line.startswith("--log wandb: ") and "(the server is gone)" in line for line in lines)
    # After a failure it is not called again.
    assert step == "none" or failing.calls[-1] == step
    assert other.calls == ["open", "scalars", "scalars", "pictures", "close"]


def test_pictures_that_cannot_be_drawn_cost_no_tracker(tmp_path, monkeypatch, caplog):
    other = Failing("none")
    monkeypatch.setattr(trackers, "OPENERS", {"wandb": other})
    opened = Trackers(["wandb"], tmp_path, {})
    opened.pictures(3, lambda: 1 / 0)
    assert opened and other.calls == ["open"]
    assert "the pictures of epoch 3 cannot be drawn (division by zero)" in caplog.text


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_file_of_run_ids_starts_new_runs(content, tmp_path, monkeypatch):
    (tmp_path / RUN_IDS).write_text(content)
    seen = []
    opened = Tracker("wandb", "new", *(lambda *a: None,) * 3)
    monkeypatch.setattr(trackers, "OPENERS", {"wandb": lambda folder, settings, run_id: seen.append(run_id) or opened})
    Trackers(["wandb"], tmp_path, {})
    assert seen == [None] and json.loads((tmp_path / RUN_IDS).read_text()) == {"wandb": "new"}


def test_run_ids_that_cannot_be_written_stop_no_training(tmp_path, monkeypatch, caplog):
    (tmp_path / RUN_IDS).mkdir()
    opened = Tracker("wandb", "new", *(lambda *a: None,) * 3)
    monkeypatch.setattr(trackers, "OPENERS", {"wandb": lambda *words: opened})
    assert Trackers(["wandb"], tmp_path, {}) and "a resumed training will start new runs" in caplog.text


def test_an_evaluation_ignores_the_trackers_of_its_config(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "is_installed", lambda package: False)
    (tmp_path / "config.yaml").write_text("log: [wandb]")
    words = ["--config", str(tmp_path / "config.yaml"), "--coco_path", str(shapes), "--eval", "--resume", "best.pth"]
    checks.check_arguments(parse("detr", *words))


def test_without_the_flag_tensorboard_gets_scalars_only(tmp_path, monkeypatch, caplog):
    args = SimpleNamespace(log=None)
    asked = []
    monkeypatch.setattr(run_module, "Trackers", lambda *words: asked.append(words))
    run_module.open_trackers("detr", args, "lr: 1", tmp_path)
    assert asked == [(["tensorboard"], tmp_path, {})]
    monkeypatch.setattr(run_module, "is_installed", lambda package: False)
    assert run_module.open_trackers("detr", args, "lr: 1", tmp_path) is None
    assert run_module.open_trackers("detr", args, "lr: 1", None) is None


@pytest.mark.parametrize(
    "argv, installed, said",
    [
        (("--log", "wandb"), False, "--log wandb: wandb is not installed: pip install 'enact-detection[wandb]'"),
        (("--log", "mlflow"), False, "pip install 'enact-detection[mlflow]'"),
        (("--log", "tensorboard"), False, "pip install 'enact-detection[logging]'"),
        (("--log", "wandb", "--output_dir", ""), True, "--log wandb: needs a folder"),
    ],
)
def test_trackers_that_cannot_work_are_refused(argv, installed, said, shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checks, "is_installed", lambda package: installed)
    assert train("conditional", shapes, tmp_path / "out", *argv) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_unknown_tracker_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("detr", "--log", "paper")
    assert "tensorboard, 'wandb'" in capsys.readouterr().err.replace("'tensorboard'", "tensorboard")


def test_a_folder_named_like_a_package_does_not_count_as_installed(tmp_path, monkeypatch):
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not checks.is_installed("no_such_tracker") and not checks.is_installed("no_such_package")
    assert checks.is_installed("json")
