"""Keeping the checkpoint of the best evaluation, and stopping a training that no longer improves."""

import logging
import shutil
from pathlib import Path

from enact_common.checkpoints.files import BEST, LATEST
from enact_common.utils.distributed import gather_objects, is_main_process
from enact_common.utils.files import write_file

logger = logging.getLogger("enact")


class BestTracker:
    """A tracker of the best evaluation by `main_metric`.

    Args:
        ap_history: metrics of the evaluations so far; only the main process's list matters.
        output_dir: folder of `best.pth`; None keeps no checkpoint.
        resumed_from: the resumed checkpoint, used while the output folder has no checkpoint.
    """

    def __init__(self, ap_history: list[float], output_dir: Path | None, resumed_from: str):
        self.ap_history = ap_history
        self.output_dir = output_dir
        self.resumed_from = Path(resumed_from)

    def add(self, epoch: int, ap: float | None) -> bool:
        """Add an evaluation; if its `main_metric` is the highest so far, copy the latest checkpoint to `best.pth`.

        A metric of None (not measured) is ignored, also by `--early_stop`. Returns whether the metric is the highest so
        far.
        """
        if ap is None:
            return False
        improved = not self.ap_history or ap > max(self.ap_history)
        self.ap_history.append(ap)
        if self.output_dir is None or not improved:
            return improved
        latest = self.output_dir / LATEST
        # A run resumed from another folder may evaluate that checkpoint before it writes one.
        latest = latest if latest.is_file() else self.resumed_from
        if latest.is_file():
            with open(latest, "rb") as source:
                write_file(self.output_dir / BEST, lambda file: shutil.copyfileobj(source, file))
            logger.info("epoch %d has the highest AP so far: saved as %s", epoch, self.output_dir / BEST)
        return True

    def has_stopped_improving(self, patience: int | None) -> bool:
        """Whether the metric has not risen in the last `patience` evaluations (`--early_stop`).

        The main process, which has the metrics, decides for all processes.
        """
        stop = False
        if patience and is_main_process() and self.ap_history:
            best = self.ap_history.index(max(self.ap_history))
            since = len(self.ap_history) - 1 - best
            stop = since >= patience
            if stop:
                logger.info(
                    "--early_stop: the AP has not risen in the last %d evaluations; the highest is %.3f",
                    since, self.ap_history[best],
                )  # fmt: skip
        return gather_objects(stop)[0]
