"""Differences in AP between runs, with bootstrap intervals that are paired by image."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from enact_common.compare.pictures import evaluated_data
from enact_common.compare.recorded import RecordedRun
from enact_common.compare.tables import Table
from enact_common.compare.terms import objects, versus
from enact_common.evaluation.bootstrap import CONFIDENCE, difference_intervals, draw_images, resampled_metrics
from enact_common.evaluation.stored import RESULTS, check_recorded, match, read_results, read_truth
from enact_common.utils.errors import UserError

CHANCE = "may be chance"


@dataclass
class Difference:
    """A run's difference to the first run, `against`, in one metric, with the ends of its interval."""

    metric: str
    run: str
    against: str
    difference: float
    low: float
    high: float

    @property
    def may_be_chance(self) -> bool:
        """Whether the interval holds 0."""
        return self.low <= 0 <= self.high

    @property
    def verdict(self) -> str:
        """The reading of the interval in words."""
        return CHANCE if self.may_be_chance else f"{'higher' if self.difference > 0 else 'lower'}, hardly chance"

    def record(self) -> dict[str, Any]:
        """Return the difference in built-in types."""
        return {**asdict(self), "may_be_chance": self.may_be_chance}


def measure_differences(runs: Sequence[RecordedRun], resamples: int, seed: int) -> tuple[list[Difference], str]:
    """Return the differences of all runs to the first one, and the reason if there are none."""
    if not resamples:
        return [], "--resamples is 0"
    if len(runs) < 2:
        return [], "there is only one run"
    for what, values in (
        ("sets", [(run.evaluation or {}).get("set") for run in runs]),
        ("numbers of images", [(run.evaluation or {}).get("images") for run in runs]),
        ("classes or objects", [objects(run) for run in runs]),
    ):
        if len({value for value in values if value is not None}) > 1:
            shown = "" if what == "classes or objects" else f" ({versus(values)})"
            return [], f"the runs were evaluated on different {what}{shown}"
    lacking = [run.name for run in runs if run.results is None]
    if lacking:
        return [], (
            f"no detections ({RESULTS}) of the latest evaluation in {', '.join(lacking)}; write them with enact eval "
            "--config RUN/config.yaml --resume RUN/best.pth --output_dir RUN"
        )
    try:
        return between(runs, resamples, seed), ""
    except UserError as error:
        return [], str(error)


def between(runs: Sequence[RecordedRun], resamples: int, seed: int) -> list[Difference]:
    """Return the differences of all runs to the first one."""
    first = runs[0]
    images = (first.evaluation or {}).get("images")
    _, annotations = evaluated_data(first)
    truth = read_truth(annotations, images, bool(first.args.get("remove_difficult")))
    if images not in (None, len(truth["images"])):
        raise UserError(f"{annotations}: has {len(truth['images'])} images, and {first.name} was evaluated on {images}")
    draws = draw_images(len(truth["images"]), resamples, seed)
    metrics = {}
    for run in runs:
        metrics[run.name] = resampled_metrics(match(truth, read_results(run.results, truth)), draws, run.name)
        check_recorded(metrics[run.name][0, 0], run.evaluation, run.results)
    return [
        Difference(metric, run.name, first.name, **interval)
        for run in runs[1:]
        for metric, interval in difference_intervals(metrics[first.name], metrics[run.name]).items()
    ]


def differences_table(differences: Sequence[Difference], resamples: int) -> Table | None:
    """Return the table of the differences; None if there are none."""
    if not differences:
        return None
    several = len({one.run for one in differences}) > 1
    rows = []
    for one in differences:
        name = f"{one.metric} {one.run}" if several else one.metric
        rows.append([name, f"{one.difference:+.3f}", f"{one.low:+.3f} to {one.high:+.3f}", one.verdict])
    who = "" if several else f"{differences[0].run} "
    return Table(
        f"Differences {who}to {differences[0].against}",
        ["metric", "difference", f"{CONFIDENCE:.0%} interval", "reading"],
        rows,
        note=f"Bootstrap intervals from {resamples:,} resamples of the evaluation images, the same images for both "
        f'runs. "{CHANCE}": the interval holds 0, so other images could turn the difference around. The intervals do '
        "not cover the luck of the training; that takes runs with several seeds.",
        numeric=True,
    )
