"""The logs of a run: terminal messages, mean losses, `log.txt`, and what trackers get."""

import contextlib
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from enact_common.training.trackers import Trackers
from enact_common.utils.distributed import gather_objects, is_main_process
from enact_common.utils.errors import let_any_text_out
from enact_common.utils.files import writing

logger = logging.getLogger("enact")


def setup_logging() -> None:
    """Log plain messages to standard output, and in other processes than the main one only errors."""
    let_any_text_out()
    logging.basicConfig(
        level=logging.INFO if is_main_process() else logging.ERROR,
        format="%(message)s",
        stream=sys.stdout,
        force=True,
    )


def read_log(path: Path) -> list[dict]:
    """Return the epochs in a `log.txt`, without lines that a killed run left unfinished."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


class AverageMeter:
    """Running means of named scalars, kept on their device, so that an update does not wait for it."""

    def __init__(self):
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._count = 0

    def update(self, values: dict[str, Tensor]) -> None:
        """Add one value of each scalar; every call must have the same names."""
        with torch.no_grad():
            stacked = torch.stack(list(values.values())).double()
        self._names = tuple(values)
        self._sums = stacked if self._sums is None else self._sums + stacked
        self._count += 1

    def averages(self) -> dict[str, float]:
        """Return the means over this process's values."""
        if self._sums is None:
            return {}
        return dict(zip(self._names, (self._sums / self._count).tolist(), strict=True))

    def synchronized(self) -> dict[str, float]:
        """Return the means over the values of all processes; some processes may have no values."""
        return AverageMeter.merged(gather_objects(self.state())).averages()

    def state(self) -> dict[str, Any]:
        """Return sums and count as built-in types, for checkpoints."""
        sums = [] if self._sums is None else self._sums.tolist()
        return {"sums": dict(zip(self._names, sums, strict=True)), "count": self._count}

    @classmethod
    def merged(cls, states: Sequence[dict[str, Any]], device: torch.device | None = None) -> "AverageMeter":
        """Return a meter with the values of all these states; `device` is that of the values to add later."""
        meter = cls()
        for state in states:
            if state["count"]:
                sums = torch.tensor(list(state["sums"].values()), dtype=torch.float64, device=device)
                meter._names = tuple(state["sums"])
                meter._sums = sums if meter._sums is None else meter._sums + sums
                meter._count += state["count"]
        return meter


def is_measured(value: Any) -> bool:
    """Whether an AP, AR or PQ was measured: it is -1 without objects, and NaN for a broken model."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def main_metric(row: dict) -> float | None:
    """Return the metric that ranks evaluations: panoptic quality, else mask AP, else box AP; None if not measured."""
    if row.get("test_PQ_all"):
        metric = row["test_PQ_all"]["pq"]
    else:
        metrics = row.get("test_coco_eval_masks") or row.get("test_coco_eval_bbox")
        metric = metrics[0] if metrics else None
    return metric if is_measured(metric) else None


def scalars_of(stats: dict) -> dict[str, float]:
    """Return an epoch's scalars under the trackers' names: `train/loss`, `test/AP`, `test/AP50_masks`, `test/PQ`."""
    scalars = {name.replace("_", "/", 1): value for name, value in stats.items() if isinstance(value, int | float)}
    for key, suffix in (("test_coco_eval_bbox", ""), ("test_coco_eval_masks", "_masks")):
        for name, value in zip(("AP", "AP50"), stats.get(key, ()), strict=False):
            if is_measured(value):
                scalars[f"test/{name}{suffix}"] = value
    quality = (stats.get("test_PQ_all") or {}).get("pq")
    return scalars | ({"test/PQ": quality} if is_measured(quality) else {})


class RunLog:
    """The log of a run: `log.txt` with one JSON object per epoch under the original's keys, and the trackers' scalars.

    Args:
        output_dir: folder of the log; None writes nothing.
        trackers: the open trackers; None for none.
    """

    def __init__(self, output_dir: Path | None, trackers: Trackers | None = None):
        self._path = output_dir / "log.txt" if output_dir and is_main_process() else None
        self._trackers = trackers

    def has_epoch(self, epoch: int) -> bool:
        """Whether the log already holds this epoch."""
        if not self._path or not self._path.is_file():
            return False
        return any(row.get("epoch") == epoch for row in read_log(self._path))

    def ap_history(self, epochs: int) -> list[float]:
        """Return the `main_metric` of each evaluation in the first `epochs` epochs, in order."""
        rows = read_log(self._path) if self._path and self._path.is_file() else []
        metrics = {row.get("epoch"): main_metric(row) for row in rows}
        return [metrics[epoch] for epoch in range(epochs) if metrics.get(epoch) is not None]

    def write(self, epoch: int, stats: dict) -> None:
        """Add an epoch's scalars and its lists of COCO's twelve metrics.

        Raises:
            UserError: the log cannot be written, for example because the disk is full.
        """
        if not self._path:
            return
        # A run that was killed while writing may have left an incomplete line.
        torn = self._path.is_file() and self._path.read_bytes()[-1:] not in (b"", b"\n")
        with writing(self._path), open(self._path, "a") as file:
            file.write(("\n" if torn else "") + json.dumps({**stats, "epoch": epoch}) + "\n")
        if self._trackers:
            self._trackers.scalars(epoch, scalars_of(stats))

    def write_best(self, epoch: int, stats: dict, pictures: Callable[[], dict[str, np.ndarray]]) -> None:
        """Send the metrics of the best checkpoint so far to the trackers, under `best/`, and pictures.

        `pictures` draws them; it is called only if there are trackers.
        """
        if self._trackers:
            # Metrics have upper-case names, unlike losses.
            metrics = {name: value for name, value in scalars_of(stats).items() if re.match("test/[A-Z]", name)}
            best = {name.replace("test/", "best/"): value for name, value in metrics.items()}
            self._trackers.scalars(epoch, {**best, "best/epoch": epoch})
            self._trackers.pictures(epoch, pictures)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the trackers' runs, as finished unless an exception ended the training."""
        if self._trackers:
            self._trackers.close(kind is None)
