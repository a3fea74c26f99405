"""Pictures of what `enact_common.inference.introspection` saw, laid over the image. Needs matplotlib (extra `plots`).

A feature map is stretched over the whole image, as position encodings have it. Panels are arranged to fill a slide.
"""

from collections.abc import Callable, Iterable, Sequence

import cv2
import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FormatStrFormatter
from torch import Tensor
from torch.nn import functional as F

from enact_common.drawing.figures import literal

# Inches. A picture is as wide and high as the slide at most, unless that would leave its panels too small.
SLIDE = (13.3, 7.5)
DPI = 150
MARGIN, GAP = 0.3, 0.25
LINE = 0.24
HEADING = 0.7
BAR = 0.55
# Of a panel's place, for its title and colour bar; and of an image's longer side.
LEAST_WIDTH, LEAST_SIDE = 2.6, 1.8
# Characters of a class's name that such a place has room for.
LONGEST_NAME = 22

# Pixels of the longer side of what is drawn: more is not seen.
DRAWN_SIDE = 1000

# Okabe and Ito's colours, which colour-blind people can tell apart, without black.
PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
BOX_COLOUR = "#00e5ff"


def translucent(name: str, opacity: Callable[[np.ndarray], np.ndarray]) -> ListedColormap:
    """A colour map of matplotlib's that lets the image through: from shares (n,) in [0, 1] to opacities in [0, 1]."""
    shares = np.linspace(0, 1, 256)
    colours = colormaps[name](shares)
    colours[:, 3] = opacity(shares)
    return ListedColormap(colours)


INFORMATION = translucent("viridis", lambda shares: np.full_like(shares, 0.7))
# Where there is hardly any attention, the image is to be seen.
ATTENTION = translucent("inferno", lambda shares: 0.85 * np.sqrt(shares))


def draw_information(image: np.ndarray, layers: Sequence[Tensor]) -> Figure:
    """Draw the smoothed self-information of the cells in each encoder layer.

    Args:
        image: uint8 (height, width, 3), RGB.
        layers: each (levels, h, w), bits.
    """
    maps = [level for layer in layers for level in layer]
    heading = ("What the encoder takes for informative", f"smoothed self-information of {cells_of(maps[0])}")
    figure, panels = lay_out(image, len(maps), heading, bar=True, columns=columns_of(layers))
    for axes, title, information in zip(panels, titles_of(layers), maps, strict=True):
        show_image(axes, image, title)
        low, high = information.min().item(), information.max().item()
        # A map of one cell has one value: a bar needs two.
        scale = Normalize(low, high if high > low else low + 1)
        overlay(axes, INFORMATION(scale(upsampled(information, image)), bytes=True), image)
        colour_bar(axes, ScalarMappable(scale, INFORMATION), "bits per cell")
    return figure


def draw_clusters(image: np.ndarray, layers: Sequence[Tensor]) -> Figure:
    """Draw which cells each encoder layer pools, with their borders.

    Args:
        image: uint8 (height, width, 3), RGB.
        layers: each int64 (levels, h, w), the cluster of each cell, -1 for none.
    """
    maps = [level.numpy() for layer in layers for level in layer]
    note = "hatched cells are in none" if any((level < 0).any() for level in maps) else "no cell is left out"
    heading = ("Which cells the encoder pools", f"one patch a cluster, along the rows of {cells_of(maps[0])}; {note}")
    figure, panels = lay_out(image, len(maps), heading, title_lines=2, columns=columns_of(layers))
    for axes, title, clusters in zip(panels, titles_of(layers), maps, strict=True):
        count, kept = clusters.max() + 1, (clusters >= 0).sum()
        plural = "s" if count > 1 else ""
        show_image(axes, image, f"{title}\n{count} cluster{plural}, mean {kept / max(count, 1):.1f} cells")
        overlay(axes, tints(clusters), image)
        height, width = np.array(image.shape[:2]) / clusters.shape
        for row, column in np.argwhere(clusters < 0):
            corner = (column * width, row * height)
            axes.add_patch(
                Rectangle(corner, width, height, facecolor="0.15", edgecolor="0.75", hatch="////", linewidth=0)
            )
        # A cell's shorter side: lines must leave room for what they enclose.
        side = min(points_of(axes) / clusters.shape[::-1])
        lines = LineCollection(
            borders(clusters) * (width, height), colors="white", linewidths=min(1.8, 0.12 * side), capstyle="projecting"
        )
        lines.set_path_effects(
            [patheffects.Stroke(linewidth=min(3, 0.2 * side), foreground="0.1"), patheffects.Normal()]
        )
        axes.add_collection(lines)
    return figure


def draw_attention(image: np.ndarray, attention: Tensor, boxes: Tensor, names: Sequence[str], scores: Tensor) -> Figure:
    """Draw where queries attend, one panel each, or the image alone where there are none.

    Args:
        image: uint8 (height, width, 3), RGB.
        attention: (n, h, w), the weights of each query, adding up to one.
        boxes: (n, 4), what each query found: left, top, right, bottom in pixels of the image.
        names: of what each query found.
        scores: (n,), in [0, 1].
    """
    if not names:
        heading = ("Where queries attend", "nothing was found in this image; a lower threshold shows more")
        figure, (axes,) = lay_out(image, 1, heading)
        show_image(axes, image, "")
        return figure
    heading = (
        "Where the queries of the likeliest detections attend",
        f"last decoder layer, mean of all heads, over {cells_of(attention[0])}",
    )
    figure, panels = lay_out(image, len(names), heading, bar=True)
    found = zip(names, scores.tolist(), attention, boxes.tolist(), strict=True)
    for axes, (name, score, weights, (left, top, right, bottom)) in zip(panels, found, strict=True):
        short = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."
        show_image(axes, image, f"{short} {score:.2f}")
        scale = Normalize(0, 100 * weights.max().item())
        overlay(axes, ATTENTION(scale(upsampled(100 * weights, image)), bytes=True), image)
        line = float(np.clip(0.02 * min(points_of(axes)), 0.6, 2))
        for colour, width in (("black", 2 * line), (BOX_COLOUR, line)):
            axes.add_patch(
                Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=width)
            )
        colour_bar(axes, ScalarMappable(scale, ATTENTION), "% of the attention per cell")
    return figure


def titles_of(layers: Sequence[Iterable]) -> list[str]:
    """A title for each level of each layer; the levels are named where there are several."""
    return [
        f"Encoder layer {i}" + (f", level {j}" if len(layer) > 1 else "")
        for i, layer in enumerate(layers, 1)
        for j in range(1, len(layer) + 1)
    ]


def columns_of(layers: Sequence[Tensor]) -> int | None:
    """One column a level where there are several; else as it fits."""
    return len(layers[0]) if len(layers[0]) > 1 else None


def cells_of(feature_map: Tensor | np.ndarray) -> str:
    """A feature map's size in words."""
    height, width = feature_map.shape
    return f"the feature map's {height} x {width} cells"


def lay_out(
    image: np.ndarray,
    count: int,
    heading: tuple[str, str],
    bar: bool = False,
    title_lines: int = 1,
    columns: int | None = None,
) -> tuple[Figure, list[Axes]]:
    """A figure with panels of the image's shape.

    Args:
        image: (height, width, 3).
        count: panels, at least one.
        heading: of the figure, and a line below it.
        bar: leave room for a colour bar below each panel.
        title_lines: of each panel.
        columns: panels side by side; None for as many as make them largest.
    """
    aspect = image.shape[1] / image.shape[0]
    above, below = LINE * title_lines + 0.1, BAR if bar else 0.0

    def panel_width(columns: int) -> float:
        rows = -(-count // columns)
        across = (SLIDE[0] - 2 * MARGIN - GAP * (columns - 1)) / columns
        down = (SLIDE[1] - MARGIN - HEADING - GAP * (rows - 1)) / rows - above - below
        return min(across, down * aspect)

    columns = columns or max(range(1, count + 1), key=panel_width)
    rows = -(-count // columns)
    width = max(panel_width(columns), LEAST_SIDE * min(1, aspect))
    height = width / aspect
    place = max(width, LEAST_WIDTH)
    across = columns * place + GAP * (columns - 1)
    size = (
        max(across + 2 * MARGIN, 8),
        MARGIN + HEADING + rows * (above + height + below) + GAP * (rows - 1),
    )
    figure = Figure(figsize=size, dpi=DPI, facecolor="white")
    figure.text(0.5, 1 - 0.2 / size[1], heading[0], fontsize=15, fontweight="bold", ha="center", va="center")
    figure.text(0.5, 1 - 0.5 / size[1], heading[1], fontsize=11, ha="center", va="center")
    panels = []
    for i in range(count):
        row, column = divmod(i, columns)
        x = (size[0] - across) / 2 + column * (place + GAP) + (place - width) / 2
        y = size[1] - HEADING - row * (above + height + below + GAP) - above - height
        panels.append(figure.add_axes((x / size[0], y / size[1], width / size[0], height / size[1])))
    return figure, panels


def show_image(axes: Axes, image: np.ndarray, title: str) -> None:
    """Show the image in grey, which leaves the colours to what is laid over it, in coordinates of its pixels."""
    height, width = image.shape[:2]
    scale = min(1, DRAWN_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    grey = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0), aspect="auto")
    axes.set_title(literal(title), fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])


def points_of(axes: Axes) -> np.ndarray:
    """The width and the height of a panel in points, the unit of lines."""
    return np.array(axes.bbox.size) / axes.figure.dpi * 72


def overlay(axes: Axes, colours: np.ndarray, image: np.ndarray) -> None:
    """Lay colours (h, w, 4), float in [0, 1] or uint8, over an image, each over its part of it."""
    height, width = image.shape[:2]
    axes.imshow(colours, extent=(0, width, height, 0), aspect="auto", interpolation="nearest")


def upsampled(values: Tensor, image: np.ndarray) -> np.ndarray:
    """Values (h, w) of cells, bilinear between their centres, in the image's shape at the size at which it is drawn."""
    height, width = image.shape[:2]
    scale = DRAWN_SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return F.interpolate(values[None, None], size, mode="bilinear")[0, 0].numpy()


def colour_bar(axes: Axes, colours: ScalarMappable, label: str) -> None:
    """A bar below a panel that says what its colours stand for."""
    figure = axes.figure
    panel = axes.get_position()
    width, height = figure.get_size_inches()
    length = max(panel.width, 2.0 / width)
    bar = figure.add_axes((panel.x0 + (panel.width - length) / 2, panel.y0 - 0.2 / height, length, 0.12 / height))
    low, high = colours.get_clim()
    bar.set_facecolor("0.7")
    figure.colorbar(colours, cax=bar, orientation="horizontal", ticks=np.linspace(low, high, 3))
    bar.xaxis.set_major_formatter(FormatStrFormatter("%.3g"))
    bar.tick_params(labelsize=9, length=2, pad=2)
    first, *_, last = bar.get_xticklabels()
    first.set_ha("left")
    last.set_ha("right")
    bar.set_xlabel(label, fontsize=9, labelpad=1)


def tints(clusters: np.ndarray) -> np.ndarray:
    """Translucent colours (h, w, 4) for clusters (h, w), int64: neighbours differ as far as the palette goes."""
    touching = [{i - 1} for i in range(clusters.max() + 1)]
    for one, other in ((clusters[:, 1:], clusters[:, :-1]), (clusters[1:], clusters[:-1])):
        for i, j in np.unique(np.stack((one, other))[:, one != other].T, axis=0):
            if min(i, j) >= 0:
                touching[max(i, j)].add(min(i, j))
    chosen: list[int] = []
    for i, earlier in enumerate(touching):
        taken = {chosen[j] for j in earlier if j >= 0}
        # Each begins at another colour, so that all of them are used.
        turns = [(i + k) % len(PALETTE) for k in range(len(PALETTE))]
        chosen.append(next((colour for colour in turns if colour not in taken), turns[0]))
    colours = [to_rgba(PALETTE[colour], 0.45) for colour in chosen]
    # The last one is that of -1: none.
    return np.array([*colours, (0, 0, 0, 0)])[clusters]


def borders(clusters: np.ndarray) -> np.ndarray:
    """Lines between cells (h, w) of different clusters: float (n, 2, 2), each from (x, y) to (x, y), in cells."""
    rows, columns = np.nonzero(clusters[:, 1:] != clusters[:, :-1])
    upright = [((x + 1, y), (x + 1, y + 1)) for y, x in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero(clusters[1:] != clusters[:-1])
    level = [((x, y + 1), (x + 1, y + 1)) for y, x in zip(rows, columns, strict=True)]
    return np.array(upright + level, dtype=float).reshape(-1, 2, 2)
