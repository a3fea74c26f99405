"""What runs leave in their folders, read back for plots and comparisons: logs and evaluation records.

Logs of the original repositories are read too, and whatever a log or a record lacks is left out.
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

# An epoch's key for COCO's twelve figures, as the original named it.
METRICS_KEY = "test_coco_eval_bbox"

# The curves that are drawn of runs. Title: quantities, each with its name, its key and, where the key holds a list, its
# place there. The first of each is what readers look for.
CURVES = {
    "Loss": (("validation", "test_loss", None), ("training", "train_loss", None)),
    "Average precision": (("AP", METRICS_KEY, 0), ("AP50", METRICS_KEY, 1)),
    "Learning rate": (("learning rate", "train_lr", None),),
}


def read_epochs(source: Path) -> list[dict]:
    """The epochs of a run, in order, each once.

    A run that was resumed from an earlier checkpoint logs epochs again: they take the place of the first ones and of
    all that came after those.

    Args:
        source: a `log.txt`, of ours or of the original repositories, or the folder of one.

    Raises:
        UserError: there is no such file, or no line of it is an epoch.
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
        raise UserError(f"{path}: not a run's log: no line of it is a JSON object with a number 'epoch'")
    return epochs


def read_evaluation(source: Path) -> dict[str, Any]:
    """An evaluation's record, as `evaluation_record` makes it, without what is no number.

    A broken model has detections, and then figures, that are none: a class's `AP` and `AP50` are None then, and such
    curves are not in its `precision`.

    Args:
        source: an `evaluation.json`, or the folder of one.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    path = source / EVALUATION if source.is_dir() else source
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an {EVALUATION}, which training and --eval write")
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    if not is_record(record):
        raise UserError(f"{path}: not the record of an evaluation; expected an {EVALUATION} as training and --eval do")
    for row in record["classes"]:
        row |= {figure: row[figure] if is_finite(row[figure]) else None for figure in ("AP", "AP50")}
        row["precision"] = {iou: curve for iou, curve in row["precision"].items() if all(map(is_finite, curve))}
    return record


def is_record(record: Any) -> bool:
    """Whether this has the form of an evaluation's record; what should be a number may be NaN or None."""
    if not (isinstance(record, dict) and isinstance(record.get("figures"), dict)):
        return False
    recall, classes = record.get("recall"), record.get("classes")
    if not (isinstance(recall, list) and isinstance(classes, list)):
        return False
    return all(
        isinstance(row, dict)
        and {"category_id", "name", "objects", "AP", "AP50"} <= row.keys()
        and all(row[figure] is None or isinstance(row[figure], int | float) for figure in ("AP", "AP50"))
        and isinstance(row.get("precision"), dict)
        and all(isinstance(curve, list) and len(curve) == len(recall) for curve in row["precision"].values())
        for row in classes
    )


def classes_by_name(records: Sequence[dict]) -> list[dict[str, dict]]:
    """The classes of evaluations, under names that tell them apart: those of one name in a record have their ids too.

    Data sets may number their classes differently: otherwise a name is the same class in all records.

    Args:
        records: of `read_evaluation`.

    Returns:
        of each record, name to class, in its order.
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
    """Whether this is a finite number: what has a place in a chart."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def series(epochs: Sequence[dict], key: str, position: int | None = None) -> list[tuple[int, float]]:
    """A quantity after each epoch that has it, as (epochs done, value). COCO's figures of -1 are left out.

    Args:
        epochs: of `read_epochs`.
        key: of the quantity.
        position: in the list of COCO's figures that the key holds; None where it holds a number.
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
    """What to call runs: as the user says, else by as much of the end of their paths as tells them apart.

    Args:
        sources: run folders, or files in them.
        names: the user's, one a run; None for none.

    Raises:
        UserError: there are not as many names as runs, or two names are equal.
    """
    if names is not None:
        if len(names) != len(sources):
            raise UserError(f"--names: {len(names)} names for {len(sources)} runs, there must be one for each")
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise UserError(f"--names: {repeated!r} stands twice, runs must have names of their own")
        return list(names)
    folders = [source.parent if source.name in (LOG, EVALUATION) else source for source in sources]
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        found = ["/".join(own[-depth:]) for own in parts]
        if len(set(found)) == len(found):
            return found
    repeated = next(source for i, source in enumerate(sources) if parts[i] in parts[:i])
    raise UserError(f"{repeated}: is given twice; --names can tell its appearances apart")
