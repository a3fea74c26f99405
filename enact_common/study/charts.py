"""The study's charts. Needs matplotlib (extra `plots`)."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from enact_common.drawing.figures import COLOURS, colour, save
from enact_common.study.families import FAMILIES
from enact_common.study.images import VAL, Shapes, draw_one

# Results by trial, arm and seed.
TrialResults = Mapping[str, Mapping[str, Mapping[int, dict]]]

# Images shown of each data set.
EXAMPLES = 5

# Points of AP; larger losses are written as numbers at the chart's edge, so that small ones can be told apart.
LEAST_SHOWN = -5.0

# Points of AP; the lowest end of the axis of the main figure, so that the best methods can be told apart.
LEAST_BY_CLUSTERS = -14.0


def draw_examples(sources: Sequence[Shapes], picture: Path) -> None:
    """Draw images as the models see them, a row for each data set, with the boxes and classes of their objects."""
    figure = Figure(figsize=(2 * EXAMPLES, 2.1 * len(sources)), layout="constrained")
    for row, source in zip(figure.subplots(len(sources), EXAMPLES, squeeze=False), sources, strict=True):
        row[0].set_ylabel(source.name)
        for axes, index in zip(row, range(EXAMPLES), strict=True):
            image, _, objects, labels = draw_one(source, VAL, index)
            axes.imshow(image)
            axes.set_xticks([])
            axes.set_yticks([])
            for scene_object, label in zip(objects, labels, strict=True):
                x, y, width, height = (source.scale * side for side in scene_object.bbox)
                axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour(label)))
                frame = {"facecolor": colour(label), "edgecolor": "none", "pad": 1}
                axes.text(x + 1, y, source.classes[label], fontsize=5, color="white", bbox=frame)
    save(figure, picture)


def draw_differences(differences: Mapping[str, Mapping[str, tuple[float, float | None]]], picture: Path) -> None:
    """Draw each arm's difference in AP to plain attention with its standard error, best first, a panel for each trial.

    `differences` are (mean, standard error or None) in points of AP, by trial and arm.
    """
    heights = [len(arms) + 2.2 for arms in differences.values()]
    figure = Figure(figsize=(9, 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(differences), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, arms) in zip(panels, differences.items(), strict=True):
        ordered = sorted(arms.items(), key=lambda item: -item[1][0])
        for place, (_, (mean, error)) in enumerate(ordered):
            if mean < LEAST_SHOWN:
                axes.text(LEAST_SHOWN, place, f" \u25c0 {mean:+.1f} ± {error or 0:.1f}", va="center", color=colour(1))
            else:
                axes.errorbar(mean, place, xerr=error, fmt="o", color=colour(1), capsize=3, markersize=6)
        axes.axvline(0, color=colour(0), linewidth=1.5)
        axes.set_xlim(LEAST_SHOWN, max(1.0, *(mean + (error or 0) + 0.3 for mean, error in arms.values())))
        axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
        axes.set_ylim(len(ordered) - 0.4, -0.6)
        axes.set_title(title)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("AP minus plain attention's, points (mean over seeds ± standard error)")
    save(figure, picture)


def draw_by_clusters(panels: Mapping[str, tuple[Mapping, Mapping]], picture: Path) -> None:
    """Draw the AP of each family minus plain attention's, by the number of clusters and by the encoder layer's time.

    A row for each trial; without times, a single row with a panel for each trial. `panels` has, by trial, the results
    of `points_of` and `timed_points`; the second may be empty.
    """
    families = list(dict.fromkeys(name for points, _ in panels.values() for name in points))
    # By the place among all families, so that a family looks alike in all charts.
    styles = {name: style_of(list(FAMILIES).index(name)) for name in families}
    timed = any(times for _, times in panels.values())
    shape = (len(panels), 2) if timed else (1, len(panels))
    figure = Figure(figsize=(6.5 * shape[1], 5 * shape[0] + 1.5), layout="constrained")
    grid = figure.subplots(*shape, squeeze=False)
    handles = {}
    for i, (title, (points, times)) in enumerate(panels.items()):
        axes = grid[i, 0] if timed else grid[0, i]
        budgets = sorted({count for values in points.values() for count in values if count is not None})
        for name, values in points.items():
            # Side by side, so that error bars at the same number do not hide each other.
            shift = 1 + 0.012 * (families.index(name) - len(families) / 2)
            counts = [count for count in budgets if count in values]
            if None in values:
                # A method without a number of clusters is a line across.
                axes.axhline(values[None][0], color=styles[name]["color"], linestyle=styles[name]["linestyle"])
            drawn = [values[count] for count in counts] or [values[None]]
            means, errors = zip(*((mean, error or 0) for mean, error in drawn), strict=True)
            places = [shift * count for count in counts] or [shift * budgets[-1]]
            handles[name] = axes.errorbar(places, means, errors, capsize=2, **styles[name])
        axes.set_xscale("log")
        axes.set_xticks(budgets, list(map(str, budgets)))
        axes.minorticks_off()
        axes.set_xlabel("most clusters or keys per image")
        axes.set_ylabel("AP minus plain attention's, points")
        axes.set_title(title)
        ends = [mean + sign * (error or 0) for v in points.values() for mean, error in v.values() for sign in (-1, 1)]
        limits = max(min(ends) - 0.5, LEAST_BY_CLUSTERS), max(1.0, max(ends) + 0.5)
        shown = [axes, grid[i, 1]] if timed else [axes]
        for name, values in times.items():
            ratios, means, errors = zip(*values, strict=True)
            # Without lines: the times of neighbouring numbers of clusters differ less than their errors.
            style = {**styles[name], "linestyle": "none"}
            grid[i, 1].errorbar(ratios, means, [error or 0 for error in errors], capsize=2, **style)
            grid[i, 1].set_xlabel("time of an encoder layer over plain attention's")
        for panel in shown:
            panel.axhline(0, color=colour(0), linewidth=1.5)
            panel.set_ylim(limits)
            panel.grid(alpha=0.3)
    titles = [FAMILIES[name].title for name in handles]
    figure.legend(list(handles.values()), titles, loc="outside lower center", ncols=min(shape[1], 2), fontsize=9)
    save(figure, picture)


def style_of(index: int) -> dict[str, str]:
    """Return the line style of the index-th family: colours first, then dashes."""
    return {
        "color": colour(1 + index % (len(COLOURS) - 1)),
        "linestyle": ("-", "--", ":")[index // (len(COLOURS) - 1) % 3],
        "marker": "os^v"[index // (len(COLOURS) - 1) % 4],
    }


def draw_clusters(results: TrialResults, picture: Path) -> None:
    """Draw the clusters per image in the first and last encoder layer during training, averaged over seeds.

    As many arms as there are colours are drawn, of results only for arms whose clusters follow trained scores.
    """
    figure = Figure(figsize=(5.2 * len(results), 4.2), layout="constrained")
    for axes, (title, arms) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        for i, (name, runs) in enumerate(itertools.islice(arms.items(), len(COLOURS))):
            rows = list(zip(*(run["clusters"] for run in runs.values()), strict=False))
            steps = [row[0]["step"] for row in rows]
            for layer, style in ((0, "-"), (-1, "--")):
                counts = [statistics.mean(run["clusters"][layer] for run in row) for row in rows]
                label = name if layer == 0 else None
                axes.plot(steps, counts, style, color=colour(i), linewidth=1.2, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("clusters per image")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2)
    figure.suptitle("First encoder layer solid, last dashed", fontsize=10)
    save(figure, picture)
