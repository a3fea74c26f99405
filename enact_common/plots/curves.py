"""Loss, AP and learning rate of runs by epoch. Needs matplotlib (extra `plots`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from enact_common.drawing.figures import colour, literal, save
from enact_common.training.run_logs import CURVES, METRICS_KEY, series
from enact_common.utils.errors import UserError

# Line styles of a panel's first quantity, which matters most, and of its second.
LINES = ("-", "--")

# Up to this many epochs, each has a dot to show that the line between epochs is not measured.
DOTTED_EPOCHS = 30


def plot_curves(runs: Mapping[str, Sequence[dict]], picture: Path) -> None:
    """Draw the curves of one or several runs, with a panel for each kind of quantity.

    For several runs, colours mean runs and line styles mean quantities. For one run, colours mean quantities.

    Args:
        runs: name to epochs, from `read_epochs`. Quantities that a log lacks and empty panels are left out.
        picture: file to write; its suffix sets the format.

    Raises:
        UserError: there is nothing to draw, or the picture cannot be written.
    """
    plots = {
        title: quantities
        for title, quantities in CURVES.items()
        if any(series(epochs, key, place) for epochs in runs.values() for _, key, place in quantities)
    }
    if not plots:
        keys = ", ".join(key for key in dict.fromkeys(key for panel in CURVES.values() for _, key, _ in panel))
        raise UserError(f"{', '.join(runs)}: nothing to draw; expected one of the keys {keys}")
    figure = Figure(figsize=(4.4 * len(plots) + 0.4, 4.2), layout="constrained")
    for axes, (title, quantities) in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots.items(), strict=True):
        for i, epochs in enumerate(runs.values()):
            for j, (name, key, place) in enumerate(quantities):
                style = {"color": colour(i), "linestyle": LINES[j]} if len(runs) > 1 else {"color": colour(j)}
                draw_line(axes, series(epochs, key, place), name, style)
        finish(axes, title, [name for name, _, _ in quantities] if len(runs) > 1 else None)
    if len(runs) > 1:
        handles = [
            Line2D([], [], color=colour(i), linewidth=2.5, label=run_text(name, epochs))
            for i, (name, epochs) in enumerate(runs.items())
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(runs), 3), frameon=False)
    else:
        figure.suptitle(run_text(*next(iter(runs.items()))))
    save(figure, picture)


def draw_line(axes, points: Sequence[tuple[int, float]], name: str, style: dict) -> None:
    """Draw a quantity of one run if it has points."""
    if points:
        dots = {"marker": "o", "markersize": 3.5} if len(points) <= DOTTED_EPOCHS else {}
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.8, **dots, **style)


def finish(axes, title: str, styles: Sequence[str] | None) -> None:
    """Give a panel its title, its axes and its legend, with the meaning of each line style if colours mean runs."""
    axes.set(title=title, xlabel="epochs done")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if title == "Learning rate":
        axes.ticklabel_format(axis="y", scilimits=(0, 0))
        return
    handles = None
    if styles is not None:
        handles = [
            Line2D([], [], color="#555555", linestyle=line, label=name)
            for line, name in zip(LINES, styles, strict=True)
        ]
    axes.legend(handles=handles, frameon=False)


def run_text(name: str, epochs: Sequence[dict]) -> str:
    """Return a run's name with its last AP, if any, escaped for matplotlib."""
    ap = series(epochs, METRICS_KEY, 0)
    return literal(f"{name} (AP {ap[-1][1]:.3f} after {ap[-1][0]} epochs)" if ap else name)
