"""What a trained detector loses in exported files: in AP, and in the detections that PyTorch finds."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms import v2
from tqdm import tqdm

from enact_common.attention.clustering import clusterings
from enact_common.benchmark.report import (
    LEFT,
    RIGHT,
    Report,
    add_report_arguments,
    environment,
    figure,
    heading,
    markdown_table,
)
from enact_common.cli.types import fraction, positive_int
from enact_common.data.annotations import find_split
from enact_common.data.coco import CocoDetection
from enact_common.data.transforms import eval_transforms
from enact_common.evaluation.coco import METRICS, CocoBoxEvaluator
from enact_common.export.formats import FORMATS, load_exported, needed, quantize
from enact_common.export.graph import DetectorGraph, Interface, calibrated_lengths, fix_window_lengths, greatest_side
from enact_common.inference.detector import LoadedDetector, load_detector

# Files to compare, in words: whether their windows are fixed, and whether they are int8.
FILES = {
    "ONNX Runtime": (False, False),
    "ONNX Runtime, int8": (False, True),
    "ONNX Runtime, fixed windows": (True, False),
    "ONNX Runtime, fixed windows, int8": (True, True),
}

# Overlap of two boxes that are one detection.
SAME = 0.9

Run = Callable[[Tensor], dict[str, Tensor]]


class Comparison:
    """Counts what one runtime finds of what another finds.

    Args:
        threshold: least score of a detection, in [0, 1].
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.expected = self.found = self.matched = 0
        self.apart: list[float] = []

    def add(self, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        """Take an image's detections: `scores`, `labels`, and `boxes` (n, 4) xyxy in pixels."""
        ours, theirs = (
            {name: value[detections["scores"] >= self.threshold] for name, value in detections.items()}
            for detections in (expected, found)
        )
        self.expected += len(ours["scores"])
        self.found += len(theirs["scores"])
        overlap = box_iou(ours["boxes"], theirs["boxes"])
        overlap[ours["labels"].unsqueeze(1) != theirs["labels"]] = 0
        # The best pair first, each detection once.
        while overlap.numel() and overlap.max() >= SAME:
            i, j = divmod(int(overlap.argmax()), overlap.shape[1])
            self.matched += 1
            self.apart.append(float((ours["scores"][i] - theirs["scores"][j]).abs()))
            overlap[i], overlap[:, j] = 0, 0

    def figures(self) -> dict[str, float | int | None]:
        """The counts as figures.

        Returns:
            `detections` of PyTorch; the part of them that is `kept`, and the part of the file's that is `new`, in
            [0, 1]; and `score_difference`, the mean of those kept. None where there is nothing to count.
        """
        return {
            "detections": self.expected,
            "kept": self.matched / self.expected if self.expected else None,
            "new": 1 - self.matched / self.found if self.found else None,
            "score_difference": sum(self.apart) / len(self.apart) if self.apart else None,
        }


def in_pixels(outputs: dict[str, Tensor], size: Tensor) -> dict[str, Tensor]:
    """An image's detections of a batch of one, with boxes in pixels of (height, width)."""
    height, width = size.tolist()
    found = {name: value[0] for name, value in outputs.items()}
    return found | {"boxes": found["boxes"] * torch.tensor([width, height, width, height])}


def evaluate(
    run: Run, dataset: CocoDetection, expected: list[dict[str, Tensor]] | None, threshold: float
) -> tuple[dict, list[dict[str, Tensor]]]:
    """COCO's figures of a runtime, and how far it agrees with what was expected; and all its detections, by image."""
    evaluator, comparison, found = CocoBoxEvaluator(dataset.label_map), Comparison(threshold), []
    for i in tqdm(range(len(dataset)), leave=False, disable=None):
        image, target = dataset[i]
        found.append(in_pixels(run(image.unsqueeze(0)), target["orig_size"]))
        evaluator.update([int(target["image_id"])], [found[-1]])
        comparison.add(found[-1] if expected is None else expected[i], found[-1])
    stats = evaluator.evaluate(dataset.coco_api()).stats
    return dict(zip(METRICS, map(float, stats), strict=True)) | comparison.figures(), found


def pytorch(detector: LoadedDetector, interface: Interface) -> Run:
    """The detector itself, as the files are called."""
    graph = DetectorGraph(detector.model, detector.postprocess, interface).eval()

    @torch.inference_mode()
    def run(images: Tensor) -> dict[str, Tensor]:
        return dict(zip(interface.outputs, graph(images), strict=True))

    return run


def write(detector: LoadedDetector, interface: Interface, lengths: list[int] | None, path: Path) -> None:
    """Write the detector as ONNX, with windows of fixed lengths where there are any."""
    fix_window_lengths(detector.model, lengths)
    graph = DetectorGraph(detector.model, detector.postprocess, interface).eval()
    FORMATS["onnx"].write(graph, {"outputs": interface.outputs}, path)
    fix_window_lengths(detector.model, None)


def to_markdown(figures: dict) -> str:
    """The figures as a table in Markdown."""
    columns = {"runtime": LEFT, "AP": RIGHT, "AP50": RIGHT, "kept %": RIGHT, "new %": RIGHT, "scores apart": RIGHT}
    lines = []
    for row in figures["rows"]:
        shares = [None if row[name] is None else 100 * row[name] for name in ("kept", "new")]
        ap = [figure(row[name], ".3f") for name in ("AP", "AP50")]
        lines.append([row["runtime"], *ap, *(figure(s, ".1f") for s in shares), figure(row["score_difference"], ".1e")])
    settings = figures["settings"]
    fixed = settings["window_lengths"]
    windows = f" Fixed windows, tokens by encoder layer: {', '.join(map(str, fixed))}." if fixed else ""
    return (
        f"{heading(figures)}\n\n"
        f"{settings['checkpoint']} on {settings['images']} images of {settings['coco_path']}. Of PyTorch's "
        f"{figures['rows'][0]['detections']} detections with a score of at least {settings['threshold']:g}, those kept "
        f"are found by the file with the same label and an overlap (IoU) of at least {SAME:g}; new are those of the "
        f"file's that PyTorch does not find so.{windows}\n\n" + markdown_table(columns, lines)
    )


def training_lengths(detector: LoadedDetector, coco_path: str, count: int, transforms: v2.Compose) -> list[int]:
    """The lengths of fixed windows, tokens by encoder layer, on the first training images; none for other clusters."""
    if not clusterings(detector.model) or detector.args.enact_clusters == "regions":
        return []
    images = CocoDetection(*find_split(coco_path, "train"), transforms, label_map=detector.label_map, limit=count)
    return calibrated_lengths(detector.model, (images[i][0].unsqueeze(0) for i in range(len(images))))


def run(args: argparse.Namespace) -> int:
    """Evaluate, print and write the files; the exit status.

    Raises:
        UserError: the checkpoint or the data are at fault, or a package is missing.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        needed(module, "exporting")
    detector = load_detector(args.checkpoint, "cpu")
    report = Report(args.output_dir, "agreement")
    transforms = eval_transforms(detector.args.eval_size, detector.args.max_size)
    split = find_split(args.coco_path, "val")
    dataset = CocoDetection(*split, transforms, label_map=detector.label_map, limit=args.limit)
    lengths = training_lengths(detector, args.coco_path, args.calibrate, transforms)
    settings = {name: getattr(args, name) for name in ("checkpoint", "coco_path", "threshold", "calibrate")}
    settings |= {"images": len(dataset), "window_lengths": lengths}
    where = environment(args.argv, torch.device("cpu"))
    figures = {"benchmark": "agreement", **where, "settings": settings, "rows": []}
    interface = Interface(batch=None, greatest_side=greatest_side(detector))

    row, expected = evaluate(pytorch(detector, interface), dataset, None, args.threshold)
    figures["rows"].append({"runtime": "PyTorch", **row})
    with tempfile.TemporaryDirectory() as folder:
        for words, (fixed, int8) in FILES.items():
            if fixed and not lengths:
                continue
            print(f"{words} ...", file=sys.stderr, flush=True)
            path = Path(folder) / f"{'fixed' if fixed else 'free'}.onnx"
            if int8:
                quantize(path, path)
            else:
                write(detector, interface, lengths if fixed else None, path)
            row, _ = evaluate(load_exported(path), dataset, expected, args.threshold)
            figures["rows"].append({"runtime": words, **row})
            report.save_figures(figures)
    report.save(figures, to_markdown(figures), figures["rows"])
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="trained detector: a path or an https URL")
    parser.add_argument(
        "--coco_path", required=True, metavar="DIR",
        help="data set: the files are compared on its validation images; its training images say how long fixed "
        "windows are",
    )  # fmt: skip
    parser.add_argument("--limit", type=positive_int, metavar="N", help="the first N validation images (default: all)")
    parser.add_argument(
        "--calibrate", type=positive_int, default=100, metavar="N",
        help="training images for the windows' lengths (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=fraction, default=0.5, metavar="SCORE",
        help="least score of a detection that is compared, 0 to 1 (default: %(default)s)",
    )  # fmt: skip
    add_report_arguments(parser)
