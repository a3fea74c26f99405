"""Charts of the benchmarks. Needs matplotlib (extra `plots`)."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from enact_common.attention.rivals import RIVALS
from enact_common.benchmark.isolated import DONE
from enact_common.benchmark.labels import GIB, GPU_LAYERS, GRAPHED_LAYERS, LAYERS, MIB, PARTS, ROWS, precision_text
from enact_common.drawing.figures import save

# The palette of Okabe and Ito is safe for colour-blind readers. Plain attention has cool colours, clustered attention
# warm ones, in all charts.
ROW_COLOURS = {"eager": "#999999", "efficient": "#0072B2", "enact": "#D55E00"}
LAYER_COLOURS = {
    "mha_eager": "#999999",
    "mha": "#0072B2",
    "enact": "#D55E00",
    "enact_regions": "#CC79A7",
    "enact_limited": "#8C4B00",
    "rcda": "#009E73",
    "clustered_rcda": "#E69F00",
    "enact_equal": "#F0E442",
}
# Rivals reuse these colours, on dashed lines.
LAYER_COLOURS |= dict(zip(RIVALS, itertools.cycle(LAYER_COLOURS.values())))
# Layers that need a GPU have the colours of the others, on dotted lines, and CUDA graphs on dash-dotted ones.
LAYER_COLOURS |= {name: LAYER_COLOURS[layer] for name, layer in GPU_LAYERS.items()}
LINES = dict.fromkeys(RIVALS, "--") | dict.fromkeys(GPU_LAYERS, ":") | dict.fromkeys(GRAPHED_LAYERS, "-.")
PART_COLOURS = dict(zip(PARTS, ("#999999", "#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7"), strict=True))
CACHE_COLOURS = {"off": "#999999", "encoded": "#0072B2", "decoded": "#D55E00"}


def grouped_bars(
    axes, groups: Sequence[str], bars: dict[str, list[dict | str | None]], colours: dict[str, str], form: str
) -> None:
    """Draw bars side by side in groups, whose names are printed below the axis.

    `bars` maps a bar's name to its value in each group: `median`, `least` and `most`; a status word if the measurement
    failed; None for no bar. `form` is the format spec of the numbers above the bars.
    """
    width = 0.8 / len(bars)
    for i, (name, values) in enumerate(bars.items()):
        places = [group + (i - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        points = [(place, value) for place, value in zip(places, values, strict=True) if isinstance(value, dict)]
        medians = [value["median"] for _, value in points]
        reach = [[abs(value["median"] - value[end]) for _, value in points] for end in ("least", "most")]
        axes.bar([place for place, _ in points], medians, 0.92 * width, color=colours[name])
        axes.errorbar([place for place, _ in points], medians, reach, fmt="none", ecolor="black", elinewidth=0.8)
        for place, value in points:
            # Rotated to keep neighbours from overlapping; placed above the whisker.
            axes.annotate(
                format(value["median"], form), (place, value["most"]), xytext=(0, 3), textcoords="offset points",
                rotation=90, fontsize=8, horizontalalignment="center", verticalalignment="bottom",
            )  # fmt: skip
        for place, value in zip(places, values, strict=True):
            if isinstance(value, str):
                # The y position is in axes units, because a failed bar has no data value.
                axes.text(
                    place, 0.02, value, color=colours[name], rotation=90, fontsize=8, horizontalalignment="center",
                    verticalalignment="bottom", transform=axes.get_xaxis_transform(),
                )  # fmt: skip
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.margins(y=0.2)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def finish(figure: Figure, title: str, handles: Sequence, path: Path, columns: int | None = None) -> None:
    """Add a title and one legend for all panels (one row, or `columns` columns), and save the figure."""
    figure.suptitle(title, fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns or len(handles), frameon=False)
    save(figure, path)


def title_of(figures: dict) -> str:
    """Return the title of a chart of models: the images, the precision and the machine."""
    settings = figures["settings"]
    height, width = settings["size"]
    return f"{height} x {width} pixels, {settings['precision']}, {settings['images']}\n{figures['machine']}"


def draw_table(figures: dict, path: Path) -> None:
    """Draw peak memory, training time and inference time of each model as bars, from the figures of `table`."""
    rows = {(row["variant"], row["row"]): row for row in figures["rows"]}
    variants = list(dict.fromkeys(variant for variant, _ in rows))
    names = [name for name in ROWS if any(row == name for _, row in rows)]
    models = {row["variant"]: f"{row['model']}\nbatch {row['batch']}".replace(", ", "\n") for row in figures["rows"]}

    def value(variant: str, name: str, phase: str, quantity: str) -> dict | str | None:
        row = rows.get((variant, name))
        if row is None or row[phase]["status"] != DONE:
            return row and row[phase]["status"]
        if quantity == "memory":
            return dict.fromkeys(("median", "least", "most"), row[phase]["memory"]["peak"] / GIB)
        return row[phase]["seconds_per_image"]

    canvas = Figure(figsize=(13, 5), layout="constrained")
    panels = (
        ("training", "memory", "peak memory in training, GiB", ".1f"),
        ("training", "time", "training, seconds per image", ".3g"),
        ("inference", "time", "inference, seconds per image", ".3g"),
    )
    for axes, (phase, quantity, title, form) in zip(canvas.subplots(1, 3), panels, strict=True):
        bars = {name: [value(variant, name, phase, quantity) for variant in variants] for name in names}
        grouped_bars(axes, [models[variant] for variant in variants], bars, ROW_COLOURS, form)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_ylabel(title)
    finish(canvas, title_of(figures), [Patch(color=ROW_COLOURS[name], label=ROWS[name][0]) for name in names], path)


def draw_parts(figures: dict, path: Path) -> None:
    """Draw each model's training step as a stacked bar of its parts, from the figures of `parts`."""
    rows = [row for row in figures["rows"] if row["seconds"]]
    canvas = Figure(figsize=(9, 1.6 + 0.5 * len(rows)), layout="constrained")
    axes = canvas.subplots()
    places = [-place for place in range(len(rows))]
    lefts = [0.0] * len(rows)
    for part, colour in PART_COLOURS.items():
        lengths = [row["seconds"][part]["median"] for row in rows]
        axes.barh(places, lengths, 0.75, left=lefts, color=colour)
        lefts = [left + length for left, length in zip(lefts, lengths, strict=True)]
    axes.set_yticks(places, [f"{row['model']}, {ROWS[row['row']][0]}" for row in rows], fontsize=8)
    axes.set_xlabel("seconds per batch, forward and backward")
    finish(canvas, title_of(figures), [Patch(color=colour, label=part) for part, colour in PART_COLOURS.items()], path)


def draw_scaling(figures: dict, path: Path) -> None:
    """Draw time and memory of each layer over the number of tokens, on log axes, from the figures of `scaling`."""
    canvas = Figure(figsize=(11, 6), layout="constrained")
    times, memories = canvas.subplots(1, 2)
    handles = []
    for name in dict.fromkeys(row["layer"] for row in figures["rows"]):
        rows = [row for row in figures["rows"] if row["layer"] == name]
        style = {"marker": "o", "markersize": 4, "color": LAYER_COLOURS[name], "linestyle": LINES.get(name, "-")}
        fits = [f"{kind} $N^{{{fit:.2f}}}$" for kind, fit in figures["fits"][name].items() if fit is not None]
        handles.append(Line2D([], [], label=f"{LAYERS[name]}: {', '.join(fits)}" if fits else LAYERS[name], **style))
        for axes, points in (
            (times, [(row["tokens"], row["seconds"]["median"] * 1000) for row in rows if row["seconds"]]),
            (memories, [(row["tokens"], row["memory"] / MIB) for row in rows if row["memory"]]),
        ):
            if points:
                axes.plot(*zip(*points, strict=True), **style)
    tokens = sorted({row["tokens"] for row in figures["rows"]})
    for axes, title in ((times, "time of a step, ms"), (memories, "memory of a step, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="tokens N", ylabel=title)
        axes.set_xticks(tokens, [str(number) for number in tokens], rotation=45)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(which="both", alpha=0.25)
    settings = figures["settings"]
    smooth = f", maps blurred by {settings['smooth']:g} cells" if settings["smooth"] else ""
    title = (
        f"One layer, forward and backward: batch {settings['batch']}, d = {settings['channels']}, "
        f"{settings['heads']} heads, {precision_text(settings['amp'])}{smooth}\n{figures['machine']}"
    )
    finish(canvas, title, handles, path, columns=2)


def draw_pipeline(figures: dict, path: Path) -> None:
    """Draw images per second, and the fraction of training time spent waiting, by number of workers."""
    rows = {(row["cache_mode"], row["workers"]): row for row in figures["rows"]}
    modes = list(dict.fromkeys(mode for mode, _ in rows))
    workers = list(dict.fromkeys(number for _, number in rows))

    def bars(key: str, scale: float) -> dict[str, list[dict | str | None]]:
        return {mode: [value(rows[mode, number], key, scale) for number in workers] for mode in modes}

    def value(row: dict, key: str, scale: float) -> dict | str | None:
        if row["status"] != DONE:
            return row["status"]
        return row[key] and {part: scale * number for part, number in row[key].items()}

    canvas = Figure(figsize=(10, 4.2), layout="constrained")
    rates, waits = canvas.subplots(1, 2)
    groups = [str(number) for number in workers]
    grouped_bars(rates, groups, bars("images_per_second", 1), CACHE_COLOURS, ".0f")
    grouped_bars(waits, groups, bars("wait_share", 100), CACHE_COLOURS, ".2g")
    waits.yaxis.set_major_formatter(PercentFormatter())
    rates.set(xlabel="workers", ylabel="loader only, images per second")
    waits.set(xlabel="workers", ylabel="training time spent waiting for the loader")
    settings = figures["settings"]
    title = f"{settings['model']}, batch {settings['batch']}\n{figures['machine']}"
    finish(canvas, title, [Patch(color=CACHE_COLOURS[mode], label=f"cache {mode}") for mode in modes], path)


CHARTS = {"table": draw_table, "parts": draw_parts, "scaling": draw_scaling, "pipeline": draw_pipeline}
