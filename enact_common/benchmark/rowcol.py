"""Row and column sums of Anchor DETR's attention against their definitions: time, and memory saved for the backward
pass."""

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

# (H, W, clusters) and (H, W, queries): feature maps of images of 800 x 1333 and 640 x 800 pixels at stride 16, with one
# cluster per 15 cells. Queries come from each cell (encoder) or from 300 anchor points in three patterns (decoder).
CLUSTERED_CASES = ((50, 84, 280), (40, 50, 133))
PLAIN_CASES = ((50, 84, 50 * 84), (40, 50, 40 * 50), (50, 84, 900))


class Product:
    """A row-column product with random attention weights and values, by its arguments' shapes, the values last."""

    def __init__(self, function: Callable[..., Tensor], shapes: list[tuple[int, ...]], device: torch.device):
        torch.manual_seed(0)
        self.function = function
        *weights, value = (torch.randn(shape, device=device) for shape in shapes)
        self.inputs = [x.requires_grad_() for x in (*(weight.softmax(-1) for weight in weights), value)]
        # Output gradients that differ between elements, as a loss gives.
        self.loss_weights = torch.randn_like(function(*self.inputs).detach())

    def step(self) -> None:
        """Run forward and backward of a weighted sum of the output."""
        (self.function(*self.inputs) * self.loss_weights).sum().backward()
        for tensor in self.inputs:
            tensor.grad = None

    def saved_bytes(self) -> int:
        """Return the bytes that the forward pass saves for the backward pass."""
        return self.count_saved(lambda: self.function(*self.inputs))

    @staticmethod
    def count_saved(forward: Callable[[], Tensor]) -> int:
        """Return the bytes that `forward` saves for its backward pass; each storage counts once."""
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward()  # noqa: F841, keeps the storages alive until they are counted
        return sum(storages.values())


def cases_of(args: argparse.Namespace) -> list[tuple[str, dict[str, Callable[..., Tensor]], list[tuple[int, ...]]]]:
    """Return (description, functions to compare by name, argument shapes) of each case."""
    ours = load_variant("anchor").models.row_column_product
    batch, head_dim = args.batch, args.channels
    cases = []
    for height, width, clusters in args.clustered or CLUSTERED_CASES:
        shapes = [(batch, height, clusters), (batch, width, clusters), (batch, clusters, head_dim)]
        functions = {"naive": naive_clustered, "ours": ours.clustered_row_column_product}
        cases.append((f"{height} x {width}, {clusters} clusters", functions, shapes))
    for height, width, queries in args.plain or PLAIN_CASES:
        shapes = [(batch, queries, width), (batch, queries, height), (batch, height, width, head_dim)]
        functions = {"naive": naive_row_column, "ours": ours.row_column_product}
        cases.append((f"{height} x {width}, {queries} queries", functions, shapes))
    return cases


def run(args: argparse.Namespace) -> int:
    """Print a Markdown table, write JSON with --output, and return the exit status."""
    device = find_device(args.device)
    where = machine(device)
    print(f"Machine: {where}")
    print(f"Forward and backward, batch times heads {args.batch}, head_dim {args.channels}, float32, "
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
    """Add the command's flags."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    for flag, symbol, cases in (("clustered", "M", CLUSTERED_CASES), ("plain", "Q", PLAIN_CASES)):
        default = ", ".join(" ".join(map(str, case)) for case in cases)
        parser.add_argument(
            f"--{flag}", type=positive_int, nargs=3, action="append", metavar=("H", "W", symbol),
            help=f"map size, number of {'clusters' if symbol == 'M' else 'queries'}; repeatable (default: {default})",
        )  # fmt: skip
    parser.add_argument(
        "--batch", type=positive_int, default=32, metavar="N", help="batch size times heads (default: %(default)s)"
    )
    parser.add_argument(
        "--channels", type=positive_int, default=32, metavar="D",
        help="head_dim: channels per head (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--repeat", type=positive_int, default=9, metavar="N", help="timed runs of each product (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="FILE", help="also write the figures as JSON (default: no file)")
