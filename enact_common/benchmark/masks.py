"""Cost of masks in training: DETR without masks, with this project's mask head, and with a straightforward one."""

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
from enact_common.benchmark.labels import GIB, attention_text, precision_text
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

# Rows: name to label in the table.
ROWS = {
    "boxes": "boxes only",
    "masks": "masks of matched queries, in parts",
    "straightforward": "masks of all queries at once",
}

REFUSED = {
    "--masks": "choose with --rows",
    "--amp": "pass it before --",
    "--resume": "checkpoints are not loaded, leave it out",
}

# A chunk size larger than any input, so that everything is one chunk.
ALL_AT_ONCE = 2**31 - 1


@dataclass(frozen=True)
class Measurement:
    """The settings of one measured row.

    Attributes:
        row: a key of `ROWS`.
        args: DETR's parsed arguments.
        size: (height, width) of the images, pixels.
        objects: number of objects in each image.
        repeat, warmup: numbers of timed runs, and of untimed runs before them.
    """

    row: str
    args: argparse.Namespace
    size: tuple[int, int]
    objects: int
    repeat: int
    warmup: int


class AllMasks(nn.Module):
    """DETR that computes the masks of all queries in training too, as the original does.

    Args:
        model: the DETR with a mask head to wrap.
    """

    def __init__(self, model: DETRsegm):
        super().__init__()
        self.model = model

    def forward(self, samples: NestedTensor) -> dict:
        """Return the outputs of `DETRsegm` with `pred_masks`, as in evaluation mode."""
        outputs = self.model(samples)
        return outputs | {"pred_masks": outputs.pop("query_masks").all()}


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Context in which masks and their losses are computed in one chunk, without recomputation in the backward pass."""
    no_recompute = {"recompute_in_backward": lambda function: function}
    with (
        replaced(mask_head, {"HEAD_CHUNK": ALL_AT_ONCE} | no_recompute),
        replaced(mask_losses, {"FULL_SIZE_CHUNK": ALL_AT_ONCE} | no_recompute),
        replaced(segmentation, {"FULL_SIZE_CHUNK": ALL_AT_ONCE}),
    ):
        yield


def masks_batch(args: argparse.Namespace, size: tuple[int, int], objects: int) -> Batch:
    """Return a batch of noise images with random objects, whose masks are their filled boxes.

    Args:
        args: parsed arguments.
        size: (height, width), pixels.
        objects: number of objects in each image.
    """
    samples, targets = noise_batch(args, size, objects)
    for target in targets:
        target["masks"] = filled_boxes(target["boxes"], size)
    return samples, targets


def filled_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return bool masks (n, height, width) that fill boxes (n, 4), cxcywh in [0, 1]."""
    left, top, right, bottom = box_cxcywh_to_xyxy(boxes)[:, :, None, None].unbind(dim=1)  # (n, 1, 1) each
    rows, columns = ((torch.arange(side) + 0.5) / side for side in size)
    rows = rows[:, None]
    return (left <= columns) & (columns < right) & (top <= rows) & (rows < bottom)


def measure(measurement: Measurement) -> dict:
    """Measure time and memory of training steps; run it in a new process.

    Returns:
        `seconds` per batch of each timed run, and `memory` as read by `MemoryMeter`.
    """
    args = measurement.args
    device = find_device(args.device)
    samples, targets = masks_batch(args, measurement.size, measurement.objects)
    model, criterion, _ = build_detector("detr", args, samples, device)
    prepare(model, args, device)
    with at_once() if measurement.row == "straightforward" else contextlib.nullcontext():
        step = build_train_step(
            AllMasks(model) if measurement.row == "straightforward" else model, criterion, args, device
        )
        meter = MemoryMeter(device)
        seconds = take_turns(
            {"step": lambda: step(samples, targets)}, measurement.repeat, synchronizer(device), measurement.warmup
        )["step"]
        memory = meter.read()
    step.check()
    return {"seconds": seconds, "memory": memory}


def measure_row(measurement: Measurement) -> dict:
    """Measure one row and return its figures; print the progress to standard error."""
    outcome = run_isolated(measure, measurement, limit=find_device(measurement.args.device).type == "cpu")
    values = outcome.value or {}
    row = {
        "row": measurement.row,
        "status": outcome.status,
        "message": outcome.message,
        "numerics": outcome.numerics,
        "runs": values.get("seconds"),
        "seconds": values and spread(values["seconds"]),
        "memory": values.get("memory"),
    }
    summary = f"{outcome.status} ({outcome.message})"
    if outcome.status == DONE:
        summary = f"{row['seconds']['median']:.2f} s a step, peak {row['memory']['peak'] / GIB:.2f} GiB"
    print(f"{ROWS[measurement.row]}: {summary}", file=sys.stderr)
    print(outcome.details, end="", file=sys.stderr, flush=True)
    return row


def over_boxes(row: dict, rows: list[dict]) -> dict[str, float | None]:
    """Return a row's `memory` and `seconds` relative to the row without masks; None if either is missing."""
    base = next((other for other in rows if other["row"] == "boxes" and other["status"] == DONE), None)
    if base is None or row["status"] != DONE:
        return {"memory": None, "seconds": None}
    return {
        "memory": quotient(row["memory"]["peak"], base["memory"]["peak"]),
        "seconds": quotient(row["seconds"]["median"], base["seconds"]["median"]),
    }


def to_markdown(figures: dict) -> str:
    """Return the figures as a Markdown table."""
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
    """Return the figures as CSV rows; missing values are None."""
    return [
        {"row": row["row"], "status": row["status"]}
        | {f"seconds_{part}": (row["seconds"] or {}).get(part) for part in ("median", "least", "most")}
        | {f"{part}_bytes": (row["memory"] or {}).get(part) for part in ("peak", "rise", "reserved")}
        | {f"{name}_over_boxes": value for name, value in over_boxes(row, rows).items()}
        for row in rows
    ]


def plan(args: argparse.Namespace) -> list[Measurement]:
    """Return the rows that the command line selects.

    Raises:
        UserError: model flags conflict with each other or with the benchmark's flags, or --objects is larger than the
            number of queries.
    """
    refuse_flags(args.flags, REFUSED)
    overrides = ["--amp", args.amp, "--batch_size", str(args.batch), "--coco_path", "."]
    overrides += ["--device", args.device] if args.device else []
    rows = []
    for row in args.rows:
        masks = [] if row == "boxes" else ["--masks"]
        parsed = parse_flags("detr", default_device(), args.flags, [*overrides, *masks])
        rows.append(Measurement(row, parsed, tuple(args.size), args.objects, args.repeat, args.warmup))
    if args.objects > parsed.num_queries:
        raise UserError(
            f"--objects {args.objects}: more than the model's {parsed.num_queries} queries; pass fewer, or more "
            "queries (-- --num_queries N)"
        )
    return rows


def run(args: argparse.Namespace) -> int:
    """Measure all rows, print the table and write the files.

    Returns:
        the exit status: 1 if a row failed for a reason other than memory, else 0.
    """
    rows = plan(args)
    model = rows[0].args
    report = Report(args.output_dir, "masks")
    settings = {name: getattr(args, name) for name in ("size", "batch", "objects", "repeat", "warmup", "flags")}
    settings |= {
        "model": model_name("detr", model),
        "attention": attention_text(model.encoder_attention),
        "queries": model.num_queries,
        "precision": precision_text(args.amp),
    }
    figures = {
        "benchmark": "masks",
        **environment(args.argv, find_device(model.device)),
        "settings": settings,
        "rows": [],
    }
    for measurement in rows:
        figures["rows"].append(measure_row(measurement))
        report.save_figures(figures)
    report.save(figures, to_markdown(figures), to_csv(figures["rows"]))
    return int(any(row["status"] == FAILED for row in figures["rows"]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS),
        help="rows to train: boxes only, masks as in this project, masks of all queries with every intermediate kept "
        "for the backward pass (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=positive_int, nargs=2, default=[800, 1333], metavar=("H", "W"),
        help="image size, pixels (default: 800 1333)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=positive_int, default=1, metavar="N", help="images per batch (default: %(default)s)"
    )
    parser.add_argument(
        "--objects", type=positive_int, default=OBJECTS, metavar="N", help="objects per image (default: %(default)s)"
    )
    parser.add_argument(
        "--amp", choices=tuple(AMP_DTYPE), default="none", help="mixed precision (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--repeat", type=positive_int, default=3, metavar="N", help="timed runs of each row (default: %(default)s)"
    )
    parser.add_argument(
        "--warmup",
        type=natural_int,
        default=1,
        metavar="N",
        help="untimed runs before the timed ones (default: %(default)s)",
    )
    add_report_arguments(parser)
    add_model_flags(parser)
