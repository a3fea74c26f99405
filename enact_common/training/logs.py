"""What a run says: progress on the terminal, averages of losses, `log.txt`, TensorBoard."""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from enact_common.utils.distributed import gather_objects, is_main_process
from enact_common.utils.errors import let_any_text_out
from enact_common.utils.files import writing

logger = logging.getLogger("enact")


def setup_logging() -> None:
    """Plain messages on standard output, from the main process alone."""
    let_any_text_out()
    logging.basicConfig(
        level=logging.INFO if is_main_process() else logging.ERROR,
        format="%(message)s",
        stream=sys.stdout,
        force=True,
    )


def read_log(path: Path) -> list[dict]:
    """The epochs in a `log.txt`; a line that a killed run left unfinished is passed over."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


class AverageMeter:
    """Running means of named scalars. They stay on their device, so that adding to them waits for nothing."""

    def __init__(self):
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._count = 0

    def update(self, values: dict[str, Tensor]) -> None:
        """Add one value of each scalar; names are the same in every call."""
        with torch.no_grad():
            stacked = torch.stack(list(values.values())).double()
        self._names = tuple(values)
        self._sums = stacked if self._sums is None else self._sums + stacked
        self._count += 1

    def averages(self) -> dict[str, float]:
        """Means over this process's values."""
        if self._sums is None:
            return {}
        return dict(zip(self._names, (self._sums / self._count).tolist(), strict=True))

    def synchronized(self) -> dict[str, float]:
        """Means over the values of all processes, of which some may have none."""
        total = AverageMeter.merged(gather_objects(self.state()))
        return total.averages()

    def state(self) -> dict[str, Any]:
        """What has been added, in built-in types."""
        sums = [] if self._sums is None else self._sums.tolist()
        return {"sums": dict(zip(self._names, sums, strict=True)), "count": self._count}

    @classmethod
    def merged(cls, states: Sequence[dict[str, Any]], device: torch.device | None = None) -> "AverageMeter":
        """A meter to which all was added that made these states.

        Args:
            states: of `state`.
            device: where the values that follow are.
        """
        meter = cls()
        for state in states:
            if state["count"]:
                sums = torch.tensor(list(state["sums"].values()), dtype=torch.float64, device=device)
                meter._names = tuple(state["sums"])
                meter._sums = sums if meter._sums is None else meter._sums + sums
                meter._count += state["count"]
        return meter


def is_measured(value: Any) -> bool:
    """Whether an AP, AR or PQ is a measurement: -1 says that there was nothing to measure, NaN that the model broke."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def main_metric(row: dict) -> float | None:
    """The metric that an epoch's evaluation is compared by: the panoptic quality, the AP of masks or the AP of boxes,
    the first that the model was evaluated for; None where it was not measured."""
    if row.get("test_PQ_all"):
        figure = row["test_PQ_all"]["pq"]
    else:
        figures = row.get("test_coco_eval_masks") or row.get("test_coco_eval_bbox")
        figure = figures[0] if figures else None
    return figure if is_measured(figure) else None


class RunLog:
    """`log.txt`, one JSON object an epoch under the original's keys, and TensorBoard scalars beside it.

    Args:
        output_dir: folder of both; None writes nothing.
    """

    def __init__(self, output_dir: Path | None):
        self._path = output_dir / "log.txt" if output_dir and is_main_process() else None
        self._board = None
        if self._path:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                logger.info("TensorBoard is not installed: no event files (pip install tensorboard brings them)")
            else:
                self._board = SummaryWriter(output_dir / "tensorboard")

    def has_epoch(self, epoch: int) -> bool:
        """Whether the log holds this epoch already."""
        if not self._path or not self._path.is_file():
            return False
        return any(row.get("epoch") == epoch for row in read_log(self._path))

    def ap_history(self, epochs: int) -> list[float]:
        """The `main_metric` of each evaluation in the first so many epochs, in order."""
        rows = read_log(self._path) if self._path and self._path.is_file() else []
        figures = {row.get("epoch"): main_metric(row) for row in rows}
        return [figures[epoch] for epoch in range(epochs) if figures.get(epoch) is not None]

    def write(self, epoch: int, stats: dict) -> None:
        """Add an epoch: scalars, and lists of COCO's twelve figures: `test_coco_eval_bbox` and, with masks,
        `test_coco_eval_masks`.

        Raises:
            UserError: the disk is full, say.
        """
        if not self._path:
            return
        # A run that was killed while it wrote may have left half a line.
        torn = self._path.is_file() and self._path.read_bytes()[-1:] not in (b"", b"\n")
        with writing(self._path), open(self._path, "a") as file:
            file.write(("\n" if torn else "") + json.dumps({**stats, "epoch": epoch}) + "\n")
        if self._board:
            with writing(self._path.parent / "tensorboard"):
                self._draw(epoch, stats)

    def _draw(self, epoch: int, stats: dict) -> None:
        """Give an epoch's numbers to TensorBoard."""
        for name, value in stats.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name.replace("_", "/", 1), value, epoch)
        for key, suffix in (("test_coco_eval_bbox", ""), ("test_coco_eval_masks", "_masks")):
            for name, value in zip(("AP", "AP50"), stats.get(key, ()), strict=False):
                if is_measured(value):
                    self._board.add_scalar(f"test/{name}{suffix}", value, epoch)
        self._board.flush()

    def close(self) -> None:
        """End the event file."""
        if self._board:
            self._board.close()
