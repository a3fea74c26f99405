"""Draw the figures of the README and of docs/method/enact.md as SVG: `python docs/figures/draw.py`.

A made-up map of scores goes through the project's own clustering, so the figures show what the code computes. Each
figure brings its own light background and can be read on dark pages.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from enact_common.attention import EntropyClustering
from enact_common.attention.clustering import region_borders, self_information, smooth
from enact_common.attention.hilbert import hilbert_order

INK, GREY, FAINT = "#1f2328", "#656d76", "#d0d7de"
ORANGE, BLUE = "#d9730d", "#2f6fd0"
CLUSTER_COLOURS = ("#2f6fd0", "#f0a04b", "#5aa469", "#b35fb3", "#7a8ea3")
HEIGHT, WIDTH = 10, 17  # cells of the map


def scores(height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """Scores (1, height * width) of a map with two objects on a textured background."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    objects = ((3.0, 4.0, 2.0, 3.0), (6.5, 11.5, 1.8, 1.4))  # centre and radii, cells
    total = 0.35 * torch.sin(1.9 * x + 0.8 * y) + 0.25 * torch.cos(1.1 * y - 0.6 * x)
    for row, column, tall, wide in objects:
        total = total + 2.6 * torch.exp(-(((y - row) / tall) ** 2) - ((x - column) / wide) ** 2)
    return total.flatten()[None].float()


class FixedScores(EntropyClustering):
    """A clustering whose scores are the tokens' one channel."""

    def __init__(self, **settings):
        super().__init__(1, **settings)
        torch.nn.init.ones_(self.W_prob.weight)
        torch.nn.init.zeros_(self.W_prob.bias)


def clusters_of(logits: torch.Tensor, mask: torch.Tensor | None = None, **settings) -> tuple[list[int], list[float]]:
    """The cluster of each token (-1: in none) of scores (1, N), and the token's pooling weight."""
    clusters = FixedScores(**settings).cluster(logits.unsqueeze(-1), mask)
    one_hot = torch.eye(logits.shape[1])[None]  # (1, N, N): pooling it gives each cluster's weights
    weights = clusters.pool(one_hot)[0].detach()  # (M, N)
    token_cluster = torch.where(weights.sum(0) > 0, weights.argmax(0), -1)
    return token_cluster.tolist(), weights.sum(0).tolist()


class Svg:
    """Shapes and texts on a light card; lengths in pixels, y downwards."""

    def __init__(self, width: int, height: int, title: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="{title}">',
            f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
        ]

    def rect(self, x, y, width, height, fill, stroke="none", opacity=1.0):
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" '
            f'stroke="{stroke}" fill-opacity="{opacity:.2f}"/>'
        )

    def text(self, x, y, text, size=13, colour=INK, anchor="start", weight="normal"):
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{text}</text>'
        )

    def line(self, points, colour=INK, width=1.5, dashed=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="3 3"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>')

    def arrow(self, x, y, to_x, to_y, colour=GREY):
        self.line([(x, y), (to_x, to_y)], colour)
        angle = math.atan2(to_y - y, to_x - x)
        tips = [(to_x - 7 * math.cos(angle + turn), to_y - 7 * math.sin(angle + turn)) for turn in (0.45, -0.45)]
        self.line([tips[0], (to_x, to_y), tips[1]], colour)

    def save(self, path: Path):
        path.write_text("\n".join([*self.parts, "</svg>"]) + "\n", encoding="utf-8")


def shade(value: float) -> str:
    """A colour between white (0) and a deep orange (1)."""
    low, high = (255, 247, 237), (196, 84, 10)
    return "#" + "".join(f"{round(a + (b - a) * value):02x}" for a, b in zip(low, high, strict=True))


def draw_cells(svg: Svg, x: float, y: float, cell: float, fills: list[str], width: int = WIDTH):
    for i, fill in enumerate(fills):
        svg.rect(x + i % width * cell, y + i // width * cell, cell - 0.8, cell - 0.8, fill)


def cluster_fills(cluster: list[int]) -> list[str]:
    return ["#eceff2" if k < 0 else CLUSTER_COLOURS[k % len(CLUSTER_COLOURS)] for k in cluster]


def draw_method(folder: Path):
    logits = scores()
    layer = FixedScores()
    information = self_information(logits)[0]
    smoothed = smooth(information[None], layer.kernel)
    cluster, _ = clusters_of(logits)
    count = max(cluster) + 1
    length = cluster.count(0)
    svg = Svg(1000, 276, "ENACT: information of each cell, windows along the rows, pooled keys and values")
    cell, top = 12, 74

    heads = (
        (24, "1  Information of each cell", "p = softmax(W k),  I = -p log2 p"),
        (272, "2  Smoothed along the rows, cut into windows", "length = mean distance between curvature changes"),
        (640, "3  Windows", f"{HEIGHT * WIDTH} cells, {count} windows"),
        (878, "4  Attention", "queries stay whole"),
    )
    for x, head, below in heads:
        svg.text(x, 30, head, 14, weight="bold")
        svg.text(x, 50, below, 12, GREY)

    top_value = information.max().item()
    draw_cells(svg, 24, top, cell, [shade(value / top_value) for value in information.tolist()])
    svg.text(24, top + HEIGHT * cell + 20, "feature map, read row by row", 12, GREY)
    svg.arrow(24, top + HEIGHT * cell + 28, 24 + WIDTH * cell, top + HEIGHT * cell + 28)

    # Three rows of the curve: enough to see regions and windows.
    first, shown = WIDTH * 2, WIDTH * 3
    left, right, base, high = 272, 612, top + HEIGHT * cell, 110
    step = (right - left) / shown
    curve = smoothed[0].tolist()
    most = max(curve[first : first + shown])
    for i in range(first, first + shown):
        k = cluster[i]
        if k >= 0:
            svg.rect(left + (i - first) * step, base - high, step, high, CLUSTER_COLOURS[k % 5], opacity=0.22)
    svg.line(
        [(left + (i - first + 0.5) * step, base - curve[i] / most * (high - 8)) for i in range(first, first + shown)],
        ORANGE,
        2,
    )
    borders = region_borders(smoothed)[0].tolist()
    for i in range(first, first + shown - 1):
        if borders[i]:
            x = left + (i - first + 1) * step
            svg.line([(x, base), (x, base + 7)], INK, 1.2)
    svg.text(left, base + 22, "ticks: curvature changes its sign; colours: windows", 12, GREY)
    regions = sum(borders) + 1
    svg.text(left, base + 39, f"{len(borders) + 1} cells in {regions} regions: windows of {length} cells", 12, GREY)

    draw_cells(svg, 640, top, cell, cluster_fills(cluster))
    svg.text(640, base + 20, "each window pools its keys and", 12, GREY)
    svg.text(640, base + 37, "values, weighted by softmax(I)", 12, GREY)

    # The attention matrix at scale: as many columns as tokens, of which clusters are left.
    side = 104
    svg.rect(878, top, side, side, "#f6f8fa", FAINT)
    svg.rect(878, top, side * count / (HEIGHT * WIDTH), side, BLUE, opacity=0.75)
    svg.text(878, top + side + 20, f"{HEIGHT * WIDTH} x {count} scores", 12, BLUE)
    svg.text(878, top + side + 37, f"not {HEIGHT * WIDTH} x {HEIGHT * WIDTH}", 12, GREY)
    svg.text(24, 262, "A made-up map through the code of this project: docs/figures/draw.py", 11, GREY)
    svg.save(folder / "method.svg")


def draw_settings(folder: Path):
    """One picture for each setting: the map, its clusters in colours."""
    logits, cell = scores(), 14
    padded = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    padded[:, 12:] = True
    padded = padded.flatten()[None]
    order = hilbert_order(HEIGHT, WIDTH)
    along, _ = clusters_of(logits[:, order])
    hilbert = [0] * len(along)
    for place, token in enumerate(order.tolist()):
        hilbert[token] = along[place]
    pictures = {
        "default": (clusters_of(logits)[0], "windows of one length (default)"),
        "regions": (clusters_of(logits, clusters="regions")[0], "--enact_clusters regions"),
        "equal": (
            clusters_of(logits, clusters="equal", max_clusters=12)[0],
            "--enact_clusters equal, at most 12",
        ),
        "hilbert": (hilbert, "--enact_order hilbert"),
        "sigma": (clusters_of(logits, sigma=1.0)[0], "--smoothing_sigma 1"),
        "max_clusters": (clusters_of(logits, max_clusters=12)[0], "--enact_max_clusters 12"),
        "mask_padding": (clusters_of(logits, padded, mask_padding=True)[0], "--enact_mask_padding (grey: padding)"),
    }
    # Two images of one batch, the second much smoother: one length for both, or one each.
    batch = torch.cat([logits, 0.05 * scores(WIDTH, HEIGHT)])
    for name, per_image in (("one_length", False), ("per_image", True)):
        clusters = FixedScores(per_image=per_image).cluster(batch.unsqueeze(-1), None)
        weights = clusters.pool(torch.eye(batch.shape[1]).expand(2, -1, -1)).detach()  # (2, M, N)
        cluster = torch.where(weights[1].sum(0) > 0, weights[1].argmax(0), -1).tolist()
        pictures[name] = (cluster, "a smooth image, " + ("--enact_per_image" if per_image else "its batch's length"))
    for name, (cluster, label) in pictures.items():
        svg = Svg(WIDTH * cell + 32, HEIGHT * cell + 62, label)
        draw_cells(svg, 16, 16, cell, cluster_fills(cluster))
        svg.text(16, HEIGHT * cell + 36, label, 13)
        svg.text(16, HEIGHT * cell + 53, f"{max(cluster) + 1} clusters", 12, GREY)
        svg.save(folder / f"setting_{name}.svg")

    # The temperature changes weights rather than clusters: the weights of each window's cells over an average's.
    svg = Svg(2 * (WIDTH * cell + 24) + 8, HEIGHT * cell + 62, "Pooling weights without and with a temperature")
    for i, temperature in enumerate((None, 1.0)):
        cluster, weight = clusters_of(logits, temperature=temperature)
        length, x = cluster.count(0), 16 + i * (WIDTH * cell + 24)
        draw_cells(svg, x, 16, cell, [shade(min(1.0, w * length / 2.5)) for w in weight])
        svg.text(x, HEIGHT * cell + 36, "--enact_temperature 1" if temperature else "as published", 13)
        most = max(weight) * length
        svg.text(x, HEIGHT * cell + 53, f"largest weight: {most:.3f} times an average's", 12, GREY)
    svg.save(folder / "setting_temperature.svg")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent, help="folder to write to")
    folder = parser.parse_args(argv).output_dir
    folder.mkdir(parents=True, exist_ok=True)
    draw_method(folder)
    draw_settings(folder)


if __name__ == "__main__":
    main()
