"""Time and memory of one encoder self-attention layer as the number of tokens grows."""

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

from enact_common.attention.kernels import TORCH, TRITON
from enact_common.attention.layer import EnactSelfAttention
from enact_common.attention.packed import packed_windows
from enact_common.attention.rivals import RIVALS, RivalSelfAttention
from enact_common.benchmark.detectors import add_common_flags, counted_clusters
from enact_common.benchmark.isolated import DONE, FAILED, OUT_OF_MEMORY, Outcome, Worker, worker_for
from enact_common.benchmark.labels import (
    GPU_LAYERS,
    GRAPHED_LAYERS,
    LAYERS,
    LIMIT,
    MIB,
    PACKED_LAYERS,
    TRITON_LAYERS,
    precision_text,
)
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
from enact_common.models.graphed import capture
from enact_common.models.layers import map_keywords
from enact_common.utils.device import autocast, check_precision, default_device, find_device
from enact_common.utils.errors import UserError
from enact_common.variants import load_variant

# Settings of the `EnactSelfAttention` layers, by name.
CLUSTERINGS = {
    "enact": {},
    "enact_regions": {"clusters": "regions"},
    "enact_limited": {"max_clusters": LIMIT},
    "enact_equal": {"clusters": "equal", "max_clusters": LIMIT},
}
# Layer that the ratios are relative to.
BASELINE = "mha"

# Height over width of a map, as of most photographs.
ASPECT = 3 / 4

# Tokens of the warm-up step before the measured one.
WARMUP_TOKENS = 64

# Least number of tokens for fitting exponents: below, the fixed cost of a step distorts them.
FIT_FROM = 1000

# Sigma of Anchor DETR's smoothing kernel, tokens.
ANCHOR_SIGMA = 5.0


def map_shape(tokens: int) -> tuple[int, int]:
    """Return (height, width) of a map of about 3:4 with `tokens` cells, or nearly as many if no such map exists."""
    heights = [h for h in range(1, math.isqrt(tokens) + 1) if tokens % h == 0 and 2 * h * h >= tokens]
    if heights:
        height = min(heights, key=lambda h: abs(math.log(h * h / tokens / ASPECT)))
        return height, tokens // height
    height = max(round(math.sqrt(tokens * ASPECT)), 1)
    return height, max(round(tokens / height), 1)


def blur(maps: Tensor, cells: float) -> Tensor:
    """Smooth maps (batch, h, w, d) with a Gaussian, then rescale them to their original variance.

    `cells` is its standard deviation; 0 returns `maps` unchanged. The maps' edges are replicated.
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
    """The settings of all layers: sizes of the attention, the maps' blur in cells, device, precision."""

    batch: int
    channels: int
    heads: int
    smooth: float
    device: str
    amp: str


class Workload:
    """One layer of `LAYERS` with a random map (height, width) as its input, called as in an encoder."""

    def __init__(self, name: str, shape: tuple[int, int], problem: Problem):
        torch.manual_seed(0)
        self.device = torch.device(problem.device)
        self.amp = problem.amp
        self.eager = name == "mha_eager"
        size = (problem.batch, *shape, problem.channels)
        src, pos = (blur(torch.randn(size), problem.smooth).to(self.device) for _ in range(2))
        graphed, name = name in GRAPHED_LAYERS, GRAPHED_LAYERS.get(name, name)
        self.packs, name = name in PACKED_LAYERS, PACKED_LAYERS.get(name, name)
        kernels, name = TRITON if name in TRITON_LAYERS else TORCH, TRITON_LAYERS.get(name, name)
        make = self.row_column if name in ("rcda", "clustered_rcda") else self.multi_head
        self.layer, self.inputs, self.attend = make(name, src, pos, problem, kernels)
        self.layer.to(self.device)
        if graphed:
            with autocast(self.device, self.amp):
                self.attend = capture(self.layer, self.attend, self.inputs)

    @staticmethod
    def multi_head(name: str, src: Tensor, pos: Tensor, problem: Problem, kernels: str):
        """Return (layer, input tokens (N, batch, d) that require a gradient, attention as a function of the tokens)."""
        if name in CLUSTERINGS:
            layer = EnactSelfAttention(problem.channels, problem.heads, kernels=kernels, **CLUSTERINGS[name])
        elif name in RIVALS:
            budget = {"token_budget": LIMIT} if RIVALS[name].takes_budget else {}
            layer = RIVALS[name](problem.channels, problem.heads, **budget)
        else:
            layer = nn.MultiheadAttention(problem.channels, problem.heads)
        keywords = {"need_weights": False, **map_keywords(layer, tuple(src.shape[1:3]))}
        src, pos = (tensor.flatten(1, 2).transpose(0, 1).contiguous() for tensor in (src, pos))

        def attend(tokens: Tensor) -> Tensor:
            placed = tokens + pos
            return layer(placed, placed, tokens, **keywords)[0]

        return layer, src.requires_grad_(), attend

    @staticmethod
    def row_column(name: str, src: Tensor, pos: Tensor, problem: Problem, kernels: str):
        """Return the same as `multi_head` for Anchor DETR's attention, plain or clustered, on maps (b, h, w, d)."""
        anchor = load_variant("anchor").models
        attention = anchor.row_column_decoupled_attention
        mask = torch.zeros(src.shape[:3], dtype=torch.bool, device=src.device)
        # The encoder layer averages rows and columns and adds positions; decoder queries are not needed.
        positions = anchor.transformer.RowColumnPositions(pos[:, 0], pos[:, :, 0], mask, None, None)
        sizes = (problem.channels, problem.channels, 0.0)
        if name == "rcda":
            core = attention.MultiheadRCDA(problem.channels, problem.heads, kernels=kernels)
            layer = anchor.transformer.RowColumnEncoderLayer(core, *sizes)
        else:
            core = attention.ClusteredRCDA(problem.channels, problem.heads, kernels=kernels)
            layer = anchor.transformer.ClusteredEncoderLayer(core, *sizes, {"sigma": ANCHOR_SIGMA, "kernels": kernels})
        return layer, src.requires_grad_(), lambda maps: layer.attend(maps, positions)

    def step(self) -> None:
        """Run forward and backward once."""
        with contextlib.ExitStack() as stack:
            if self.eager:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.packs:
                stack.enter_context(packed_windows())
            with autocast(self.device, self.amp):
                output = self.attend(self.inputs)
            output.sum().backward()
        self.layer.zero_grad(set_to_none=True)
        self.inputs.grad = None

    def clusters(self) -> int | None:
        """Return the number of clusters per image, or a rival's budget; None for a layer that has neither."""
        if isinstance(self.layer, RivalSelfAttention):
            return self.layer.budget(len(self.inputs)) if self.layer.takes_budget else None
        with torch.no_grad(), counted_clusters(self.layer) as counts, autocast(self.device, self.amp):
            self.attend(self.inputs)
        return counts[0] if counts else None


def measure_memory(name: str, shape: tuple[int, int], problem: Problem) -> dict:
    """Return `memory`, the bytes by which one step raises the peak, and `clusters`."""
    # Exclude the one-time allocations of the first backward pass.
    Workload(name, map_shape(WARMUP_TOKENS), problem).step()
    workload = Workload(name, shape, problem)
    meter = MemoryMeter(workload.device)
    workload.step()
    memory = meter.read()["rise"]
    # Count clusters after reading the meter, since the extra forward pass could raise the peak.
    return {"memory": memory, "clusters": workload.clusters()}


def measure_time(names: list[str], shape: tuple[int, int], problem: Problem, repeat: int) -> dict[str, list[float]]:
    """Return the seconds of each layer's steps, timed in turns."""
    steps = {name: Workload(name, shape, problem).step for name in names}
    return take_turns(steps, repeat, synchronizer(torch.device(problem.device)))


def measure_size(names: list[str], shape: tuple[int, int], problem: Problem, repeat: int, worker: Worker) -> list[dict]:
    """Measure all layers at one size: memory first, then the time of the layers that fit."""
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
        seconds = timed.value[name] if outcome.status == DONE else None
        rows.append(
            {
                "layer": name,
                "tokens": shape[0] * shape[1],
                "shape": list(shape),
                **outcome.fields(),
                "runs": seconds,
                "seconds": spread(seconds) if seconds else None,
                **(outcomes[name].value or {"memory": None, "clusters": None}),
                "numerics": outcomes[name].numerics,
            }
        )
    add_ratios(rows)
    return rows


def add_ratios(rows: list[dict]) -> None:
    """Add `time_ratio` and `memory_ratio` over the baseline to the rows of one size; None without a baseline."""
    base = next((row for row in rows if row["layer"] == BASELINE), {"seconds": None, "memory": None})
    for row in rows:
        times = [part["seconds"] and part["seconds"]["median"] for part in (row, base)]
        row["time_ratio"] = quotient(*times)
        row["memory_ratio"] = quotient(row["memory"], base["memory"])


def fit_exponent(tokens: list[int], values: list[float | None]) -> float | None:
    """Return the exponent b of the power law `a * tokens ** b`, fitted by least squares of the logarithms.

    Points below `FIT_FROM` tokens, and with a missing or non-positive value, are ignored. None if fewer than two
    different sizes remain.
    """
    points = [(n, y) for n, y in zip(tokens, values, strict=True) if n >= FIT_FROM and y is not None and y > 0]
    if len({n for n, _ in points}) < 2:
        return None
    slope, _ = np.polyfit(*np.log(points).T, deg=1)
    return float(slope)


def fits_of(rows: list[dict]) -> dict[str, dict[str, float | None]]:
    """Return the fitted exponents of `time` and `memory`, by layer."""
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
    """Return the figures and the exponents as two Markdown tables."""
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
        f"{settings['repeat']} runs (least to most). Peak: rise of the peak memory in one step. Ratios: relative to "
        f"{LAYERS[BASELINE]}.\n\n" + markdown_table(columns, lines)
    )
    columns = {"layer": LEFT, "exponent of time": RIGHT, "exponent of memory": RIGHT}
    lines = [
        [LAYERS[name], figure(fit["time"], ".2f"), figure(fit["memory"], ".2f")]
        for name, fit in figures["fits"].items()
    ]
    return (
        f"{text}\n\nExponents b of cost = a N^b, fitted by least squares of log cost on log N for at least "
        f"{FIT_FROM} tokens:\n\n" + markdown_table(columns, lines)
    )


def to_csv(rows: list[dict]) -> list[dict]:
    """Return the figures as CSV rows; missing values are None."""
    names = ("layer", "tokens", "status", "memory", "clusters", "time_ratio", "memory_ratio")
    return [
        {name: row[name] for name in names}
        | {f"seconds_{name}": (row["seconds"] or {}).get(name) for name in ("median", "least", "most")}
        for row in rows
    ]


def run(args: argparse.Namespace) -> int:
    """Measure all rows, print the results and write the files; return 1 if one failed, unless for memory."""
    if args.channels % args.heads:
        raise UserError(f"--channels {args.channels}: must be a multiple of --heads ({args.heads})")
    device = find_device(args.device or default_device())
    for name in args.layers or ():
        if name in GPU_LAYERS and device.type != "cuda":
            raise UserError(f"--layers {name}: needs a GPU, not {device}; pass {GPU_LAYERS[name]}")
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
    wanted = args.layers or [name for name in LAYERS if device.type == "cuda" or name not in GPU_LAYERS]
    layers = [name for name in LAYERS if name in wanted]
    worker = worker_for(device)
    for shape in sorted({map_shape(tokens) for tokens in args.tokens}, key=math.prod):
        with worker:  # one process per size
            rows = measure_size(layers, shape, problem, args.repeat, worker)
        figures["rows"] += rows
        for row in rows:
            summary = f"{1000 * row['seconds']['median']:.1f} ms" if row["seconds"] else row["status"]
            print(f"{row['tokens']} tokens, {LAYERS[row['layer']]}: {summary} {row['message']}", file=sys.stderr)
            if row["status"] == OUT_OF_MEMORY:
                # Skip the layer on larger maps, which would not fit either.
                layers.remove(row["layer"])
        figures["fits"] = fits_of(figures["rows"])
        report.save_figures(figures)
    report.save(figures, to_markdown(figures), to_csv(figures["rows"]))
    return int(any(row["status"] == FAILED for row in figures["rows"]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--tokens", type=positive_int, nargs="+", default=[300, 600, 1050, 2100, 4200, 8400, 17000], metavar="N",
        help="numbers of tokens to measure; the maps are about 3:4 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", nargs="+", choices=tuple(LAYERS), metavar="LAYER",
        help=f"layers to measure, of {', '.join(LAYERS)}; triton and graph need a GPU (default: all that run)",
    )  # fmt: skip
    add_common_flags(parser, batch=1, amp="none", device=None, repeat=9)
    parser.add_argument(
        "--channels", type=positive_int, default=256, metavar="D", help="channels of each token (default: %(default)s)"
    )
    parser.add_argument(
        "--heads", type=positive_int, default=8, metavar="N", help="attention heads (default: %(default)s)"
    )
    parser.add_argument(
        "--smooth", type=non_negative_float, default=0.0, metavar="CELLS",
        help="standard deviation of a blur of the random maps, cells: as in real maps, neighbours become similar and "
        "clusters larger (default: 0, no blur)",
    )  # fmt: skip
    add_report_arguments(parser)
