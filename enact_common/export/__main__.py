"""Export a trained detector to another runtime: `python -m enact_common.export CHECKPOINT --format onnx`.

The exported file takes RGB pixels, uint8 (batch, 3, height, width), 0 to 255, and normalises them itself. It returns
scores, labels and boxes (left, top, right, bottom as fractions of the image's width and height), and masks if the model
has a mask head. Its metadata describe the inputs and outputs. With --format huggingface, a plain DETR or Conditional
DETR becomes a folder for Hugging Face's transformers instead.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from enact_common.attention.clustering import CLUSTERS, clusterings
from enact_common.attention.clusters import DEFAULT_SHARE
from enact_common.attention.hilbert import ORDERS
from enact_common.checkpoints.bundled import BUNDLED
from enact_common.cli.flags import CLUSTERING_FLAGS
from enact_common.cli.program import Parser, program
from enact_common.cli.types import HelpFormatter, natural_int, non_negative_float, positive_int
from enact_common.data.images import decode_image, images_in
from enact_common.export.formats import FORMATS, ExportedDetector, load_exported, needed, quantize
from enact_common.export.graph import (
    DetectorGraph,
    Interface,
    calibrated_lengths,
    check_interface,
    describe,
    fix_window_lengths,
    greatest_side,
)
from enact_common.export.huggingface import FORMAT, check_folder, check_model, write_folder
from enact_common.inference.detector import LoadedDetector, load_detector
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import check_no_folder, make_folder

# Greatest accepted difference from PyTorch's outputs: other runtimes sum in another order.
TOLERANCE = 1e-3

# The export warns if an 8-bit file's scores or boxes differ by more.
INT8_TOLERANCE = 0.05

# Image sizes, other than the traced one, to test a file with dynamic sizes.
TEST_SIZES = ((128, 160), (224, 192))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog=program("enact_common.export"), description=" ".join(__doc__.split("\n\n", 1)[1].split()),
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "checkpoint", metavar="CKPT",
        help="trained detector, as for enact predict: a path, an https URL, a folder with a config.json, or a bundled "
        f"detector: {', '.join(BUNDLED)}",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=(*FORMATS, FORMAT), default="onnx",
        help=f"kind of file; {FORMAT} is a folder with weights, of plain DETR and Conditional DETR",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="FILE",
        help="output file or folder; default: the checkpoint's name with the format's suffix, in the current folder",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=positive_int, nargs=2, metavar=("H", "W"),
        help="height and width of the input images in pixels; default: the model's shorter side in evaluation for both",
    )  # fmt: skip
    parser.add_argument("--batch", type=positive_int, metavar="N", help="batch size of the file; default: 1")
    parser.add_argument(
        "--dynamic", action="store_true", help="accept any batch size and image size, instead of --batch and --size"
    )
    parser.add_argument(
        "--mask", action="store_true",
        help="add a padding mask as second input, bool (batch, height, width), true for padding, to batch images of "
        "several sizes",
    )  # fmt: skip
    parser.add_argument(
        "--raw", action="store_true",
        help="return the model's raw outputs for all queries: pred_logits, pred_boxes, and pred_masks if it has a mask "
        "head",
    )  # fmt: skip
    parser.add_argument(
        "--clusters", metavar="N|PATH",
        help="ENACT: fixed windows, for runtimes without data-dependent sizes: N tokens, or each layer's median over "
        "the images at PATH (an image or a folder); default: window lengths from each image",
    )  # fmt: skip
    parser.add_argument(
        "--quantize", action="store_true", help="8-bit weights in the transformer's matrix products; only for onnx"
    )
    parser.add_argument(
        "--dilation", action=argparse.BooleanOptionalAction, default=None,
        help="dilated backbone (DC5), for files with only weights; default: the checkpoint's setting, else the "
        "variant's default",
    )  # fmt: skip
    add_clustering_flags(parser)
    return parser


def add_clustering_flags(parser: argparse.ArgumentParser) -> None:
    """Add flags that override the checkpoint's settings of ENACT or of its rivals."""
    parser.add_argument("--enact_clusters", choices=CLUSTERS, help="ENACT: unit of pooling; default: the checkpoint's")
    parser.add_argument("--enact_order", choices=ORDERS, help="ENACT: order of the cells; default: the checkpoint's")
    for flag, text in (
        ("per_image", "compute a window length per image"),
        ("mask_padding", "leave padding out of the clusters"),
    ):
        parser.add_argument(
            f"--enact_{flag}", action=argparse.BooleanOptionalAction, default=None,
            help=f"ENACT: {text}; default: the checkpoint's",
        )  # fmt: skip
    parser.add_argument(
        "--enact_max_clusters", type=natural_int, metavar="M",
        help="ENACT: greatest number of clusters, 0 for no limit; default: the checkpoint's",
    )  # fmt: skip
    parser.add_argument(
        "--enact_temperature", type=non_negative_float, metavar="T",
        help="ENACT: temperature of the pooling weights, 0 for the published weights; default: the checkpoint's",
    )  # fmt: skip
    parser.add_argument(
        "--token_budget", type=natural_int, metavar="M",
        help=f"rivals of ENACT: most keys and values per image, 0 for 1/{DEFAULT_SHARE} of the tokens; default: the "
        "checkpoint's",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if the file's results differ from PyTorch's, or 2 for user errors."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Check the arguments, export, and compare the file's outputs with PyTorch's; return the exit status, see `main`.

    Raises:
        UserError: the arguments, the checkpoint or the environment are not usable.
    """
    if args.format == FORMAT:
        return export_folder(args)
    output = Path(args.output or own_name(args.checkpoint) + FORMATS[args.format].suffix)
    check_arguments(args, output)
    given = {flag: getattr(args, flag, None) for flag in ("dilation", *CLUSTERING_FLAGS)}
    flags = {flag: value for flag, value in given.items() if value is not None}
    detector = load_detector(args.checkpoint, "cpu", **flags)
    side = detector.args.eval_size
    interface = Interface(
        batch=None if args.dynamic else args.batch or 1,
        size=None if args.dynamic else tuple(args.size or (side, side)),
        mask=args.mask,
        raw=args.raw,
        masks=detector.args.masks,
        greatest_side=greatest_side(detector),
    )
    lengths = window_lengths(detector, args.clusters)
    check_interface(detector, interface, lengths)
    fix_window_lengths(detector.model, lengths)
    graph = DetectorGraph(detector.model, detector.postprocess, interface).eval()
    make_folder(output.parent, "--output")
    write(graph, describe(detector, args.checkpoint, interface, lengths), args.format, args.quantize, output)
    report(output, lengths)
    return check(graph, load_exported(output), args.quantize)


def export_folder(args: argparse.Namespace) -> int:
    """Write a folder for Hugging Face's transformers, and print how far its outputs are from this project's.

    Returns 1 if the outputs differ by more than `TOLERANCE`, else 0.
    """
    output = Path(args.output or f"{own_name(args.checkpoint)}_{FORMAT}")
    check_folder(args, output)
    detector = load_detector(args.checkpoint, "cpu", **({} if args.dilation is None else {"dilation": args.dilation}))
    check_model(detector)
    greatest = write_folder(detector, output)
    print(f"{output}: load it with transformers.AutoModelForObjectDetection.from_pretrained")
    print(f"greatest difference of its logits and boxes from this project's, on noise: {greatest:.1e}")
    if greatest <= TOLERANCE:
        return 0
    print(f"warning: the difference is more than {TOLERANCE:g}: do not use this folder", file=sys.stderr)
    return 1


def own_name(checkpoint: str) -> str:
    """Return a checkpoint's name without folder and suffix; that of the current folder for "."."""
    return Path(checkpoint).stem or Path.cwd().name


def check_arguments(args: argparse.Namespace, output: Path) -> None:
    """Refuse conflicting arguments and missing packages, before any work."""
    check_no_folder(output)
    suffix = FORMATS[args.format].suffix
    if output.suffix != suffix:
        raise UserError(f"--output {output}: the name must end with {suffix} for --format {args.format}")
    if args.dynamic and (args.size or args.batch):
        raise UserError("--dynamic conflicts with --size and --batch: leave out --dynamic, or --size and --batch")
    if args.quantize and args.format != "onnx":
        raise UserError(f"--quantize does not work with --format {args.format}; pass --format onnx")
    if args.format == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            needed(module, "--format onnx")


def window_lengths(detector: LoadedDetector, clusters: str | None) -> list[int] | None:
    """The window length of each encoder layer in tokens, from `--clusters`; None for lengths from each image."""
    layers = len(clusterings(detector.model))
    if clusters is None:
        return None
    if clusters.isdecimal() and int(clusters) > 0:
        return [int(clusters)] * layers
    # `check_interface` refuses `--clusters` for plain models, so skip looking for images.
    images = find_images(Path(clusters)) if layers else []
    return calibrated_lengths(detector.model, (detector.model_input(decode_image(path)) for path in images))


def find_images(path: Path) -> list[Path]:
    """The path of an image, or the paths of a folder's images, sorted by name."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--clusters {path}: neither a number of at least 1, nor an image, nor a folder of images")
    return images_in(path, f"--clusters {path}")


def write(graph: DetectorGraph, metadata: dict, form: str, quantized: bool, output: Path) -> None:
    """Write the file, with 8-bit weights if `quantized`."""
    if not quantized:
        FORMATS[form].write(graph, metadata, output)
        return
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.onnx"
        FORMATS[form].write(graph, metadata, whole)
        quantize(whole, output)


def report(output: Path, lengths: list[int] | None) -> None:
    """Print the file's size and the window lengths."""
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")
    if lengths is not None:
        print(f"fixed window lengths, tokens by encoder layer: {', '.join(map(str, lengths))}")


def check(graph: DetectorGraph, exported: ExportedDetector, quantized: bool) -> int:
    """Compare a file's outputs with its model's on blurred noise, and print the greatest difference.

    Returns 1 if it is more than rounding explains, else 0. For an 8-bit file, a large difference only prints a warning.
    """
    sizes = [graph.interface.size] if graph.interface.size else TEST_SIZES
    greatest = 0.0
    for i, size in enumerate(sizes):
        images = blurred_noise(graph.interface.batch or 1 + i, size)
        masks = (torch.zeros_like(images[:, 0], dtype=torch.bool),) if graph.interface.mask else ()
        with torch.inference_mode():
            expected = dict(zip(graph.interface.outputs, graph(images, *masks), strict=True))
        greatest = max(greatest, difference(expected, exported(images, *masks)))
    outputs = ("logits" if graph.interface.raw else "scores") + (
        ", boxes and masks" if graph.interface.masks else " and boxes"
    )
    print(f"greatest difference from PyTorch's {outputs}, on blurred noise: {greatest:.1e}")
    if greatest <= (INT8_TOLERANCE if quantized else TOLERANCE):
        return 0
    if quantized:
        print(
            f"warning: 8-bit weights change {outputs} by up to {greatest:.2g} on this machine. Measure the agreement "
            "on your images (python -m enact_common.benchmark agreement), or export without --quantize",
            file=sys.stderr,
        )
        return 0
    print(
        f"warning: the difference is more than {TOLERANCE:g}. With ENACT, rounding can move a cell near an inflection "
        "point of the information to another cluster: compare on your images (python -m enact_common.benchmark "
        "agreement)",
        file=sys.stderr,
    )
    return 1


def difference(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> float:
    """The greatest difference between outputs of a batch; infinite for NaN.

    Each detection is compared with the nearest one of the same label, because detections with nearly equal scores can
    swap places. Detections that tie with the last score are ignored, because another one can replace them.
    """
    if "labels" not in expected:
        return max(float((actual[name] - value).abs().nan_to_num(torch.inf).max()) for name, value in expected.items())
    scores, boxes = (actual[name].unsqueeze(1) - expected[name].unsqueeze(2) for name in ("scores", "boxes"))
    distance = torch.maximum(scores.abs(), boxes.abs().amax(dim=3)).nan_to_num(torch.inf)  # (batch, n, n)
    distance[actual["labels"].unsqueeze(1) != expected["labels"].unsqueeze(2)] = torch.inf
    tied = expected["scores"] <= expected["scores"].amin(dim=1, keepdim=True) + TOLERANCE
    greatest = float(distance.amin(dim=2).masked_fill(tied, 0).max())
    if "masks" in expected:
        # Models with masks return detections in query order, so no matching is needed.
        greatest = max(greatest, difference({"masks": expected["masks"]}, actual))
    return greatest


def blurred_noise(batch: int, size: tuple[int, int]) -> Tensor:
    """Return smooth random images, uint8 (batch, 3, height, width), as a rough stand-in for photographs."""
    coarse = torch.rand(batch, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    fine = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    return (fine.clamp(0, 1) * 255).round().to(torch.uint8)


if __name__ == "__main__":
    sys.exit(main())
