"""Pictures of a run: its loss and AP curves, and detections beside the truth. Needs matplotlib (extra `plots`)."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from enact_common.logs import read_log  # noqa: E402

# One colour a label, in turn.
COLOURS = plt.get_cmap("tab10").colors


def plot_log(log: Path, picture: Path) -> None:
    """Draw the losses and the AP of each epoch in a `log.txt`.

    Args:
        log: one JSON object a line; keys that are missing are left out of the picture.
        picture: PNG to write.
    """
    epochs = read_log(log)
    figure, (losses, precision) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for key, name in (("train_loss", "training"), ("test_loss", "validation")):
        points = [(row["epoch"] + 1, row[key]) for row in epochs if key in row]
        losses.plot(*zip(*points, strict=True), marker="o", label=name) if points else None
    losses.set(title="Loss", xlabel="epoch")
    for i, name in enumerate(("AP", "AP50")):
        key = "test_coco_eval_bbox"
        points = [(row["epoch"] + 1, row[key][i]) for row in epochs if key in row]
        precision.plot(*zip(*points, strict=True), marker="o", label=name) if points else None
    precision.set(title="Average precision, validation images", xlabel="epoch", ylim=(0, 1))
    for axes in (losses, precision):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def draw_boxes(axes, image: np.ndarray, boxes: Sequence[Sequence[float]], texts: Sequence[str], labels: Sequence[int]):
    """Show an image with boxes.

    Args:
        axes: where to draw.
        image: uint8 (height, width, 3), RGB.
        boxes: xywh in pixels.
        texts: written at each box.
        labels: decide the colours.
    """
    axes.imshow(image)
    axes.set_xticks([])
    axes.set_yticks([])
    for (x, y, width, height), text, label in zip(boxes, texts, labels, strict=True):
        colour = COLOURS[label % len(COLOURS)]
        axes.add_patch(plt.Rectangle((x, y), width, height, fill=False, edgecolor="white", linewidth=3))
        axes.add_patch(plt.Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=1.5))
        # Inside the image, whatever the box: below its top edge where there is no room above it.
        above = y > 0.08 * image.shape[0]
        axes.text(
            np.clip(x, 0, 0.75 * image.shape[1]),
            y if above else 0.02 * image.shape[0],
            text,
            fontsize=8,
            color="white",
            verticalalignment="bottom" if above else "top",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.9},
        )


def plot_detections(
    images: Sequence[np.ndarray],
    truths: Sequence[list[dict]],
    detections: Sequence[list[dict]],
    names: dict[int, str],
    picture: Path,
) -> None:
    """Draw images in two rows: above with their annotations, below with what was detected.

    Args:
        images: each uint8 (height, width, 3), RGB.
        truths: of each image, COCO annotations.
        detections: of each image, COCO results.
        names: category id to name.
        picture: PNG to write.
    """
    label = {category: i for i, category in enumerate(names)}
    figure, rows = plt.subplots(2, len(images), figsize=(2.6 * len(images), 5.6), layout="constrained", squeeze=False)
    for column, image in enumerate(images):
        for axes, objects in ((rows[0][column], truths[column]), (rows[1][column], detections[column])):
            draw_boxes(
                axes,
                image,
                [o["bbox"] for o in objects],
                [names[o["category_id"]] + (f" {o['score']:.2f}" if "score" in o else "") for o in objects],
                [label[o["category_id"]] for o in objects],
            )
    rows[0][0].set_ylabel("truth")
    rows[1][0].set_ylabel("detected")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
