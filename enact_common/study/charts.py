"""The study's charts. Needs matplotlib (extra `plots`)."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from enact_common.drawing.figures import COLOURS, colour, save
from enact_common.study.arms import PLAIN
from enact_common.study.images import VAL, Shapes, draw_one

# Results by trial, arm and seed.
TrialResults = Mapping[str, Mapping[str, Mapping[int, dict]]]

# Images shown of each data set.
EXAMPLES = 5


def draw_examples(sources: Sequence[Shapes], picture: Path) -> None:
    """Draw images as the models see them, a row for each data set, with the boxes and classes of their objects.

    Args:
        sources: the data sets.
        picture: file to write.
    """
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


def draw_precision(results: TrialResults, picture: Path) -> None:
    """Draw the AP of each arm, a dot for each seed and a bar for their mean, a panel for each trial.

    Args:
        results: results by trial, arm and seed.
        picture: file to write.
    """
    most = max(len(arms) for arms in results.values())
    figure = Figure(figsize=(4.6 * len(results), 0.34 * most + 1.4), layout="constrained")
    for axes, (title, arms) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        names = list(arms)
        for place, name in enumerate(names):
            values = [100 * run["figures"]["AP"] for run in arms[name].values()]
            axes.barh(place, statistics.mean(values), color=colour(0 if name == PLAIN else 1), alpha=0.45)
            axes.plot(values, [place] * len(values), "o", color="black", markersize=4)
        if PLAIN in arms:
            plain = statistics.mean(100 * run["figures"]["AP"] for run in arms[PLAIN].values())
            axes.axvline(plain, color=colour(0), linestyle="--", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("AP, percent")
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    save(figure, picture)


def draw_clusters(results: TrialResults, picture: Path) -> None:
    """Draw the clusters per image in the first and last encoder layer during training, averaged over seeds, for as many
    arms as there are colours.

    Args:
        results: as in `draw_precision`, only for arms whose clusters follow trained scores.
        picture: file to write.
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
