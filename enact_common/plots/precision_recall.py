"""Precision by recall of each class, as COCO's evaluation samples it. Needs matplotlib (extra `plots`)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from enact_common.drawing.figures import GREY, colour, literal, save
from enact_common.training.run_logs import classes_by_name
from enact_common.utils.errors import UserError

# Keys of a class's `precision`, with their titles.
OVERLAPS = {"0.5": "IoU 0.5", "0.75": "IoU 0.75", "mean": "mean over IoU 0.5 to 0.95"}

# Keys at which several runs are compared, with their line styles.
COMPARED = {"0.5": "-", "0.75": "--"}

# Beyond this many classes, only the extremes get a colour or a panel.
MOST_COLOURS = 8
MOST_PANELS = 9
EXTREMES = 3

MEAN = "mean of all classes"


def plot_precision_recall(records: Mapping[str, dict], picture: Path) -> None:
    """Draw precision by recall.

    One run has a panel for each of `OVERLAPS`, with a line for each class. With too many classes, only the best and the
    worst have a colour, and the others are grey. Several runs have a panel for each class and one for their mean. With
    too many classes, only those that differ most between the first and the last run have a panel.

    Args:
        records: run name to record, from `read_evaluation`.
        picture: file to write; its suffix sets the format.

    Raises:
        UserError: there is nothing to draw, or the picture cannot be written.
    """
    if not any(record["classes"] for record in records.values()):
        raise UserError(f"{', '.join(records)}: nothing to draw: no class has ground truth")
    if not any(row["precision"].keys() & OVERLAPS for record in records.values() for row in record["classes"]):
        raise UserError(f"{', '.join(records)}: nothing to draw: no class has a finite precision")
    figure = one_run(*next(iter(records.items()))) if len(records) == 1 else several_runs(records)
    save(figure, picture)


def one_run(name: str, record: dict) -> Figure:
    """Draw one run: a panel for each IoU threshold, a line for each class."""
    (classes,) = classes_by_name([record])
    # All panels show the same classes in the same colours.
    ranked = sorted(
        (key for key, row in classes.items() if row["precision"]), key=lambda key: -(classes[key]["AP"] or 0)
    )
    many = len(ranked) > MOST_COLOURS
    shown = [*ranked[:EXTREMES], *ranked[-EXTREMES:]] if many else ranked
    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    for axes, (overlap, title) in zip(figure.subplots(1, 3, sharey=True), OVERLAPS.items(), strict=True):
        curves = {key: row["precision"][overlap] for key, row in classes.items() if overlap in row["precision"]}
        for class_name in curves.keys() - shown:
            axes.plot(record["recall"], curves[class_name], color=GREY, linewidth=0.6, alpha=0.6)
        for i, class_name in enumerate(shown):
            if class_name in curves:
                draw_curve(axes, record["recall"], curves[class_name], class_name, color=colour(i))
        if len(curves) > 1:
            mean = np.mean(list(curves.values()), axis=0)
            draw_curve(axes, record["recall"], mean, MEAN, color="black", linewidth=2.6)
        finish(axes, title)
        legend_below(axes)
        axes.set_xlabel("recall")
    figure.axes[0].set_ylabel("precision")
    figure.suptitle(literal(name) + (f", the {EXTREMES} best and worst of {len(ranked)} classes" if many else ""))
    return figure


def several_runs(records: Mapping[str, dict]) -> Figure:
    """Draw several runs: a panel for each class, a colour for each run."""
    by_run = classes_by_name(list(records.values()))
    panels = chosen_classes(by_run)
    columns = min(len(panels), 3 if len(panels) > 4 else 4 if len(panels) == 4 else len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.1 * columns, 3.9 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for i, (record, classes) in enumerate(zip(records.values(), by_run, strict=True)):
            for overlap, line in COMPARED.items():
                curves = curves_of(classes, panel, overlap)
                if curves:
                    label = f"{np.mean(curves):.3f}"
                    axes.plot(
                        record["recall"], np.mean(curves, axis=0), line, color=colour(i), linewidth=1.8, label=label
                    )
        finish(axes, literal(panel))
        legend_of_runs(axes)
    if panels[0] == MEAN:
        first, *_, last = map(literal, records)
        figure.suptitle(f"The classes whose AP50 differs most between {first} and {last}")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for column in range(columns):
        last = max(i for i in range(len(panels)) if i % columns == column)
        grid.flat[last].set_xlabel("recall")
        grid.flat[last].tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("precision")
    handles = [Line2D([], [], color=colour(i), linewidth=2.5, label=literal(name)) for i, name in enumerate(records)]
    handles += [Line2D([], [], color="#555555", linestyle=line, label=OVERLAPS[o]) for o, line in COMPARED.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    return figure


def chosen_classes(by_run: Sequence[Mapping[str, dict]]) -> list[str]:
    """Return the panels of several runs: the mean and the classes, or the most different ones of many."""
    names = list(dict.fromkeys(name for classes in by_run for name in classes))
    if len(names) == 1:
        return names
    if len(names) < MOST_PANELS:
        return [*names, MEAN]
    first, *_, last = (
        {name: row["AP50"] for name, row in classes.items() if row["AP50"] is not None} for classes in by_run
    )
    gains = sorted((name for name in names if name in first and name in last), key=lambda n: last[n] - first[n])
    half = (MOST_PANELS - 1) // 2
    ends = [*reversed(gains[-half:]), *gains[:half]] if len(gains) >= 2 * half else gains
    return [MEAN, *ends]


def curves_of(classes: Mapping[str, dict], panel: str, overlap: str) -> list[Sequence[float]]:
    """Return the curves whose mean a panel shows: one class's, or those of all classes."""
    rows = [row for name, row in classes.items() if panel in (MEAN, name)]
    return [row["precision"][overlap] for row in rows if overlap in row["precision"]]


def draw_curve(axes, recall: Sequence[float], precision: Sequence[float], name: str, **style) -> None:
    """Draw one curve, with its AP, the area below it, in the legend."""
    axes.plot(recall, precision, label=f"{np.mean(precision):.3f}  {literal(name)}", **{"linewidth": 1.6, **style})


def finish(axes, title: str) -> None:
    """Give a panel its title and its axes."""
    axes.set(title=title, xlim=(0, 1), ylim=(0, 1.03))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(axes) -> None:
    """Put a legend below a panel, where it covers no curve."""
    axes.legend(
        title="AP", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=8,
        title_fontsize=8,
    )  # fmt: skip


def legend_of_runs(axes) -> None:
    """Add a legend with the APs of a panel's lines, one column per IoU threshold."""
    handles, labels = axes.get_legend_handles_labels()
    # matplotlib fills legends column by column, so sort the lines by IoU threshold.
    order = [i for start in range(len(COMPARED)) for i in range(start, len(handles), len(COMPARED))]
    axes.legend(
        [handles[i] for i in order], [labels[i] for i in order], ncols=len(COMPARED), title="AP", fontsize=8,
        title_fontsize=8, frameon=True, framealpha=0.8, edgecolor="none", loc="best",
    )  # fmt: skip
