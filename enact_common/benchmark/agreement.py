"""Compare a trained detector's exported files with PyTorch: AP, and agreement of the detections."""

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

from enact_common.attention.clustering import WINDOWS, clusterings
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

# Exported files to compare: name to (fixed windows, int8).
FILES = {
    "ONNX Runtime": (False, False),
    "ONNX Runtime, int8": (False, True),
    "ONNX Runtime, fixed windows": (True, False),
    "ONNX Runtime, fixed windows, int8": (True, True),
}

# Least IoU of two boxes that count as the same detection.
MATCH_IOU = 0.9

Run = Callable[[Tensor], dict[str, Tensor]]


class Comparison:
    """Counts how many detections with a score of at least `threshold` of one runtime another runtime reproduces."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.num_expected = self.num_actual = self.num_matched = 0
        self.differences: list[float] = []  # of the scores, by match

    def add(self, expected: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
        """Add an image's detections by both runtimes: `scores`, `labels`, and `boxes` (n, 4) xyxy in pixels."""
        ours, theirs = (
            {name: value[detections["scores"] >= self.threshold] for name, value in detections.items()}
            for detections in (expected, actual)
        )
        self.num_expected += len(ours["scores"])
        self.num_actual += len(theirs["scores"])
        overlap = box_iou(ours["boxes"], theirs["boxes"])
        overlap[ours["labels"].unsqueeze(1) != theirs["labels"]] = 0
        # Match greedily, best overlap first; each detection is used once.
        while overlap.numel() and overlap.max() >= MATCH_IOU:
            i, j = divmod(int(overlap.argmax()), overlap.shape[1])
            self.num_matched += 1
            self.differences.append(float((ours["scores"][i] - theirs["scores"][j]).abs()))
            overlap[i], overlap[:, j] = 0, 0

    def figures(self) -> dict[str, float | int | None]:
        """Return the agreement over all images.

        Returns:
            `detections`: number of detections by PyTorch; `kept`: fraction of them that the file reproduces; `new`:
            fraction of the file's detections without a match in PyTorch; `score_difference`: mean over the matches.
            Fractions are in [0, 1]; a value is None if nothing was counted.
        """
        return {
            "detections": self.num_expected,
            "kept": self.num_matched / self.num_expected if self.num_expected else None,
            "new": 1 - self.num_matched / self.num_actual if self.num_actual else None,
            "score_difference": sum(self.differences) / len(self.differences) if self.differences else None,
        }


def in_pixels(outputs: dict[str, Tensor], size: Tensor) -> dict[str, Tensor]:
    """Return the detections of a batch of one image, with boxes scaled to pixels of `size` (height, width)."""
    height, width = size.tolist()
    detections = {name: value[0] for name, value in outputs.items()}
    return detections | {"boxes": detections["boxes"] * torch.tensor([width, height, width, height])}


def evaluate(
    run: Run, dataset: CocoDetection, expected: list[dict[str, Tensor]] | None, threshold: float
) -> tuple[dict, list[dict[str, Tensor]]]:
    """Evaluate one runtime, which maps a batch of one image to the detector's outputs, on all images.

    It is compared with `expected`, PyTorch's detections by image, or with itself; detections with a score lower than
    `threshold` are ignored there. Returns (COCO metrics and agreement, detections by image).
    """
    evaluator, comparison, detections = CocoBoxEvaluator(dataset.label_map), Comparison(threshold), []
    for i in tqdm(range(len(dataset)), leave=False, disable=None):
        image, target = dataset[i]
        detections.append(in_pixels(run(image.unsqueeze(0)), target["orig_size"]))
        evaluator.update([int(target["image_id"])], [detections[-1]])
        comparison.add(detections[-1] if expected is None else expected[i], detections[-1])
    stats = evaluator.evaluate(dataset.coco_api()).stats
    return dict(zip(METRICS, map(float, stats), strict=True)) | comparison.figures(), detections


def pytorch(detector: LoadedDetector, interface: Interface) -> Run:
    """Return the PyTorch detector as a function with the signature of an exported file."""
    graph = DetectorGraph(detector.model, detector.postprocess, interface).eval()

    @torch.inference_mode()
    def run(images: Tensor) -> dict[str, Tensor]:
        return dict(zip(interface.outputs, graph(images), strict=True))

    return run


def write(detector: LoadedDetector, interface: Interface, lengths: list[int] | None, path: Path) -> None:
    """Export the detector to ONNX, with fixed window lengths if `lengths` is given."""
    fix_window_lengths(detector.model, lengths)
    graph = DetectorGraph(detector.model, detector.postprocess, interface).eval()
    FORMATS["onnx"].write(graph, {"outputs": interface.outputs}, path)
    fix_window_lengths(detector.model, None)


def to_markdown(figures: dict) -> str:
    """Return the figures as a Markdown table."""
    columns = {"runtime": LEFT, "AP": RIGHT, "AP50": RIGHT, "kept %": RIGHT, "new %": RIGHT, "score difference": RIGHT}
    lines = []
    for row in figures["rows"]:
        percentages = [None if row[name] is None else 100 * row[name] for name in ("kept", "new")]
        ap = [figure(row[name], ".3f") for name in ("AP", "AP50")]
        lines.append(
            [row["runtime"], *ap, *(figure(p, ".1f") for p in percentages), figure(row["score_difference"], ".1e")]
        )
    settings = figures["settings"]
    fixed = settings["window_lengths"]
    windows = f" Fixed windows, tokens by encoder layer: {', '.join(map(str, fixed))}." if fixed else ""
    return (
        f"{heading(figures)}\n\n"
        f"{settings['checkpoint']} on {settings['images']} images of {settings['coco_path']}. PyTorch finds "
        f"{figures['rows'][0]['detections']} detections with a score of at least {settings['threshold']:g}. Kept: "
        f"detections that the file finds with the same label and an IoU of at least {MATCH_IOU:g}. New: detections of "
        f"the file without such a match in PyTorch.{windows}\n\n" + markdown_table(columns, lines)
    )


def training_lengths(detector: LoadedDetector, coco_path: str, count: int, transforms: v2.Compose) -> list[int]:
    """Return fixed window lengths (tokens, by encoder layer) from training images; [] without ENACT windows."""
    if not clusterings(detector.model) or detector.args.enact_clusters not in (None, WINDOWS):
        return []
    images = CocoDetection(*find_split(coco_path, "train"), transforms, label_map=detector.label_map, limit=count)
    return calibrated_lengths(detector.model, (images[i][0].unsqueeze(0) for i in range(len(images))))


def run(args: argparse.Namespace) -> int:
    """Evaluate all runtimes, print the table and write the files; return the exit status."""
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
    interface = Interface(batch=1, greatest_side=greatest_side(detector))

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
    """Add the command's flags."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="CKPT", help="checkpoint of a trained detector: a path or an https URL"
    )
    parser.add_argument(
        "--coco_path", required=True, metavar="DIR",
        help="data set: its validation images are used for the comparison, its training images for the lengths of "
        "fixed windows",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="use the first N validation images (default: all)"
    )
    parser.add_argument(
        "--calibrate", type=positive_int, default=100, metavar="N",
        help="number of training images that determine the window lengths (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=fraction, default=0.5, metavar="SCORE",
        help="ignore detections with a lower score, 0 to 1 (default: %(default)s)",
    )  # fmt: skip
    add_report_arguments(parser)
