"""Detections next to the ground truth. Needs matplotlib (extra `plots`)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from enact_common.drawing.figures import colour, literal, save


def draw_boxes(axes, image: np.ndarray, boxes: Sequence[Sequence[float]], texts: Sequence[str], labels: Sequence[int]):
    """Show an image, uint8 (height, width, 3), with boxes xywh in pixels; the labels set their colours."""
    axes.imshow(image)
    axes.set_xticks([])
    axes.set_yticks([])
    for (x, y, width, height), text, label in zip(boxes, texts, labels, strict=True):
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="white", linewidth=3))
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour(label), linewidth=1.5))
        # Keep the text inside the image: below the image's top edge if there is no room above the box.
        above = y > 0.08 * image.shape[0]
        axes.text(
            np.clip(x, 0, 0.75 * image.shape[1]), y if above else 0.02 * image.shape[0], literal(text),
            fontsize=8, color="white", verticalalignment="bottom" if above else "top",
            bbox={"facecolor": colour(label), "edgecolor": "none", "pad": 1, "alpha": 0.9},
        )  # fmt: skip


def plot_detections(
    images: Sequence[np.ndarray],
    truths: Sequence[list[dict]],
    detections: Sequence[list[dict]],
    names: dict[int, str],
    picture: Path,
) -> None:
    """Draw images in two rows: ground truth above, detections below.

    Args:
        images: each uint8 (height, width, 3), RGB.
        truths, detections: COCO annotations, and COCO results, of each image.
        names: category id to name.
        picture: file to write; its suffix sets the format.
    """
    label = {category: i for i, category in enumerate(names)}
    figure = Figure(figsize=(2.6 * len(images), 5.6), layout="constrained")
    rows = figure.subplots(2, len(images), squeeze=False)
    for column, image in enumerate(images):
        for axes, objects in ((rows[0][column], truths[column]), (rows[1][column], detections[column])):
            texts = [names[o["category_id"]] + (f" {o['score']:.2f}" if "score" in o else "") for o in objects]
            labels = [label[o["category_id"]] for o in objects]
            draw_boxes(axes, image, [o["bbox"] for o in objects], texts, labels)
    rows[0][0].set_ylabel("truth")
    rows[1][0].set_ylabel("detected")
    save(figure, picture)
