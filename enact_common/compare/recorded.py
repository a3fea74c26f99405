"""A finished or running training, read from its folder: log, evaluation and checkpoint arguments."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from enact_common.checkpoints.bundled import bundled_file
from enact_common.checkpoints.contents import attention_of, variant_of
from enact_common.checkpoints.files import BEST, LATEST, load_checkpoint
from enact_common.evaluation.coco import EVALUATION, METRICS
from enact_common.evaluation.stored import RESULTS, is_outdated
from enact_common.training.logs import is_measured
from enact_common.training.run_logs import LOG, METRICS_KEY, is_finite, read_epochs, read_evaluation, series
from enact_common.utils.errors import UserError


@dataclass
class RecordedRun:
    """A run, read from its folder. Missing parts are empty or None.

    Attributes:
        epochs: the log's rows, from `read_epochs`.
        evaluation: the record from `read_evaluation`.
        checkpoint: the checkpoint to detect with: the best one if it exists, else the latest.
        variant: a key of `VARIANTS`.
        args: the checkpoint's training arguments, flag to value.
        trained: number of epochs that the checkpoint was trained for.
        results: file of the detections of `evaluation`, which only `--eval` writes.
    """

    name: str
    epochs: list[dict] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    checkpoint: Path | None = None
    variant: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    trained: int | None = None
    results: Path | None = None

    @property
    def epochs_done(self) -> int | None:
        """Number of trained epochs, from the log or else the checkpoint."""
        return self.epochs[-1]["epoch"] + 1 if self.epochs else self.trained

    @property
    def parameters(self) -> int | None:
        """Number of trained parameters."""
        return next((row["n_parameters"] for row in reversed(self.epochs) if is_finite(row.get("n_parameters"))), None)

    @property
    def evaluated_epoch(self) -> int | None:
        """Number of epochs done when `figures` was measured."""
        if self.evaluation is not None:
            epoch = self.evaluation.get("epoch")
            return epoch + 1 if is_finite(epoch) else None
        evaluated = series(self.epochs, METRICS_KEY, 0)
        return evaluated[-1][0] if evaluated else None

    @property
    def figures(self) -> dict[str, float]:
        """The twelve COCO metrics of the latest evaluation, without those of sizes that do not occur."""
        if self.evaluation is not None:
            metrics = self.evaluation["figures"]
        else:
            lists = [row[METRICS_KEY] for row in self.epochs if series([row], METRICS_KEY, 0)]
            metrics = dict(zip(METRICS, lists[-1], strict=False)) if lists else {}
        return {name: metrics[name] for name in METRICS if is_measured(metrics.get(name))}

    @property
    def best(self) -> tuple[int, float] | None:
        """(epochs done, AP) of the highest AP in the log."""
        return max(series(self.epochs, METRICS_KEY, 0), key=lambda point: point[1], default=None)

    def logged(self, key: str) -> list[float]:
        """Return the values of a logged quantity in all epochs that have it."""
        return [value for _, value in series(self.epochs, key)]

    def median(self, key: str) -> float | None:
        """Return the median of a logged quantity over the epochs, or None."""
        values = self.logged(key)
        return median(values) if values else None


def read_run(source: Path, name: str) -> RecordedRun:
    """Read a run from its folder, or from its `log.txt` only.

    Raises:
        UserError: there is no run, or one of its files cannot be read.
    """
    if not source.exists():
        raise UserError(f"{source}: no such run; pass the output folder of a training, or its {LOG}")
    if not source.is_dir():
        return RecordedRun(name, read_epochs(source))
    run = RecordedRun(name)
    if (source / LOG).is_file():
        run.epochs = read_epochs(source)
    if (source / EVALUATION).is_file():
        run.evaluation = read_evaluation(source)
    run.checkpoint = next((source / file for file in (BEST, LATEST) if (source / file).is_file()), None)
    if run.checkpoint is None and run.evaluation and run.evaluation.get("checkpoint"):
        # The output folder of --eval: its checkpoint is elsewhere, and may no longer exist.
        evaluated = Path(str(run.evaluation["checkpoint"]))
        run.checkpoint = evaluated if evaluated.exists() or bundled_file(evaluated) else None
    current = (source / RESULTS).is_file() and not is_outdated(run.evaluation)
    run.results = source / RESULTS if current else None
    if run.checkpoint:
        read_arguments(run)
    if not (run.epochs or run.evaluation or run.checkpoint):
        raise UserError(f"{source}: not the folder of a run; expected {LOG}, {EVALUATION} or {LATEST} in it")
    return run


def read_arguments(run: RecordedRun) -> None:
    """Fill in a run's variant, arguments and epochs from its checkpoint."""
    state = load_checkpoint(str(run.checkpoint))
    run.variant, run.args = variant_of(state), state["args"]
    # Checkpoints of the original repositories lack the flag, but their tensor names show the attention.
    run.args.setdefault("encoder_attention", attention_of(state["model"]))
    run.trained = state["epoch"] + 1 if is_finite(state.get("epoch")) else None
