"""Write a trained detector as a file for another runtime: `python -m enact_common.export CHECKPOINT --format onnx`.

The file takes pixels as they are stored, uint8 (batch, 3, height, width), 0 to 255, red, green, blue, and normalises
them itself. It gives scores, labels and boxes (left, top, right, bottom as fractions of the image's width and height),
and of models with masks these too, and says so in its metadata.
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
from enact_common.attention.hilbert import ORDERS
from enact_common.cli.flags import CLUSTERING_FLAGS
from enact_common.cli.program import program
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
from enact_common.inference.detector import LoadedDetector, load_detector
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import check_no_folder, make_folder

# Outputs of a file may differ from PyTorch's by this much: other runtimes sum in another order.
TOLERANCE = 1e-3

# An 8-bit file's scores and boxes may differ by this much before the export warns.
INT8_TOLERANCE = 0.05

# Sides that a file of any size is tried at, beside the one it was recorded with.
TRIED_SIZES = ((128, 160), (224, 192))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("enact_common.export"), description=" ".join(__doc__.split("\n\n", 1)[1].split()),
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "checkpoint", metavar="CKPT",
        help="trained detector: a path or an https URL; of this project, ENACT's authors or the original repositories",
    )  # fmt: skip
    parser.add_argument("--format", choices=tuple(FORMATS), default="onnx", help="kind of file")
    parser.add_argument(
        "--output", metavar="FILE", help="to write; default: the checkpoint's name with the format's suffix, here"
    )
    parser.add_argument(
        "--size", type=positive_int, nargs=2, metavar=("H", "W"),
        help="pixels of the images that the file takes; default: the model's shorter side in evaluation, both ways",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=positive_int, metavar="N", help="images that the file takes at a time; default: 1"
    )
    parser.add_argument(
        "--dynamic", action="store_true", help="any number of images, of any size, in place of --batch and --size"
    )
    parser.add_argument(
        "--mask", action="store_true",
        help="a second input, bool (batch, height, width), true where images are padded, for batches of several sizes",
    )  # fmt: skip
    parser.add_argument(
        "--raw",
        action="store_true",
        help="give pred_logits and pred_boxes, and of models with masks pred_masks, of all queries, as the model does",
    )
    parser.add_argument(
        "--clusters", metavar="N|PATH",
        help="ENACT: fixed windows, for runtimes without sizes that depend on data: of N tokens; or, of an image or a "
        "folder of them, as long as each layer's are there, by the median; default: as long as follows from the image",
    )  # fmt: skip
    parser.add_argument(
        "--quantize", action="store_true", help="8-bit weights in the transformer's matrix products; for onnx alone"
    )
    parser.add_argument(
        "--dilation", action=argparse.BooleanOptionalAction, default=None,
        help="whether the backbone is dilated (DC5), for files of weights alone, which do not say; default: as the "
        "checkpoint says, else as the variant's published model",
    )  # fmt: skip
    add_clustering_flags(parser)
    return parser


def add_clustering_flags(parser: argparse.ArgumentParser) -> None:
    """ENACT's settings, where they shall differ from the checkpoint's."""
    parser.add_argument("--enact_clusters", choices=CLUSTERS, help="ENACT: what is pooled; default: the checkpoint's")
    parser.add_argument("--enact_order", choices=ORDERS, help="ENACT: in which cells follow each other; likewise")
    for flag, text in (
        ("per_image", "each image has its own window length"),
        ("mask_padding", "padding is not clustered"),
    ):
        parser.add_argument(
            f"--enact_{flag}", action=argparse.BooleanOptionalAction, default=None,
            help=f"ENACT: {text}; default: the checkpoint's",
        )  # fmt: skip
    parser.add_argument(
        "--enact_max_clusters", type=natural_int, metavar="M",
        help="ENACT: at most so many clusters, 0 for no limit; default: the checkpoint's",
    )  # fmt: skip
    parser.add_argument(
        "--enact_temperature", type=non_negative_float, metavar="T",
        help="ENACT: of the shares in a cluster, 0 for the published ones; default: the checkpoint's",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: its words; None for the process's own.

    Returns:
        the exit status: 0; 1 where the file gives other results than PyTorch; 2 for what the user can mend.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Check, export, and compare what the file gives with what PyTorch gives.

    Returns:
        the exit status, as `main` says.

    Raises:
        UserError: something is wrong that the user can mend.
    """
    output = Path(args.output or Path(args.checkpoint).with_suffix(FORMATS[args.format].suffix).name)
    check_arguments(args, output)
    flags = {flag: getattr(args, flag) for flag in ("dilation", *CLUSTERING_FLAGS) if getattr(args, flag) is not None}
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


def check_arguments(args: argparse.Namespace, output: Path) -> None:
    """Refuse what does not go together, before any work.

    Raises:
        UserError: naming the flag and the way out.
    """
    check_no_folder(output)
    suffix = FORMATS[args.format].suffix
    if output.suffix != suffix:
        raise UserError(f"--output {output}: files of --format {args.format} end with {suffix}")
    if args.dynamic and (args.size or args.batch):
        raise UserError("--dynamic takes images of any number and size: leave out --size and --batch, or --dynamic")
    if args.quantize and args.format != "onnx":
        raise UserError(f"--quantize works with --format onnx alone, not with {args.format}")
    if args.format == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            needed(module, "--format onnx")


def window_lengths(detector: LoadedDetector, clusters: str | None) -> list[int] | None:
    """The window length of each encoder layer that `--clusters` asks for, tokens; None for those of the image.

    Raises:
        UserError: there is no such file or folder, or no image in it.
    """
    layers = len(clusterings(detector.model))
    if clusters is None:
        return None
    if clusters.isdecimal() and int(clusters) > 0:
        return [int(clusters)] * layers
    # A plain model is refused for having none, whatever the images are.
    images = find_images(Path(clusters)) if layers else []
    return calibrated_lengths(detector.model, (detector.model_input(decode_image(path)) for path in images))


def find_images(path: Path) -> list[Path]:
    """An image's path, or those of a folder's images in the order of their names.

    Raises:
        UserError: there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--clusters {path}: neither a number of at least 1, nor an image, nor a folder of images")
    return images_in(path, f"--clusters {path}")


def write(graph: DetectorGraph, metadata: dict, form: str, quantized: bool, output: Path) -> None:
    """Write the file, in int8 where asked for."""
    if not quantized:
        FORMATS[form].write(graph, metadata, output)
        return
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.onnx"
        FORMATS[form].write(graph, metadata, whole)
        quantize(whole, output)


def report(output: Path, lengths: list[int] | None) -> None:
    """Say what was written."""
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")
    if lengths is not None:
        print(f"windows of fixed length, tokens by encoder layer: {', '.join(map(str, lengths))}")


def check(graph: DetectorGraph, exported: ExportedDetector, quantized: bool) -> int:
    """Compare a file with the model that it was made of, on blurred noise, and say how far they are apart.

    Returns:
        1 if they differ by more than rounding explains, else 0. An 8-bit file is meant to differ, so it gets a warning
        at most.
    """
    sizes = [graph.interface.size] if graph.interface.size else TRIED_SIZES
    greatest = 0.0
    for i, size in enumerate(sizes):
        images = blurred_noise(graph.interface.batch or 1 + i, size)
        masks = (torch.zeros_like(images[:, 0], dtype=torch.bool),) if graph.interface.mask else ()
        with torch.inference_mode():
            expected = dict(zip(graph.interface.outputs, graph(images, *masks), strict=True))
        greatest = max(greatest, difference(expected, exported(images, *masks)))
    what = ("logits" if graph.interface.raw else "scores") + (
        ", boxes and masks" if graph.interface.masks else " and boxes"
    )
    print(f"greatest difference from PyTorch's {what}, on blurred noise: {greatest:.1e}")
    if greatest <= (INT8_TOLERANCE if quantized else TOLERANCE):
        return 0
    if quantized:
        print(
            f"warning: 8-bit weights change {what} by up to {greatest:.2g} on this machine. Measure the loss on your "
            "own images (python -m enact_common.benchmark agreement), or export without --quantize",
            file=sys.stderr,
        )
        return 0
    print(
        f"warning: more than {TOLERANCE:g}. With ENACT, a cell whose information is near an inflection point may fall "
        "on either side of it: compare on images of yours (python -m enact_common.benchmark agreement)",
        file=sys.stderr,
    )
    return 1


def difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """How far outputs of a batch are apart; infinite where they are not numbers.

    Of detections, each one's nearest of the same label counts: those of nearly equal scores may change places, or take
    the last place in the list from one another.
    """
    if "labels" not in expected:
        return max(float((found[name] - value).abs().nan_to_num(torch.inf).max()) for name, value in expected.items())
    scores, boxes = (found[name].unsqueeze(1) - expected[name].unsqueeze(2) for name in ("scores", "boxes"))
    apart = torch.maximum(scores.abs(), boxes.abs().amax(dim=3)).nan_to_num(torch.inf)  # (batch, n, n)
    apart[found["labels"].unsqueeze(1) != expected["labels"].unsqueeze(2)] = torch.inf
    last = expected["scores"] <= expected["scores"].amin(dim=1, keepdim=True) + TOLERANCE
    greatest = float(apart.amin(dim=2).masked_fill(last, 0).max())
    if "masks" in expected:
        # Of one order: that of the queries.
        greatest = max(greatest, difference({"masks": expected["masks"]}, found))
    return greatest


def blurred_noise(batch: int, size: tuple[int, int]) -> Tensor:
    """Images uint8 (batch, 3, height, width) that look a little more like photographs than noise does."""
    coarse = torch.rand(batch, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    fine = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    return (fine.clamp(0, 1) * 255).round().to(torch.uint8)


if __name__ == "__main__":
    sys.exit(main())
