"""What is known of a finished or running training: its log, its evaluation, its checkpoint's arguments."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from enact_common.checkpoints.contents import variant_of
from enact_common.checkpoints.files import BEST, LATEST, load_checkpoint
from enact_common.evaluation.coco import EVALUATION, METRICS
from enact_common.training.logs import is_measured
from enact_common.training.run_logs import LOG, METRICS_KEY, is_finite, read_epochs, read_evaluation, series
from enact_common.utils.errors import UserError


@dataclass
class RecordedRun:
    """A run as its folder tells it. Whatever is not there is empty or None.

    Attributes:
        name: to be shown.
        epochs: of `read_epochs`.
        evaluation: of `read_evaluation`.
        checkpoint: to detect with: the best where there is one, else the latest.
        variant: a key of `VARIANTS`.
        args: the command line that the checkpoint was trained with, flag to value.
        trained: epochs that the checkpoint was trained for.
    """

    name: str
    epochs: list[dict] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    checkpoint: Path | None = None
    variant: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    trained: int | None = None

    @property
    def epochs_done(self) -> int | None:
        """Epochs that the run has been trained for, as its log or else its checkpoint says."""
        return self.epochs[-1]["epoch"] + 1 if self.epochs else self.trained

    @property
    def parameters(self) -> int | None:
        """Trained parameters."""
        return next((row["n_parameters"] for row in reversed(self.epochs) if is_finite(row.get("n_parameters"))), None)

    @property
    def evaluated_epoch(self) -> int | None:
        """How many epochs had been done when `figures` were measured."""
        if self.evaluation is not None:
            epoch = self.evaluation.get("epoch")
            return epoch + 1 if is_finite(epoch) else None
        evaluated = series(self.epochs, METRICS_KEY, 0)
        return evaluated[-1][0] if evaluated else None

    @property
    def figures(self) -> dict[str, float]:
        """COCO's twelve figures of the latest evaluation; those of sizes that do not exist are left out."""
        if self.evaluation is not None:
            found = self.evaluation["figures"]
        else:
            lists = [row[METRICS_KEY] for row in self.epochs if series([row], METRICS_KEY, 0)]
            found = dict(zip(METRICS, lists[-1], strict=False)) if lists else {}
        return {name: found[name] for name in METRICS if is_measured(found.get(name))}

    @property
    def best(self) -> tuple[int, float] | None:
        """The epochs done and the AP where the log's AP was highest."""
        return max(series(self.epochs, METRICS_KEY, 0), key=lambda point: point[1], default=None)

    def logged(self, key: str) -> list[float]:
        """The values of a quantity in all epochs that have it."""
        return [value for _, value in series(self.epochs, key)]

    def median(self, key: str) -> float | None:
        """The median of a quantity over the epochs."""
        values = self.logged(key)
        return median(values) if values else None


def read_run(source: Path, name: str) -> RecordedRun:
    """A run from its folder, or from its `log.txt` alone.

    Raises:
        UserError: there is nothing of a run, or a file of it cannot be read.
    """
    if not source.exists():
        raise UserError(f"{source}: no such run; expected a folder that training wrote to, or a {LOG}")
    if not source.is_dir():
        return RecordedRun(name, read_epochs(source))
    run = RecordedRun(name)
    if (source / LOG).is_file():
        run.epochs = read_epochs(source)
    if (source / EVALUATION).is_file():
        run.evaluation = read_evaluation(source)
    run.checkpoint = next((source / file for file in (BEST, LATEST) if (source / file).is_file()), None)
    if run.checkpoint is None and run.evaluation and run.evaluation.get("checkpoint"):
        # The folder of an --eval: the checkpoint is elsewhere, and may have gone.
        evaluated = Path(str(run.evaluation["checkpoint"]))
        run.checkpoint = evaluated if evaluated.is_file() else None
    if run.checkpoint:
        read_arguments(run)
    if not (run.epochs or run.evaluation or run.checkpoint):
        raise UserError(f"{source}: holds nothing of a run; expected {LOG}, {EVALUATION} or {LATEST}")
    return run


def read_arguments(run: RecordedRun) -> None:
    """Fill in what a run's checkpoint says of it.

    Raises:
        UserError: it cannot be read.
    """
    state = load_checkpoint(str(run.checkpoint))
    run.variant = variant_of(state)
    run.args = state["args"]
    # Projects without ENACT do not have the flag, but the tensors tell.
    clustered = any(name.endswith("W_prob.weight") for name in state["model"])
    run.args.setdefault("encoder_attention", "enact" if clustered else "mhsa")
    run.trained = state["epoch"] + 1 if is_finite(state.get("epoch")) else None
