"""The sums of Anchor DETR's attention against the forms that they are defined by: time, and what both keep for the
backward pass."""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from enact_common.benchmark.eager import naive_clustered, naive_row_column
from enact_common.benchmark.isolated import numerics
from enact_common.benchmark.measuring import machine, synchronizer, take_turns
from enact_common.cli.types import positive_int
from enact_common.utils.device import find_device
from enact_common.utils.files import write_file
from enact_common.variants import load_variant

# (H, W, clusters) and (H, W, queries): maps of images of 800 x 1333 and 640 x 800 pixels at stride 16, with a cluster
# in 15 cells, and queries from each cell (the encoder) or from 300 places in three patterns (the decoder).
CLUSTERED_CASES = ((50, 84, 280), (40, 50, 133))
PLAIN_CASES = ((50, 84, 50 * 84), (40, 50, 40 * 50), (50, 84, 900))


class Product:
    """One of the sums, with random weights and values.

    Args:
        function: what computes it.
        shapes: of its arguments; the last one's are the values.
        device: where.
    """

    def __init__(self, function: Callable[..., Tensor], shapes: list[tuple[int, ...]], device: torch.device):
        torch.manual_seed(0)
        self.function = function
        *weights, value = (torch.randn(shape, device=device) for shape in shapes)
        self.inputs = [x.requires_grad_() for x in (*(weight.softmax(-1) for weight in weights), value)]
        # Gradients that differ from element to element, as a loss would give.
        self.loss_weights = torch.randn_like(function(*self.inputs).detach())

    def step(self) -> None:
        """Forward and backward of a weighted sum of the output."""
        (self.function(*self.inputs) * self.loss_weights).sum().backward()
        for tensor in self.inputs:
            tensor.grad = None

    def saved_bytes(self) -> int:
        """What the forward pass keeps for the backward pass."""
        return self.count_saved(lambda: self.function(*self.inputs))

    @staticmethod
    def count_saved(forward: Callable[[], Tensor]) -> int:
        """The bytes that a computation keeps for its backward pass, each storage counted once."""
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward()  # noqa: F841, holds the storages until they are counted
        return sum(storages.values())


def cases_of(args: argparse.Namespace) -> list[tuple[str, dict[str, Callable[..., Tensor]], list[tuple[int, ...]]]]:
    """Cases in words, the functions to compare, and the shapes of their arguments."""
    ours = load_variant("anchor").models.row_column_product
    batch, e = args.batch, args.channels
    cases = []
    for height, width, clusters in args.clustered or CLUSTERED_CASES:
        shapes = [(batch, height, clusters), (batch, width, clusters), (batch, clusters, e)]
        functions = {"naive": naive_clustered, "ours": ours.clustered_row_column_product}
        cases.append((f"{height} x {width}, {clusters} clusters", functions, shapes))
    for height, width, queries in args.plain or PLAIN_CASES:
        shapes = [(batch, queries, width), (batch, queries, height), (batch, height, width, e)]
        functions = {"naive": naive_row_column, "ours": ours.row_column_product}
        cases.append((f"{height} x {width}, {queries} queries", functions, shapes))
    return cases


def run(args: argparse.Namespace) -> int:
    """Print a table in Markdown, and write JSON where asked to; the exit status."""
    device = find_device(args.device)
    where = machine(device)
    print(f"Machine: {where}")
    print(f"Forward and backward, batch times heads {args.batch}, e = {args.channels}, float32, "
          f"median of {args.repeat} runs (least to most)\n")  # fmt: skip
    print("| map | naive ms | ours ms | ratio | naive saves MiB | ours saves MiB | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    rows = []
    for case, functions, shapes in cases_of(args):
        products = {name: Product(function, shapes, device) for name, function in functions.items()}
        saved = {name: product.saved_bytes() for name, product in products.items()}
        steps = {name: product.step for name, product in products.items()}
        seconds = take_turns(steps, args.repeat, synchronizer(device))
        median = {name: statistics.median(runs) for name, runs in seconds.items()}
        row = {"case": case, "seconds": seconds, "saved_bytes": saved}
        row["time_ratio"] = median["ours"] / median["naive"]
        row["saved_ratio"] = saved["ours"] / saved["naive"]
        rows.append(row)
        times = " | ".join(
            f"{1000 * median[name]:.1f} ({1000 * min(runs):.1f} to {1000 * max(runs):.1f})"
            for name, runs in seconds.items()
        )
        mib = " | ".join(f"{count / 2**20:.1f}" for count in saved.values())
        print(f"| {case} | {times} | {row['time_ratio']:.2f} | {mib} | {row['saved_ratio']:.3f} |", flush=True)
    if args.output:
        settings = {"batch": args.batch, "channels": args.channels}
        figures = {"machine": where, **settings, "numerics": numerics(), "rows": rows}
        write_file(Path(args.output), lambda file: file.write(json.dumps(figures, indent=1).encode()), sync=False)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, ... (default: %(default)s)"
    )
    for flag, what, cases in (("clustered", "M", CLUSTERED_CASES), ("plain", "Q", PLAIN_CASES)):
        default = ", ".join(" ".join(map(str, case)) for case in cases)
        parser.add_argument(
            f"--{flag}",
            type=positive_int,
            nargs=3,
            action="append",
            metavar=("H", "W", what),
            help=f"a map and its {'clusters' if what == 'M' else 'queries'}; may be repeated (default: {default})",
        )
    parser.add_argument(
        "--batch", type=positive_int, default=32, metavar="N", help="images a batch, times heads (default: %(default)s)"
    )
    parser.add_argument(
        "--channels", type=positive_int, default=32, metavar="E", help="of each head (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat", type=positive_int, default=9, metavar="N", help="timed runs of each (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON too")
