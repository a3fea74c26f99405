"""Reading the logs and evaluation records of runs, for plots and comparisons.

Logs of the original repositories work too; values that a log or a record lacks are left out.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from enact_common.evaluation.coco import EVALUATION
from enact_common.training.logs import is_measured, read_log
from enact_common.utils.errors import UserError

LOG = "log.txt"

# The log's key for COCO's twelve metrics, as the original named it.
METRICS_KEY = "test_coco_eval_bbox"

# The curves of a run, as {title: quantities}. A quantity has a name, a key and, if the key holds a list, its index
# there. The most important quantity comes first.
CURVES = {
    "Loss": (("validation", "test_loss", None), ("training", "train_loss", None)),
    "Average precision": (("AP", METRICS_KEY, 0), ("AP50", METRICS_KEY, 1)),
    "Learning rate": (("learning rate", "train_lr", None),),
}


def read_epochs(source: Path) -> list[dict]:
    """Return the epochs of a run, in order, each once.

    A run that was resumed from an earlier checkpoint logs some epochs again. The new epochs replace the old ones and
    all that followed them. The source is a `log.txt`, of this project or of an original repository, or its folder.

    Raises:
        UserError: there is no such file, or none of its lines is an epoch.
    """
    path = source / LOG if source.is_dir() else source
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a run's {LOG}, or its folder")
    try:
        rows = read_log(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error
    epochs: list[dict] = []
    for row in rows:
        if isinstance(row, dict) and is_finite(row.get("epoch")):
            epochs = [earlier for earlier in epochs if earlier["epoch"] < row["epoch"]] + [row]
    if not epochs:
        raise UserError(f"{path}: not a run's log: no line is a JSON object with a number 'epoch'; pass a run's {LOG}")
    return epochs


def read_evaluation(source: Path) -> dict[str, Any]:
    """Return the record of an evaluation, as `evaluation_record` makes it, without NaN and Inf.

    A broken model can have metrics that are not finite. Then the `AP` and `AP50` of a class are None, and its
    `precision` lacks those curves. The source is an `evaluation.json`, or its folder.

    Raises:
        UserError: there is no such file, or it is not an evaluation's record.
    """
    path = source / EVALUATION if source.is_dir() else source
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an {EVALUATION}, which training and --eval write")
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    if not is_record(record):
        raise UserError(f"{path}: not an evaluation's record; pass an {EVALUATION}, which training and --eval write")
    for row in record["classes"]:
        row |= {metric: row[metric] if is_finite(row[metric]) else None for metric in ("AP", "AP50")}
        row["precision"] = {iou: curve for iou, curve in row["precision"].items() if all(map(is_finite, curve))}
    return record


def is_record(record: Any) -> bool:
    """Whether this has the form of an evaluation's record; numbers may be NaN or None."""
    if not (isinstance(record, dict) and isinstance(record.get("figures"), dict)):
        return False
    recall, classes = record.get("recall"), record.get("classes")
    if not (isinstance(recall, list) and isinstance(classes, list)):
        return False
    return all(
        isinstance(row, dict)
        and {"category_id", "name", "objects", "AP", "AP50"} <= row.keys()
        and all(row[metric] is None or isinstance(row[metric], int | float) for metric in ("AP", "AP50"))
        and isinstance(row.get("precision"), dict)
        and all(isinstance(curve, list) and len(curve) == len(recall) for curve in row["precision"].values())
        for row in classes
    )


def classes_by_name(records: Sequence[dict]) -> list[dict[str, dict]]:
    """Return the classes of evaluations by unique names; a name that repeats within a record is extended by the id.

    Classes are matched by name, because data sets may number them differently.

    Returns:
        {name: class} for each record, in the record's order.
    """
    counts = [Counter(row["name"] for row in record["classes"]) for record in records]
    repeated = {name for count in counts for name, times in count.items() if times > 1}
    return [
        {
            f"{row['name']} (id {row['category_id']})" if row["name"] in repeated else row["name"]: row
            for row in record["classes"]
        }
        for record in records
    ]


def is_finite(value: Any) -> bool:
    """Whether this is a finite number, which a chart can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def series(epochs: Sequence[dict], key: str, position: int | None = None) -> list[tuple[int, float]]:
    """Return a quantity over the epochs that have it, as (epochs done, value), without COCO metrics of -1.

    `position` is the index in the key's list of COCO metrics; None if the key holds a number.
    """
    points = []
    for row in epochs:
        value = row.get(key)
        if position is not None:
            value = value[position] if isinstance(value, list) and position < len(value) else None
            value = value if is_measured(value) else None
        if is_finite(value):
            points.append((row["epoch"] + 1, value))
    return points


def run_names(sources: Sequence[Path], names: Sequence[str] | None = None) -> list[str]:
    """Return a name for each run, a folder or a file in it: the user's, else the shortest path endings that are unique.

    Raises:
        UserError: the numbers of names and runs differ, or two names or runs are equal.
    """
    if names is not None:
        if len(names) != len(sources):
            raise UserError(f"--names: {len(names)} names for {len(sources)} runs; pass one name per run")
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise UserError(f"--names: {repeated!r} appears twice; give each run a different name")
        return list(names)
    folders = [source.parent if source.name in (LOG, EVALUATION) else source for source in sources]
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        endings = ["/".join(path_parts[-depth:]) for path_parts in parts]
        if len(set(endings)) == len(endings):
            return endings
    repeated = next(source for i, source in enumerate(sources) if parts[i] in parts[:i])
    raise UserError(f"{repeated}: is given twice; pass --names to tell the two apart")
