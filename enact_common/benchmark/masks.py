"""What masks cost in training: DETR without them, with this project's mask head, and with the head written in the
straightforward way."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enact_common.benchmark.detectors import (
    OBJECTS,
    Batch,
    add_model_flags,
    build_detector,
    build_train_step,
    model_name,
    noise_batch,
    parse_flags,
    refuse_flags,
)
from enact_common.benchmark.eager import replaced
from enact_common.benchmark.isolated import DONE, FAILED, run_isolated
from enact_common.benchmark.labels import GIB, precision_text
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
from enact_common.benchmark.table import memory_text
from enact_common.boxes import box_cxcywh_to_xyxy
from enact_common.cli.types import natural_int, positive_int
from enact_common.models import mask_head, mask_losses, segmentation
from enact_common.models.mask_head import DETRsegm
from enact_common.nested_tensor import NestedTensor
from enact_common.utils.acceleration import prepare
from enact_common.utils.device import AMP_DTYPE, default_device, find_device
from enact_common.utils.errors import UserError

# What is trained, in words.
ROWS = {
    "boxes": "boxes alone",
    "masks": "masks of matched queries, in parts",
    "straightforward": "masks of all queries at once",
}

REFUSED = {
    "--masks": "choose with --rows",
    "--amp": "pass it before --",
    "--resume": "checkpoints are not loaded, leave it out",
}

# More than there can be of anything.
ALL_AT_ONCE = 2**31 - 1


@dataclass(frozen=True)
class Measurement:
    """What one process measures.

    Attributes:
        row: a key of `ROWS`.
        args: DETR's parsed arguments.
        size: (height, width) of the images, pixels.
        objects: of an image.
        repeat, warmup: timed runs, and runs before them.
    """

    row: str
    args: argparse.Namespace
    size: tuple[int, int]
    objects: int
    repeat: int
    warmup: int


class AllMasks(nn.Module):
    """A DETR with a mask head that computes the masks of all queries in training, too, as the original does.

    Args:
        model: what it is made of.
    """

    def __init__(self, model: DETRsegm):
        super().__init__()
        self.model = model

    def forward(self, samples: NestedTensor) -> dict:
        """As `DETRsegm` in evaluation mode, with `pred_masks`."""
        outputs = self.model(samples)
        return outputs | {"pred_masks": outputs.pop("query_masks").all()}


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Within it, masks and their losses are computed in one piece, and nothing of them anew in the backward pass."""
    kept = {"recompute_in_backward": lambda function: function}
    with (
        replaced(mask_head, {"HEAD_CHUNK": ALL_AT_ONCE} | kept),
        replaced(mask_losses, {"FULL_SIZE_CHUNK": ALL_AT_ONCE} | kept),
        replaced(segmentation, {"FULL_SIZE_CHUNK": ALL_AT_ONCE}),
    ):
        yield


def masks_batch(args: argparse.Namespace, size: tuple[int, int], objects: int) -> Batch:
    """Images of noise with objects at random, whose masks are their boxes.

    Args:
        args: parsed arguments.
        size: (height, width), pixels.
        objects: of each image.
    """
    samples, targets = noise_batch(args, size, objects)
    for target in targets:
        target["masks"] = filled_boxes(target["boxes"], size)
    return samples, targets


def filled_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks bool (n, height, width) of boxes (n, 4), cxcywh in [0, 1]."""
    left, top, right, bottom = box_cxcywh_to_xyxy(boxes)[:, :, None, None].unbind(dim=1)  # (n, 1, 1) each
    rows, columns = ((torch.arange(side) + 0.5) / side for side in size)
    rows = rows[:, None]
    return (left <= columns) & (columns < right) & (top <= rows) & (rows < bottom)


def measure(what: Measurement) -> dict:
    """Time and memory of training steps; for a process of its own.

    Returns:
        `seconds` of each timed run, of a whole batch, and `memory` as `MemoryMeter` reads it.
    """
    args = what.args
    device = find_device(args.device)
    samples, targets = masks_batch(args, what.size, what.objects)
    model, criterion, _ = build_detector("detr", args, samples, device)
    prepare(model, args, device)
    with at_once() if what.row == "straightforward" else contextlib.nullcontext():
        step = build_train_step(AllMasks(model) if what.row == "straightforward" else model, criterion, args, device)
        meter = MemoryMeter(device)
        seconds = take_turns({"step": lambda: step(samples, targets)}, what.repeat, synchronizer(device), what.warmup)[
            "step"
        ]
        memory = meter.read()
    step.check()
    return {"seconds": seconds, "memory": memory}


def measure_row(what: Measurement) -> dict:
    """The figures of one row; says on standard error how it goes."""
    outcome = run_isolated(measure, what, limit=find_device(what.args.device).type == "cpu")
    measured = outcome.value or {}
    row = {
        "row": what.row,
        "status": outcome.status,
        "message": outcome.message,
        "numerics": outcome.numerics,
        "runs": measured.get("seconds"),
        "seconds": measured and spread(measured["seconds"]),
        "memory": measured.get("memory"),
    }
    said = f"{outcome.status} ({outcome.message})"
    if outcome.status == DONE:
        said = f"{row['seconds']['median']:.2f} s a step, peak {row['memory']['peak'] / GIB:.2f} GiB"
    print(f"{ROWS[what.row]}: {said}", file=sys.stderr)
    print(outcome.details, end="", file=sys.stderr, flush=True)
    return row


def over_boxes(row: dict, rows: list[dict]) -> dict[str, float | None]:
    """`memory` and `seconds` of a row over those without masks; None where one of the two is missing."""
    base = next((other for other in rows if other["row"] == "boxes" and other["status"] == DONE), None)
    if base is None or row["status"] != DONE:
        return {"memory": None, "seconds": None}
    return {
        "memory": quotient(row["memory"]["peak"], base["memory"]["peak"]),
        "seconds": quotient(row["seconds"]["median"], base["seconds"]["median"]),
    }


def to_markdown(figures: dict) -> str:
    """The figures as a table in Markdown."""
    columns = {
        "trained": LEFT, "peak GiB": RIGHT, "s/step": RIGHT, "memory over boxes": RIGHT, "time over boxes": RIGHT,
    }  # fmt: skip
    lines = []
    for row in figures["rows"]:
        over = over_boxes(row, figures["rows"])
        memory, time = row["status"], row["status"]
        if row["status"] == DONE:
            memory = memory_text(row["memory"], figures["device"])
            time = figure_range(row["seconds"], ".2f")
        ratios = (figure(over[name], ".2f") for name in ("memory", "seconds"))
        lines.append([ROWS[row["row"]], memory, time, *ratios])
    settings = figures["settings"]
    height, width = settings["size"]
    memory = (
        "allocated (reserved)" if figures["device"].startswith("cuda") else "resident in the process (rise in the runs)"
    )
    return (
        f"{heading(figures)}\n\n"
        f"{settings['model']}, {settings['attention']}, {settings['queries']} queries; {settings['batch']} x {height} "
        f"x {width} pixels of noise with {settings['objects']} objects; precision: {settings['precision']}. Whole "
        f"training steps: median of {settings['repeat']} runs (least to most). Peak memory: {memory}.\n\n"
        + markdown_table(columns, lines)
    )


def to_csv(rows: list[dict]) -> list[dict]:
    """The figures as rows of numbers; None where there is none."""
    return [
        {"row": row["row"], "status": row["status"]}
        | {f"seconds_{part}": (row["seconds"] or {}).get(part) for part in ("median", "least", "most")}
        | {f"{part}_bytes": (row["memory"] or {}).get(part) for part in ("peak", "rise", "reserved")}
        | {f"{name}_over_boxes": value for name, value in over_boxes(row, rows).items()}
        for row in rows
    ]


def plan(args: argparse.Namespace) -> list[Measurement]:
    """The rows that the command line asks for.

    Raises:
        UserError: model flags do not work together, or are the benchmark's own; or there are more objects than queries.
    """
    refuse_flags(args.flags, REFUSED)
    own = ["--amp", args.amp, "--batch_size", str(args.batch), "--coco_path", "."]
    own += ["--device", args.device] if args.device else []
    rows = []
    for row in args.rows:
        masks = [] if row == "boxes" else ["--masks"]
        parsed = parse_flags("detr", default_device(), args.flags, [*own, *masks])
        rows.append(Measurement(row, parsed, tuple(args.size), args.objects, args.repeat, args.warmup))
    if args.objects > parsed.num_queries:
        raise UserError(
            f"--objects {args.objects}: more than the model's {parsed.num_queries} queries; pass fewer, or more "
            "queries (-- --num_queries N)"
        )
    return rows


def run(args: argparse.Namespace) -> int:
    """Measure, print and write the files.

    Returns:
        the exit status: 1 where a row failed for another reason than memory, else 0.
    """
    rows = plan(args)
    model = rows[0].args
    report = Report(args.output_dir, "masks")
    settings = {name: getattr(args, name) for name in ("size", "batch", "objects", "repeat", "warmup", "flags")}
    settings |= {
        "model": model_name("detr", model),
        "attention": "ENACT" if model.encoder_attention == "enact" else "plain",
        "queries": model.num_queries,
        "precision": precision_text(args.amp),
    }
    figures = {
        "benchmark": "masks",
        **environment(args.argv, find_device(model.device)),
        "settings": settings,
        "rows": [],
    }
    for what in rows:
        figures["rows"].append(measure_row(what))
        report.save_figures(figures)
    report.save(figures, to_markdown(figures), to_csv(figures["rows"]))
    return int(any(row["status"] == FAILED for row in figures["rows"]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS),
        help="what is trained: boxes alone, masks as this project computes them, masks of all queries with all that is "
        "computed kept for the backward pass (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=positive_int, nargs=2, default=[800, 1333], metavar=("H", "W"),
        help="of the images, pixels (default: 800 1333)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=positive_int, default=1, metavar="N", help="images a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--objects", type=positive_int, default=OBJECTS, metavar="N", help="of each image (default: %(default)s)"
    )
    parser.add_argument(
        "--amp", choices=tuple(AMP_DTYPE), default="none", help="mixed precision (default: %(default)s)"
    )
    parser.add_argument("--device", help="where to compute: cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--repeat", type=positive_int, default=3, metavar="N", help="timed runs of each (default: %(default)s)"
    )
    parser.add_argument(
        "--warmup", type=natural_int, default=1, metavar="N", help="runs before them (default: %(default)s)"
    )
    add_report_arguments(parser)
    add_model_flags(parser)
