"""One layer of an encoder's self-attention by the size of the map: how time and memory grow with the tokens."""

import argparse
import contextlib
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from enact_common.attention.layer import EnactSelfAttention
from enact_common.benchmark.detectors import counted_clusters
from enact_common.benchmark.isolated import DONE, FAILED, OUT_OF_MEMORY, Outcome, Worker, worker_for
from enact_common.benchmark.labels import LAYERS, LIMIT, MIB, precision_text
from enact_common.benchmark.measuring import MemoryMeter, spread, synchronizer, take_turns
from enact_common.benchmark.report import (
    LEFT,
    RIGHT,
    Report,
    add_report_arguments,
    environment,
    figure,
    figure_range,
    heading,
    markdown_table,
    quotient,
)
from enact_common.cli.types import non_negative_float, positive_int
from enact_common.utils.device import AMP_DTYPE, autocast, check_precision, default_device, find_device
from enact_common.utils.errors import UserError
from enact_common.variants import load_variant

# Settings of the layers that have clusters of tokens.
CLUSTERINGS = {"enact": {}, "enact_regions": {"clusters": "regions"}, "enact_limited": {"max_clusters": LIMIT}}
# Ratios are over this one.
BASELINE = "mha"

# Height over width of a map: that of most photographs.
ASPECT = 3 / 4

# Tokens of the step before the measured one.
WARMUP_TOKENS = 64

# Exponents are fitted from here on: below, what a step costs whatever the map's size has a part in it.
FIT_FROM = 1000

# Of Anchor DETR's smoothing, tokens.
ANCHOR_SIGMA = 5.0


def map_shape(tokens: int) -> tuple[int, int]:
    """(height, width) of a map of about 3:4 with so many cells, or nearly so many where no such map has them.

    Args:
        tokens: at least 1.
    """
    heights = [h for h in range(1, math.isqrt(tokens) + 1) if tokens % h == 0 and 2 * h * h >= tokens]
    if heights:
        height = min(heights, key=lambda h: abs(math.log(h * h / tokens / ASPECT)))
        return height, tokens // height
    height = max(round(math.sqrt(tokens * ASPECT)), 1)
    return height, max(round(tokens / height), 1)


def blur(maps: Tensor, cells: float) -> Tensor:
    """Smooth maps (batch, h, w, d) with a Gaussian, and scale them back to their variance.

    Args:
        maps: edges are continued.
        cells: standard deviation; 0 leaves them as they are.
    """
    if cells == 0:
        return maps
    reach = math.ceil(3 * cells)
    weights = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float32) ** 2) / (2 * cells**2))
    weights = (weights / weights.sum()).view(1, 1, 1, -1)
    planes = maps.permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(1)  # (batch d, 1, h, w)
    smooth = F.conv2d(F.pad(planes, (reach, reach, 0, 0), mode="replicate"), weights)
    smooth = F.conv2d(F.pad(smooth, (0, 0, reach, reach), mode="replicate"), weights.transpose(2, 3))
    smooth = smooth.squeeze(1).unflatten(0, (len(maps), -1)).permute(0, 2, 3, 1)
    return (smooth * (maps.std() / smooth.std())).contiguous()


@dataclass
class Problem:
    """What all layers are measured on.

    Attributes:
        batch, channels, heads: of the attention.
        smooth: standard deviation of the maps' blur, cells.
        device: a device's name.
        amp: a key of `AMP_DTYPE`.
    """

    batch: int
    channels: int
    heads: int
    smooth: float
    device: str
    amp: str


class Workload:
    """One layer and a random map, as an encoder calls it.

    Args:
        name: a key of `LAYERS`.
        shape: (height, width) of the map.
        problem: the rest.
    """

    def __init__(self, name: str, shape: tuple[int, int], problem: Problem):
        torch.manual_seed(0)
        self.device = torch.device(problem.device)
        self.amp = problem.amp
        self.eager = name == "mha_eager"
        size = (problem.batch, *shape, problem.channels)
        src, pos = (blur(torch.randn(size), problem.smooth).to(self.device) for _ in range(2))
        make = self.row_column if name in ("rcda", "clustered_rcda") else self.multi_head
        self.layer, self.inputs, self.attend = make(name, src, pos, problem)
        self.layer.to(self.device)

    @staticmethod
    def multi_head(name: str, src: Tensor, pos: Tensor, problem: Problem):
        """(layer, tokens that get a gradient, function of them) for attention among tokens (N, batch, d)."""
        if name in CLUSTERINGS:
            layer = EnactSelfAttention(problem.channels, problem.heads, **CLUSTERINGS[name])
        else:
            layer = nn.MultiheadAttention(problem.channels, problem.heads)
        src, pos = (tensor.flatten(1, 2).transpose(0, 1).contiguous() for tensor in (src, pos))

        def attend(tokens: Tensor) -> Tensor:
            placed = tokens + pos
            return layer(placed, placed, tokens, need_weights=False)[0]

        return layer, src.requires_grad_(), attend

    @staticmethod
    def row_column(name: str, src: Tensor, pos: Tensor, problem: Problem):
        """The same for Anchor DETR's attention within a map (batch, h, w, d), with its clustering if it has one."""
        anchor = load_variant("anchor").models
        attention = anchor.row_column_decoupled_attention
        mask = torch.zeros(src.shape[:3], dtype=torch.bool, device=src.device)
        # The encoder's decides what is averaged and where positions go; queries of a decoder are not needed.
        positions = anchor.transformer.RowColumnPositions(pos[:, 0], pos[:, :, 0], mask, None, None)
        sizes = (problem.channels, problem.channels, 0.0)
        if name == "rcda":
            core = attention.MultiheadRCDA(problem.channels, problem.heads)
            layer = anchor.transformer.RowColumnEncoderLayer(core, *sizes)
        else:
            core = attention.ClusteredRCDA(problem.channels, problem.heads)
            layer = anchor.transformer.ClusteredEncoderLayer(core, *sizes, {"sigma": ANCHOR_SIGMA})
        return layer, src.requires_grad_(), lambda maps: layer.attend(maps, positions)

    def step(self) -> None:
        """Forward and backward."""
        with sdpa_kernel(SDPBackend.MATH) if self.eager else contextlib.nullcontext():
            with autocast(self.device, self.amp):
                output = self.attend(self.inputs)
            output.sum().backward()
        self.layer.zero_grad(set_to_none=True)
        self.inputs.grad = None

    def clusters(self) -> int | None:
        """Clusters an image; None where the layer has none."""
        with torch.no_grad(), counted_clusters(self.layer) as counts, autocast(self.device, self.amp):
            self.attend(self.inputs)
        return counts[0] if counts else None


def measure_memory(name: str, shape: tuple[int, int], problem: Problem) -> dict:
    """`memory`: bytes by which one step raises the peak; and `clusters`."""
    # What any first backward pass allocates for itself is not the layer's.
    Workload(name, map_shape(WARMUP_TOKENS), problem).step()
    workload = Workload(name, shape, problem)
    meter = MemoryMeter(workload.device)
    workload.step()
    memory = meter.read()["rise"]
    # Afterwards: even without gradients it could be the peak.
    return {"memory": memory, "clusters": workload.clusters()}


def measure_time(names: list[str], shape: tuple[int, int], problem: Problem, repeat: int) -> dict[str, list[float]]:
    """Seconds of the layers' steps, which take turns."""
    steps = {name: Workload(name, shape, problem).step for name in names}
    return take_turns(steps, repeat, synchronizer(torch.device(problem.device)))


def measure_size(names: list[str], shape: tuple[int, int], problem: Problem, repeat: int, worker: Worker) -> list[dict]:
    """The figures of every layer at one size, memory first: what does not fit takes no turns."""
    outcomes = {name: worker.call(measure_memory, name, shape, problem) for name in names}
    fitting = [name for name in names if outcomes[name].status == DONE]
    timed = Outcome(DONE, {})
    if fitting:
        timed = worker.call(measure_time, fitting, shape, problem, repeat)
    for outcome in (*outcomes.values(), timed):
        print(outcome.details, end="", file=sys.stderr)
    rows = []
    for name in names:
        outcome = timed if name in fitting else outcomes[name]
        row = {
            "layer": name,
            "tokens": shape[0] * shape[1],
            "shape": list(shape),
            "status": outcome.status,
            "message": outcome.message,
        }
        measured = outcomes[name].value or {"memory": None, "clusters": None}
        seconds = timed.value[name] if outcome.status == DONE else None
        rows.append(
            {
                **row,
                "runs": seconds,
                "seconds": spread(seconds) if seconds else None,
                **measured,
                "numerics": outcomes[name].numerics,
            }
        )
    add_ratios(rows)
    return rows


def add_ratios(rows: list[dict]) -> None:
    """Let each row of one size have `time_ratio` and `memory_ratio` over the baseline's; None without it."""
    base = next((row for row in rows if row["layer"] == BASELINE), {"seconds": None, "memory": None})
    for row in rows:
        times = [part["seconds"] and part["seconds"]["median"] for part in (row, base)]
        row["time_ratio"] = quotient(*times)
        row["memory_ratio"] = quotient(row["memory"], base["memory"])


def fit_exponent(tokens: list[int], values: list[float | None]) -> float | None:
    """The exponent b of the power law `a * tokens ** b` that is nearest, by least squares of the logarithms.

    Args:
        tokens: of each point; those below `FIT_FROM` are left out.
        values: as many; those that are missing or not positive are left out.

    Returns:
        None where less than two different sizes are left.
    """
    points = [(n, y) for n, y in zip(tokens, values, strict=True) if n >= FIT_FROM and y is not None and y > 0]
    if len({n for n, _ in points}) < 2:
        return None
    slope, _ = np.polyfit(*np.log(points).T, deg=1)
    return float(slope)


def fits_of(rows: list[dict]) -> dict[str, dict[str, float | None]]:
    """Each layer's exponents of `time` and `memory`."""
    fits = {}
    for name in dict.fromkeys(row["layer"] for row in rows):
        points = [row for row in rows if row["layer"] == name]
        tokens = [row["tokens"] for row in points]
        seconds = [row["seconds"] and row["seconds"]["median"] for row in points]
        fits[name] = {
            "time": fit_exponent(tokens, seconds),
            "memory": fit_exponent(tokens, [row["memory"] for row in points]),
        }
    return fits


def to_markdown(figures: dict) -> str:
    """The figures as a table in Markdown, and the exponents as another."""
    columns = {
        "tokens": RIGHT, "map": LEFT, "layer": LEFT, "ms": RIGHT, "ratio": RIGHT, "peak MiB": RIGHT,
        "ratio of peaks": RIGHT, "clusters": RIGHT,
    }  # fmt: skip
    lines = []
    for row in figures["rows"]:
        done = row["status"] == DONE
        lines.append(
            [
                str(row["tokens"]),
                " x ".join(map(str, row["shape"])),
                LAYERS[row["layer"]],
                figure_range(row["seconds"], ".1f", 1000) if done else row["status"],
                figure(row["time_ratio"], ".2f"),
                figure(row["memory"] and row["memory"] / MIB, ".1f"),
                figure(row["memory_ratio"], ".2f"),
                figure(row["clusters"], "d"),
            ]
        )
    settings = figures["settings"]
    maps = "random tokens" if settings["smooth"] == 0 else f"random maps, blurred by {settings['smooth']:g} cells"
    text = (
        f"{heading(figures)}\n\n"
        f"Forward and backward on {figures['device']}, batch {settings['batch']}, d = {settings['channels']}, "
        f"{settings['heads']} heads, {precision_text(settings['amp'])}, {maps}; median of "
        f"{settings['repeat']} runs (least to most); peak: by how much one step raises it; ratios: over "
        f"{LAYERS[BASELINE]}.\n\n" + markdown_table(columns, lines)
    )
    columns = {"layer": LEFT, "exponent of time": RIGHT, "exponent of memory": RIGHT}
    lines = [
        [LAYERS[name], figure(fit["time"], ".2f"), figure(fit["memory"], ".2f")]
        for name, fit in figures["fits"].items()
    ]
    return (
        f"{text}\n\nExponents b of cost = a N^b, by least squares of log cost on log N over the sizes from "
        f"{FIT_FROM} tokens on:\n\n" + markdown_table(columns, lines)
    )


def to_csv(rows: list[dict]) -> list[dict]:
    """The figures as rows of numbers; None where there is none."""
    names = ("layer", "tokens", "status", "memory", "clusters", "time_ratio", "memory_ratio")
    return [
        {name: row[name] for name in names}
        | {f"seconds_{name}": (row["seconds"] or {}).get(name) for name in ("median", "least", "most")}
        for row in rows
    ]


def run(args: argparse.Namespace) -> int:
    """Measure, print and write the files.

    Returns:
        the exit status: 1 where a layer failed for another reason than memory, else 0.

    Raises:
        UserError: flags do not work together, or not on this machine.
    """
    if args.channels % args.heads:
        raise UserError(f"--channels {args.channels}: must be a multiple of --heads ({args.heads})")
    device = find_device(args.device or default_device())
    check_precision(args.amp, device)
    report = Report(args.output_dir, "scaling")
    problem = Problem(args.batch, args.channels, args.heads, args.smooth, str(device), args.amp)
    names = ("batch", "channels", "heads", "smooth", "amp", "repeat")
    figures = {
        "benchmark": "scaling",
        **environment(args.argv, device),
        "settings": {name: getattr(args, name) for name in names},
        "rows": [],
    }
    layers = [name for name in LAYERS if name in args.layers]
    worker = worker_for(device)
    for shape in sorted({map_shape(tokens) for tokens in args.tokens}, key=math.prod):
        with worker:  # a process a size
            rows = measure_size(layers, shape, problem, args.repeat, worker)
        figures["rows"] += rows
        for row in rows:
            said = f"{1000 * row['seconds']['median']:.1f} ms" if row["seconds"] else row["status"]
            print(f"{row['tokens']} tokens, {LAYERS[row['layer']]}: {said} {row['message']}", file=sys.stderr)
            if row["status"] == OUT_OF_MEMORY:
                # Larger maps would not fit either.
                layers.remove(row["layer"])
        figures["fits"] = fits_of(figures["rows"])
        report.save_figures(figures)
    report.save(figures, to_markdown(figures), to_csv(figures["rows"]))
    return int(any(row["status"] == FAILED for row in figures["rows"]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--tokens",
        type=positive_int,
        nargs="+",
        default=[300, 600, 1050, 2100, 4200, 8400, 17000],
        metavar="N",
        help="cells of the maps, which are of about 3:4 (default: %(default)s)",
    )
    parser.add_argument("--layers", nargs="+", choices=tuple(LAYERS), default=list(LAYERS), help="which (default: all)")
    parser.add_argument(
        "--batch", type=positive_int, default=1, metavar="N", help="images a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--channels", type=positive_int, default=256, metavar="D", help="of each token (default: %(default)s)"
    )
    parser.add_argument(
        "--heads", type=positive_int, default=8, metavar="N", help="attention heads (default: %(default)s)"
    )
    parser.add_argument(
        "--smooth",
        type=non_negative_float,
        default=0.0,
        metavar="CELLS",
        help="blur the random maps by this standard deviation: neighbours in real maps resemble one another, and "
        "clusters become larger (default: 0, no blur)",
    )
    parser.add_argument(
        "--amp", choices=tuple(AMP_DTYPE), default="none", help="mixed precision (default: %(default)s)"
    )
    parser.add_argument("--device", help="where to compute: cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--repeat", type=positive_int, default=9, metavar="N", help="timed runs of each (default: %(default)s)"
    )
    add_report_arguments(parser)
