"""Experiment trackers: TensorBoard, Weights & Biases and MLflow get the same scalars, settings and pictures.

A tracker that fails is left out with one warning, and the training goes on.
"""

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from enact_common.utils.errors import UserError
from enact_common.utils.files import read_json, write_file

logger = logging.getLogger("enact")

# The file in the output folder that holds each tracker's run id, so that a resumed training continues the same run.
RUN_IDS = "trackers.json"

# The project or experiment, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names another one.
PROJECT = "enact"

# MLflow refuses more parameters in one call.
PARAMETERS_PER_CALL = 100


@dataclass
class Tracker:
    """An open run of a tracker.

    Attributes:
        name: the value of `--log`.
        run_id: identifies the run, to continue it; None for trackers that need no id.
        scalars: takes an epoch and {name: value}.
        pictures: takes an epoch and {name: RGB uint8 (height, width, 3)}.
        close: ends the run; takes whether the training is finished.
    """

    name: str
    run_id: str | None
    scalars: Callable[[int, Mapping[str, float]], None]
    pictures: Callable[[int, Mapping[str, np.ndarray]], None]
    close: Callable[[bool], object]


def open_tensorboard(folder: Path, settings: Mapping[str, Any], run_id: str | None) -> Tracker:
    """Write event files to `tensorboard/` in the output folder. See `OPENERS` for the arguments."""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(folder / "tensorboard")
    if settings:
        board.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def scalars(epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            board.add_scalar(name, value, epoch)
        board.flush()

    def pictures(epoch: int, images: Mapping[str, np.ndarray]) -> None:
        for name, image in images.items():
            board.add_image(name, image, epoch, dataformats="HWC")
        board.flush()

    return Tracker("tensorboard", None, scalars, pictures, lambda finished: board.close())


def open_wandb(folder: Path, settings: Mapping[str, Any], run_id: str | None) -> Tracker:
    """Start or continue a run of Weights & Biases; its variables (WANDB_MODE, ...) apply. See `OPENERS`."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=os.environ.get("WANDB_NAME", folder.resolve().name),
        dir=str(folder),
        id=run_id or secrets.token_hex(4),
        resume="allow",
        config=dict(settings),
        allow_val_change=True,
        settings=wandb.Settings(console="off"),
    )
    # Epochs instead of W&B's own steps, which must not repeat: a resumed run may log an epoch again.
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch")

    def pictures(epoch: int, images: Mapping[str, np.ndarray]) -> None:
        run.log({"epoch": epoch, **{name: wandb.Image(image) for name, image in images.items()}})

    return Tracker(
        "wandb",
        run.id,
        lambda epoch, values: run.log({"epoch": epoch, **values}),
        pictures,
        lambda finished: run.finish(exit_code=0 if finished else 1),
    )


def open_mlflow(folder: Path, settings: Mapping[str, Any], run_id: str | None) -> Tracker:
    """Start or continue an MLflow run, at MLFLOW_TRACKING_URI or else in the folder's `mlruns/`. See `OPENERS`."""
    # MLflow keeps its folder format but asks for a database unless this is set.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", (folder / "mlruns").resolve().as_uri()))
    try:
        if run_id:
            client.update_run(run_id, status="RUNNING")
    except MlflowException:
        # The run is in another store, or was deleted.
        run_id = None
    if run_id is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        run_id = client.create_run(experiment_id, run_name=folder.resolve().name).info.run_id
        # Only once: MLflow refuses a parameter that changes.
        parameters = [Param(name, str(value)) for name, value in settings.items()]
        for start in range(0, len(parameters), PARAMETERS_PER_CALL):
            client.log_batch(run_id, params=parameters[start : start + PARAMETERS_PER_CALL])

    def scalars(epoch: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(name, value, now, epoch) for name, value in values.items()])

    def pictures(epoch: int, images: Mapping[str, np.ndarray]) -> None:
        for name, image in images.items():
            client.log_image(run_id, image, f"{name}/epoch_{epoch:04}.png")

    def close(finished: bool) -> None:
        client.set_terminated(run_id, "FINISHED" if finished else "KILLED")

    return Tracker("mlflow", run_id, scalars, pictures, close)


# The trackers of `--log`. Each function takes the output folder, the settings {flag: value} and the id of the run to
# continue, or None.
OPENERS = {"tensorboard": open_tensorboard, "wandb": open_wandb, "mlflow": open_mlflow}


def one_line(error: Exception) -> str:
    """Return an error's message, shortened to one line, or else its type."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class Trackers:
    """The open trackers of a training; those that fail are left out.

    Args:
        names: keys of `OPENERS`.
        folder: the output folder.
        settings: {flag: value}.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]):
        self._open: list[Tracker] = []
        ids = read_json(folder / RUN_IDS) or {}
        for name in dict.fromkeys(names):
            try:
                self._open.append(OPENERS[name](folder, settings, ids.get(name)))
            except Exception as error:
                self._warn(name, error)
        ids |= {tracker.name: tracker.run_id for tracker in self._open if tracker.run_id}
        if ids:
            try:
                write_file(folder / RUN_IDS, lambda file: file.write(json.dumps(ids).encode()))
            except UserError as error:
                logger.warning("--log: a resumed training will start new runs (%s)", one_line(error))

    def __bool__(self) -> bool:
        return bool(self._open)

    def scalars(self, epoch: int, values: Mapping[str, float]) -> None:
        """Log an epoch's scalars under names such as `train/loss` and `test/AP`."""
        self._each(lambda tracker: tracker.scalars(epoch, values))

    def pictures(self, epoch: int, draw: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Draw pictures, RGB uint8 (height, width, 3), and log them under names such as `pictures/photo`."""
        try:
            images = draw()
        except Exception as error:
            logger.warning("--log: the pictures of epoch %d cannot be drawn (%s)", epoch, one_line(error))
            return
        self._each(lambda tracker: tracker.pictures(epoch, images))

    def close(self, finished: bool) -> None:
        """End the runs. A training that was stopped before its end continues them when it is resumed."""
        self._each(lambda tracker: tracker.close(finished))

    def _each(self, action: Callable[[Tracker], object]) -> None:
        for tracker in list(self._open):
            # Any error: a tracker's server, disk or package must not end a training.
            try:
                action(tracker)
            except Exception as error:
                self._open.remove(tracker)
                self._warn(tracker.name, error)

    @staticmethod
    def _warn(name: str, error: Exception) -> None:
        logger.warning(
            "--log %s: fails and is left out from here on; the training continues (%s)", name, one_line(error)
        )
