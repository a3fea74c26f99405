"""Draw the maps of `enact_common.inference.introspection` over the image. Needs matplotlib (extra `plots`).

Images are uint8 (height, width, 3), RGB. A feature map is stretched over the whole image, as in the position encodings.
Panels are arranged to fill a slide of this width and height in inches.
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

# Inches. A picture fits the slide, unless its panels would get too small.
SLIDE = (13.3, 7.5)
DPI = 150
MARGIN, GAP = 0.3, 0.25
LINE = 0.24
HEADING = 0.7
BAR = 0.55
# Least width of a slot (the panel with its title and colour bar), and least length of a panel's longer side.
LEAST_WIDTH, LEAST_SIDE = 2.6, 1.8
# Longest class name, in characters, that fits into the least width.
LONGEST_NAME = 22

# Longer side of the drawn image, in pixels.
DRAWN_SIDE = 1000

# The colour-blind safe palette of Okabe and Ito, without black.
PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
BOX_COLOUR = "#00e5ff"


def translucent(name: str, opacity: Callable[[np.ndarray], np.ndarray]) -> ListedColormap:
    """Return matplotlib's colour map `name` with an opacity in [0, 1] for each value in [0, 1]."""
    values = np.linspace(0, 1, 256)
    colours = colormaps[name](values)
    colours[:, 3] = opacity(values)
    return ListedColormap(colours)


INFORMATION = translucent("viridis", lambda values: np.full_like(values, 0.7))
# Low attention is transparent, to keep the image visible.
ATTENTION = translucent("inferno", lambda values: 0.85 * np.sqrt(values))


def draw_information(image: np.ndarray, layers: Sequence[Tensor], slide: tuple[float, float] = SLIDE) -> Figure:
    """Draw the smoothed self-information of the cells, in bits, for each encoder layer: one map (levels, h, w) each."""
    maps = [level for layer in layers for level in layer]
    heading = ("Information in the encoder", f"smoothed self-information of {cells_of(maps[0])}")
    figure, panels = lay_out(image, len(maps), heading, bar=True, columns=columns_of(layers), slide=slide)
    for axes, title, information in zip(panels, titles_of(layers), maps, strict=True):
        show_image(axes, image, title)
        low, high = information.min().item(), information.max().item()
        # A constant map has one value, but a colour bar needs two.
        scale = Normalize(low, high if high > low else low + 1)
        overlay(axes, INFORMATION(scale(upsampled(information, image)), bytes=True), image)
        colour_bar(axes, ScalarMappable(scale, INFORMATION), "bits per cell")
    return figure


def draw_clusters(image: np.ndarray, layers: Sequence[Tensor], slide: tuple[float, float] = SLIDE) -> Figure:
    """Draw the clusters of each encoder layer, with their borders: a map int64 (levels, h, w) each, -1 for none."""
    maps = [level.numpy() for layer in layers for level in layer]
    note = "hatched cells are left out" if any((level < 0).any() for level in maps) else "no cell is left out"
    heading = ("Clusters in the encoder", f"one patch per cluster, {cells_of(maps[0])}; {note}")
    figure, panels = lay_out(image, len(maps), heading, title_lines=2, columns=columns_of(layers), slide=slide)
    for axes, title, clusters in zip(panels, titles_of(layers), maps, strict=True):
        count, kept = clusters.max() + 1, (clusters >= 0).sum()
        plural = "s" if count > 1 else ""
        show_image(axes, image, f"{title}\n{count} cluster{plural}, mean {kept / max(count, 1):.1f} cells")
        overlay(axes, tints(clusters), image)
        height, width = np.array(image.shape[:2]) / clusters.shape
        for row, column in np.argwhere(clusters < 0):
            corner = (column * width, row * height)
            colours = {"facecolor": "0.15", "edgecolor": "0.75"}
            axes.add_patch(Rectangle(corner, width, height, hatch="////", linewidth=0, **colours))
        # Scale the lines to a cell's shorter side, to keep the cells visible.
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
    """Draw one attention panel per query, or only the image if there are no queries.

    Args:
        image: the image.
        attention: (n, h, w), the attention weights of each query, adding up to one.
        boxes: (n, 4), the queries' boxes: left, top, right, bottom in pixels of the image.
        names: the queries' class names.
        scores: (n,), in [0, 1].
    """
    if not names:
        note = "nothing was found in this image; a lower threshold shows more"
        return draw_note(image, ("Attention of the queries", note))
    subtitle = f"last decoder layer, mean of all heads, over {cells_of(attention[0])}"
    heading = ("Attention of the likeliest detections", subtitle)
    titles = [named(name, score) for name, score in zip(names, scores.tolist(), strict=True)]
    return draw_weights(image, attention, boxes, titles, heading)


def draw_note(image: np.ndarray, heading: tuple[str, str], slide: tuple[float, float] = SLIDE) -> Figure:
    """Draw only the image, with a title and subtitle that say why there is nothing else."""
    figure, (axes,) = lay_out(image, 1, heading, slide=slide)
    show_image(axes, image, "")
    return figure


def draw_attention_by_layer(
    image: np.ndarray, by_layer: Tensor, box: Tensor, name: str, score: float, slide: tuple[float, float] = SLIDE
) -> Figure:
    """Draw a query's attention, one panel per decoder layer.

    Args:
        image: the image.
        by_layer: (decoder layers, h, w), the query's attention weights, adding up to one in each layer.
        box: (4,), the query's box: left, top, right, bottom in pixels of the image.
        name: the query's class name.
        score: in [0, 1].
        slide: width and height to fill, in inches.
    """
    heading = (f"Attention of the query of {named(name, score)}", f"mean of all heads, over {cells_of(by_layer[0])}")
    titles = [f"Decoder layer {i}" for i in range(1, len(by_layer) + 1)]
    return draw_weights(image, by_layer, box.expand(len(by_layer), 4), titles, heading, slide)


def named(name: str, score: float) -> str:
    """A class name, shortened to fit over a panel, and the score."""
    short = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."
    return f"{short} {score:.2f}"


def draw_weights(
    image: np.ndarray,
    maps: Tensor,
    boxes: Tensor,
    titles: Sequence[str],
    heading: tuple[str, str],
    slide: tuple[float, float] = SLIDE,
) -> Figure:
    """Draw a panel with a title for each map (n, h, w) of attention weights, with a box (n, 4) xyxy in it."""
    figure, panels = lay_out(image, len(titles), heading, bar=True, slide=slide)
    for axes, title, weights, (left, top, right, bottom) in zip(panels, titles, maps, boxes.tolist(), strict=True):
        show_image(axes, image, title)
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
    """A title for each level of each layer. A single level is not named."""
    return [
        f"Encoder layer {i}" + (f", level {j}" if len(layer) > 1 else "")
        for i, layer in enumerate(layers, 1)
        for j in range(1, len(layer) + 1)
    ]


def columns_of(layers: Sequence[Tensor]) -> int | None:
    """One column per level; None, to choose freely, for a single level."""
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
    slide: tuple[float, float] = SLIDE,
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a title and a subtitle, and its panels, which have the image's aspect ratio.

    Args:
        image: the image.
        count: number of panels, at least one.
        heading: the figure's title and subtitle.
        bar: leave room for a colour bar below each panel.
        title_lines: lines of each panel's title.
        columns: panels side by side; None for the number that makes the panels largest.
        slide: width and height to fill, in inches.
    """
    aspect = image.shape[1] / image.shape[0]
    above, below = LINE * title_lines + 0.1, BAR if bar else 0.0

    def panel_width(columns: int) -> float:
        rows = -(-count // columns)
        across = (slide[0] - 2 * MARGIN - GAP * (columns - 1)) / columns
        down = (slide[1] - MARGIN - HEADING - GAP * (rows - 1)) / rows - above - below
        return min(across, down * aspect)

    columns = columns or max(range(1, count + 1), key=panel_width)
    rows = -(-count // columns)
    width = max(panel_width(columns), LEAST_SIDE * min(1, aspect))
    height = width / aspect
    slot = max(width, LEAST_WIDTH)
    across = columns * slot + GAP * (columns - 1)
    size = (max(across + 2 * MARGIN, 8), MARGIN + HEADING + rows * (above + height + below) + GAP * (rows - 1))
    figure = Figure(figsize=size, dpi=DPI, facecolor="white")
    figure.text(0.5, 1 - 0.2 / size[1], literal(heading[0]), fontsize=15, fontweight="bold", ha="center", va="center")
    figure.text(0.5, 1 - 0.5 / size[1], heading[1], fontsize=11, ha="center", va="center")
    panels = []
    for i in range(count):
        row, column = divmod(i, columns)
        x = (size[0] - across) / 2 + column * (slot + GAP) + (slot - width) / 2
        y = size[1] - HEADING - row * (above + height + below + GAP) - above - height
        panels.append(figure.add_axes((x / size[0], y / size[1], width / size[0], height / size[1])))
    return figure, panels


def show_image(axes: Axes, image: np.ndarray, title: str) -> None:
    """Show the image in grey, in pixel coordinates. Colours are left to the overlay."""
    height, width = image.shape[:2]
    scale = min(1, DRAWN_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    grey = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0), aspect="auto")
    axes.set_title(literal(title), fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])


def points_of(axes: Axes) -> np.ndarray:
    """The width and height of a panel in points, the unit of line widths."""
    return np.array(axes.bbox.size) / axes.figure.dpi * 72


def overlay(axes: Axes, colours: np.ndarray, image: np.ndarray) -> None:
    """Draw colours (h, w, 4), float in [0, 1] or uint8, over the whole image."""
    height, width = image.shape[:2]
    axes.imshow(colours, extent=(0, width, height, 0), aspect="auto", interpolation="nearest")


def upsampled(values: Tensor, image: np.ndarray) -> np.ndarray:
    """Resize cell values (h, w) to the drawn image, bilinear between the cells' centres."""
    height, width = image.shape[:2]
    scale = DRAWN_SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return F.interpolate(values[None, None], size, mode="bilinear")[0, 0].numpy()


def colour_bar(axes: Axes, colours: ScalarMappable, label: str) -> None:
    """Draw a colour bar below a panel."""
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
    """Return translucent colours (h, w, 4) for clusters (h, w), int64. Neighbours differ while the palette lasts."""
    neighbours_of = [{i - 1} for i in range(clusters.max() + 1)]
    for cells, neighbours in ((clusters[:, 1:], clusters[:, :-1]), (clusters[1:], clusters[:-1])):
        for i, j in np.unique(np.stack((cells, neighbours))[:, cells != neighbours].T, axis=0):
            if min(i, j) >= 0:
                neighbours_of[max(i, j)].add(min(i, j))
    colour_indices: list[int] = []
    for i, adjacent in enumerate(neighbours_of):
        used = {colour_indices[j] for j in adjacent if j >= 0}
        # Rotate the palette, to use all colours.
        palette = [(i + k) % len(PALETTE) for k in range(len(PALETTE))]
        colour_indices.append(next((colour for colour in palette if colour not in used), palette[0]))
    colours = [to_rgba(PALETTE[colour], 0.45) for colour in colour_indices]
    # The last colour is transparent, for cells with cluster -1.
    return np.array([*colours, (0, 0, 0, 0)])[clusters]


def borders(clusters: np.ndarray) -> np.ndarray:
    """Return the lines between different clusters (h, w): float (n, 2, 2), from (x, y) to (x, y), in cells."""
    rows, columns = np.nonzero(clusters[:, 1:] != clusters[:, :-1])
    upright = [((x + 1, y), (x + 1, y + 1)) for y, x in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero(clusters[1:] != clusters[:-1])
    level = [((x, y + 1), (x + 1, y + 1)) for y, x in zip(rows, columns, strict=True)]
    return np.array(upright + level, dtype=float).reshape(-1, 2, 2)
