"""Cost of masks in training: DETR without masks, with this project's mask head, and with a straightforward one."""

import argparse
import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from enact_common.benchmark.detectors import (
    OBJECTS,
    Batch,
    Measurement,
    add_common_flags,
    add_model_flags,
    build_detector,
    build_train_step,
    noise_batch,
    parse_flags,
    refuse_flags,
)
from enact_common.benchmark.eager import replaced
from enact_common.benchmark.isolated import DONE, run_isolated
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
    memory_note,
    memory_text,
    quotient,
)
from enact_common.boxes import box_cxcywh_to_xyxy
from enact_common.cli.types import positive_int
from enact_common.models import mask_head, mask_losses, segmentation
from enact_common.models.mask_head import DETRsegm
from enact_common.nested_tensor import NestedTensor
from enact_common.utils.acceleration import prepare
from enact_common.utils.device import default_device, find_device
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


class AllMasks(nn.Module):
    """DETR with a mask head that computes the masks of all queries in training too, as the original does."""

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
    """Return a batch of noise images (height, width) with random objects, whose masks are their filled boxes."""
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
    """Return `seconds` per batch of each timed training step, and `memory` as read by `MemoryMeter`.

    Run it in a new process.
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
        **outcome.fields(),
        "runs": values.get("seconds"),
        "seconds": values and spread(values["seconds"]),
        "memory": values.get("memory"),
    }
    outcome.log(
        ROWS[measurement.row],
        lambda: f"{row['seconds']['median']:.2f} s a step, peak {row['memory']['peak'] / GIB:.2f} GiB",
    )
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
    return (
        f"{heading(figures)}\n\n"
        f"{settings['model']}, {settings['attention']}, {settings['queries']} queries; {settings['batch']} x {height} "
        f"x {width} pixels of noise with {settings['objects']} objects; precision: {settings['precision']}. Whole "
        f"training steps: median of {settings['repeat']} runs (least to most). Peak memory: "
        f"{memory_note(figures['device'])}.\n\n" + markdown_table(columns, lines)
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
    """Return the rows that the command line selects."""
    refuse_flags(args.flags, REFUSED)
    overrides = ["--amp", args.amp, "--batch_size", str(args.batch), "--coco_path", "."]
    overrides += ["--device", args.device] if args.device else []
    rows = []
    for row in args.rows:
        masks = [] if row == "boxes" else ["--masks"]
        parsed = parse_flags("detr", default_device(), args.flags, [*overrides, *masks])
        rows.append(Measurement("detr", row, parsed, tuple(args.size), args.repeat, args.warmup, objects=args.objects))
    if args.objects > parsed.num_queries:
        raise UserError(
            f"--objects {args.objects}: more than the model's {parsed.num_queries} queries; pass fewer, or more "
            "queries (-- --num_queries N)"
        )
    return rows


def run(args: argparse.Namespace) -> int:
    """Measure all rows, print the results and write the files; return 1 if one failed, unless for memory."""
    rows = plan(args)
    model = rows[0].args
    report = Report(args.output_dir, "masks")
    settings = {name: getattr(args, name) for name in ("size", "batch", "objects", "repeat", "warmup", "flags")}
    settings |= {
        "model": rows[0].name,
        "attention": attention_text(model.encoder_attention),
        "queries": model.num_queries,
        "precision": precision_text(args.amp),
    }
    figures = {"benchmark": "masks", **environment(args.argv, find_device(model.device)), "settings": settings}
    return report.measure(figures, rows, measure_row, to_markdown, to_csv)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS),
        help="rows to train: boxes only, masks as in this project, masks of all queries with every intermediate kept "
        "for the backward pass (default: all)",
    )  # fmt: skip
    add_common_flags(parser, size=[800, 1333], batch=1, amp="none", device=None, repeat=3, warmup=1)
    parser.add_argument(
        "--objects", type=positive_int, default=OBJECTS, metavar="N", help="objects per image (default: %(default)s)"
    )
    add_report_arguments(parser)
    add_model_flags(parser)
