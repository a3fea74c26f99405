"""What ENACT saves, measured on this machine.

    python -m enact_common.benchmark scaling

times one self-attention layer of an encoder, forward and backward, clustered and plain, at several numbers of tokens.

    python -m enact_common.benchmark rowcol

times the sums of Anchor DETR's attention against the forms that they are defined by, and counts what both keep for
the backward pass.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from enact_common.arguments import positive_int
from enact_common.attention import EnactSelfAttention
from enact_common.errors import UserError
from enact_common.run import find_device
from enact_common.variants import load_variant

LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "nn.MultiheadAttention": nn.MultiheadAttention,
    "EnactSelfAttention": EnactSelfAttention,
}
BASELINE = "nn.MultiheadAttention"

# (H, W, clusters) and (H, W, queries): maps of images of 800 x 1333 and 640 x 800 pixels at stride 16, with a cluster
# in 15 cells, and queries from each cell (the encoder) or from 300 places in three patterns (the decoder).
CLUSTERED_CASES = ((50, 84, 280), (40, 50, 133))
PLAIN_CASES = ((50, 84, 50 * 84), (40, 50, 40 * 50), (50, 84, 900))


class Workload:
    """One layer with random tokens, as an encoder calls it.

    Args:
        layer: a key of `LAYERS`.
        tokens: N.
        batch, channels, heads: shape of the problem.
    """

    def __init__(self, layer: str, tokens: int, batch: int, channels: int, heads: int):
        torch.manual_seed(0)
        self.layer = LAYERS[layer](channels, heads)
        self.src = torch.randn(tokens, batch, channels, requires_grad=True)
        self.pos = torch.randn(tokens, batch, channels)

    def step(self) -> None:
        """Forward and backward."""
        placed = self.src + self.pos
        self.layer(placed, placed, self.src, need_weights=False)[0].sum().backward()
        self.layer.zero_grad(set_to_none=True)
        self.src.grad = None


def peak_memory(layer: str, tokens: int, shape: dict[str, int]) -> int:
    """Bytes by which one step raises the peak resident memory; run in a process of its own."""
    # What any first backward pass allocates for itself is not the layer's.
    Workload(layer, 64, **shape).step()
    workload = Workload(layer, tokens, **shape)
    # Peaks before this are forgotten where Linux lets us; else the import's own peak may hide a small layer's.
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_resident()
    workload.step()
    return peak_resident() - before


def peak_resident() -> int:
    """This process's peak resident memory, bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    # macOS counts bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(tokens: int, repeat: int, shape: dict[str, int]) -> list[dict]:
    """Time and memory of every layer at one number of tokens."""
    seconds = take_turns({name: Workload(name, tokens, **shape).step for name in LAYERS}, repeat)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {name: pool.apply(peak_memory, (name, tokens, shape)) for name in LAYERS}
    rows = []
    for name in LAYERS:
        median = statistics.median(seconds[name])
        rows.append(
            {
                "layer": name,
                "tokens": tokens,
                "seconds": median,
                "seconds_min": min(seconds[name]),
                "seconds_max": max(seconds[name]),
                "time_ratio": median / statistics.median(seconds[BASELINE]),
                "peak_bytes": memory[name],
                "memory_ratio": memory[name] / memory[BASELINE],
            }
        )
    return rows


def take_turns(
    steps: dict[str, Callable[[], None]], repeat: int, synchronize: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each step's runs, after one to warm up; the steps take turns, so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeat + 1):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def naive_clustered(col: Tensor, row: Tensor, value: Tensor) -> Tensor:
    """`clustered_row_column_product` by its definition: every cell's weights over the clusters, times the values."""
    weights = (col.unsqueeze(2) * row.unsqueeze(1)).flatten(1, 2)  # (B, H W, M)
    return (weights @ value).unflatten(1, (col.shape[1], row.shape[1]))


def naive_row_column(row: Tensor, col: Tensor, value: Tensor) -> Tensor:
    """`row_column_product` as a matrix product and a sum, all queries at once."""
    sums = row @ value.transpose(1, 2).flatten(2)  # (B, Q, H e)
    return (sums.unflatten(2, value.shape[1::2]) * col.unsqueeze(3)).sum(2)


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


def machine() -> str:
    """The machine in words."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return f"{cpu}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, PyTorch {torch.__version__}"


def scaling(args: argparse.Namespace) -> None:
    """Print a table in Markdown, and write JSON where asked to."""
    shape = {"batch": args.batch, "channels": args.channels, "heads": args.heads}
    print(f"Machine: {machine()}")
    print(f"Forward and backward, batch {args.batch}, d = {args.channels}, {args.heads} heads, float32, "
          f"median of {args.repeat} runs (least to most)\n")  # fmt: skip
    print("| tokens | layer | ms | ratio | peak MiB | ratio |")
    print("|---:|---|---:|---:|---:|---:|")
    rows = []
    for tokens in args.tokens:
        for row in measure(tokens, args.repeat, shape):
            rows.append(row)
            low, middle, high = (1000 * row[key] for key in ("seconds_min", "seconds", "seconds_max"))
            print(
                f"| {tokens} | `{row['layer']}` | {middle:.1f} ({low:.1f} to {high:.1f}) | {row['time_ratio']:.2f} "
                f"| {row['peak_bytes'] / 2**20:.1f} | {row['memory_ratio']:.2f} |",
                flush=True,
            )
    write_figures(args.output, {"machine": machine(), **shape, "rows": rows})


def rowcol_cases(args: argparse.Namespace) -> list[tuple[str, dict[str, Callable[..., Tensor]], list[tuple[int, ...]]]]:
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


def rowcol(args: argparse.Namespace) -> None:
    """Print a table in Markdown, and write JSON where asked to."""
    device = find_device(args.device)
    on_gpu = device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    where = machine() + (f", on {torch.cuda.get_device_name(device)}" if on_gpu else "")
    print(f"Machine: {where}")
    print(f"Forward and backward, batch times heads {args.batch}, e = {args.channels}, float32, "
          f"median of {args.repeat} runs (least to most)\n")  # fmt: skip
    print("| map | naive ms | ours ms | ratio | naive saves MiB | ours saves MiB | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    rows = []
    for case, functions, shapes in rowcol_cases(args):
        products = {name: Product(function, shapes, device) for name, function in functions.items()}
        saved = {name: product.saved_bytes() for name, product in products.items()}
        seconds = take_turns({name: product.step for name, product in products.items()}, args.repeat, synchronize)
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
    write_figures(args.output, {"machine": where, "batch": args.batch, "channels": args.channels, "rows": rows})


def write_figures(path: str | None, figures: dict) -> None:
    """Write figures as JSON, if there is a path to write them to."""
    if path:
        Path(path).write_text(json.dumps(figures, indent=1))


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's command line."""
    parser = argparse.ArgumentParser(prog="python -m enact_common.benchmark", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("scaling", help="one attention layer by number of tokens, on the CPU")
    command.set_defaults(run=scaling)
    command.add_argument(
        "--tokens",
        type=positive_int,
        nargs="+",
        default=[300, 1050, 4200],
        metavar="N",
        help="tokens an image (default: %(default)s)",
    )
    command.add_argument(
        "--batch", type=positive_int, default=2, metavar="N", help="images a batch (default: %(default)s)"
    )
    command.add_argument(
        "--channels", type=positive_int, default=256, metavar="D", help="of each token (default: %(default)s)"
    )
    command.add_argument(
        "--heads", type=positive_int, default=8, metavar="N", help="attention heads (default: %(default)s)"
    )

    command = commands.add_parser("rowcol", help="the sums of Anchor DETR's attention, against their definitions")
    command.set_defaults(run=rowcol)
    command.add_argument(
        "--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, ... (default: %(default)s)"
    )
    for flag, what, cases in (("clustered", "M", CLUSTERED_CASES), ("plain", "Q", PLAIN_CASES)):
        default = ", ".join(" ".join(map(str, case)) for case in cases)
        command.add_argument(
            f"--{flag}",
            type=positive_int,
            nargs=3,
            action="append",
            metavar=("H", "W", what),
            help=f"a map and its {'clusters' if what == 'M' else 'queries'}; may be repeated (default: {default})",
        )
    command.add_argument(
        "--batch", type=positive_int, default=32, metavar="N", help="images a batch, times heads (default: %(default)s)"
    )
    command.add_argument(
        "--channels", type=positive_int, default=32, metavar="E", help="of each head (default: %(default)s)"
    )

    for command in commands.choices.values():
        command.add_argument(
            "--repeat", type=positive_int, default=9, metavar="N", help="timed runs of each (default: %(default)s)"
        )
        command.add_argument("--output", metavar="FILE", help="write the figures as JSON too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a benchmark; its exit status, 2 for what the user can mend."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
