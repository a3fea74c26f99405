"""What ENACT saves, measured on this machine.

    python -m enact_common.benchmark scaling

times one self-attention layer of an encoder, forward and backward, clustered and plain, at several numbers of tokens.
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
from torch import nn

from enact_common.arguments import positive_int
from enact_common.attention import EnactSelfAttention

LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "nn.MultiheadAttention": nn.MultiheadAttention,
    "EnactSelfAttention": EnactSelfAttention,
}
BASELINE = "nn.MultiheadAttention"


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
    """Time and memory of every layer at one number of tokens; the layers take turns, so that drift hits all alike."""
    workloads = {name: Workload(name, tokens, **shape) for name in LAYERS}
    seconds: dict[str, list[float]] = {name: [] for name in LAYERS}
    for turn in range(repeat + 1):
        for name, workload in workloads.items():
            start = time.perf_counter()
            workload.step()
            # The first turn warms up.
            if turn:
                seconds[name].append(time.perf_counter() - start)
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
    if args.output:
        Path(args.output).write_text(json.dumps({"machine": machine(), **shape, "rows": rows}, indent=1))


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
    command.add_argument(
        "--repeat", type=positive_int, default=9, metavar="N", help="timed runs of each layer (default: %(default)s)"
    )
    command.add_argument("--output", metavar="FILE", help="write the figures as JSON too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a benchmark; its exit status."""
    args = build_parser().parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
