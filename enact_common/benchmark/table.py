"""Cost of the published table's models on this machine: plain as in the original code, plain as in this project, and
with ENACT."""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from enact_common.attention.clustering import EQUAL
from enact_common.benchmark.detectors import (
    BATCH_SIZES,
    Measurement,
    add_common_flags,
    add_model_flags,
    build_detector,
    build_train_step,
    inspect_forward,
    parse_flags,
    refuse_flags,
)
from enact_common.benchmark.eager import eager_attention
from enact_common.benchmark.isolated import DONE, FAILED, Worker, is_out_of_memory, worker_for
from enact_common.benchmark.labels import GIB, ROWS, precision_text
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
from enact_common.cli.types import positive_int
from enact_common.data.annotations import find_split
from enact_common.models.graphed import graph_encoder
from enact_common.utils.acceleration import prepare
from enact_common.utils.device import autocast, default_device, find_device
from enact_common.utils.errors import UserError
from enact_common.variants import VARIANTS

PHASES = ("training", "inference")

REFUSED = {
    "--encoder_attention": "each row has its own; choose with --rows",
    "--amp": "pass it before --",
    "--compile": "pass it before --",
    "--coco_path": "pass it before --",
    "--resume": "checkpoints are not loaded, leave it out",
}


def measure(measurement: Measurement, phase: str) -> dict:
    """Measure time and memory of a model's training steps or of its inference.

    Returns `seconds` per batch of each timed run, and `memory` as read by `MemoryMeter`. For inference also
    `parameters` and, if memory suffices, the result of `inspect_forward`.
    """
    args = measurement.args
    device = find_device(args.device)
    with eager_attention(measurement.variant) if measurement.row == "eager" else contextlib.nullcontext():
        samples, targets = measurement.batch()
        model, criterion, postprocess = build_detector(measurement.variant, args, samples, device)
        if phase == "training":
            make_ready(model, measurement, device)
            if device.type == "cuda":
                # The data loader also returns pinned memory.
                samples = samples.pin_memory()
            step = build_train_step(model, criterion, args, device)
            figures = measure_step(lambda: step(samples, targets), measurement, device)
            step.check()
            return figures

        samples = samples.to(device)
        sizes = torch.stack([target["orig_size"] for target in targets])
        try:
            counts = inspect_forward(model, samples, args.amp)
        except Exception as error:
            # Counting uses unfused attention, which may need more memory than the measurement.
            if not is_out_of_memory(error):
                raise
            counts = {}
        make_ready(model, measurement, device)

        @torch.no_grad()
        def detect() -> None:
            with autocast(device, args.amp):
                outputs = model(samples)
            postprocess(outputs, sizes)

        figures = measure_step(detect, measurement, device)
    return {**figures, **counts, "parameters": sum(parameter.numel() for parameter in model.parameters())}


def make_ready(model: nn.Module, measurement: Measurement, device: torch.device) -> None:
    """Prepare a model as in a run, and for CUDA graphs."""
    prepare(model, measurement.args, device)
    if measurement.graphed:
        graph_encoder(model)


def measure_step(step: Callable[[], object], measurement: Measurement, device: torch.device) -> dict:
    """Return `seconds` of each timed run of a step, and `memory` over all runs."""
    meter = MemoryMeter(device)
    seconds = take_turns({"step": step}, measurement.repeat, synchronizer(device), measurement.warmup)["step"]
    return {"seconds": seconds, "memory": meter.read()}


def measure_row(measurement: Measurement, worker: Worker) -> dict:
    """Measure one row with a worker and return its figures; print the progress to standard error."""
    args = measurement.args
    row = {
        "variant": measurement.variant,
        "row": measurement.row,
        "model": measurement.name,
        "batch": args.batch_size,
    }
    counts = {}
    for phase in PHASES:
        start = time.perf_counter()
        outcome = worker.call(measure, measurement, phase)
        row[phase] = {"status": outcome.status, "message": outcome.message}
        if outcome.status == DONE:
            row["numerics"] = outcome.numerics
            figures = outcome.value
            counts = {name: value for name, value in figures.items() if name not in ("seconds", "memory")}
            per_image = spread([seconds / args.batch_size for seconds in figures["seconds"]])
            row[phase] |= {"seconds": figures["seconds"], "seconds_per_image": per_image, "memory": figures["memory"]}
        outcome.log(
            f"{row['model']}, {ROWS[measurement.row][0]}, {phase}",
            lambda phase=row[phase]: (
                f"{phase['seconds_per_image']['median']:.4f} s an image, peak {phase['memory']['peak'] / GIB:.2f} GiB"
            ),
            f"; took {time.perf_counter() - start:.0f} s",
        )
    clusters = counts.get("clusters")
    return {
        **row,
        "flops_per_image": counts.get("flops"),
        "parameters": counts.get("parameters"),
        "tokens": counts.get("tokens"),
        "clusters": clusters,
        "mean_clusters": statistics.mean(clusters) if clusters else None,
    }


def comparable(row: dict) -> dict[str, float | None]:
    """Return the figures of a row that enter the ratios; missing figures are None."""
    training, inference = (row[phase] for phase in PHASES)
    return {
        "training_memory": training.get("memory", {}).get("peak"),
        "training_memory_rise": training.get("memory", {}).get("rise"),
        "training_seconds": training.get("seconds_per_image", {}).get("median"),
        "inference_memory": inference.get("memory", {}).get("peak"),
        "inference_seconds": inference.get("seconds_per_image", {}).get("median"),
        "flops": row["flops_per_image"],
    }


def ratios_of(rows: list[dict]) -> list[dict]:
    """Return ENACT's figures relative to each plain row of the same variant; None if either is missing."""
    by_name = {(row["variant"], row["row"]): row for row in rows}
    ratios = []
    for (variant, name), row in by_name.items():
        ours = by_name.get((variant, "enact"))
        if name == "enact" or ours is None:
            continue
        plain = comparable(row)
        over = {figure: quotient(value, plain[figure]) for figure, value in comparable(ours).items()}
        ratios.append({"variant": variant, "model": ours["model"], "over": name, **over})
    return ratios


def to_markdown(figures: dict) -> str:
    """Return the figures and the ratios as two Markdown tables."""
    columns = {
        "model": LEFT, "attention": LEFT, "batch": RIGHT, "training peak GiB": RIGHT, "training s/image": RIGHT,
        "inference s/image": RIGHT, "inference peak GiB": RIGHT, "GFLOP/image": RIGHT, "parameters M": RIGHT,
        "tokens": RIGHT, "clusters": RIGHT,
    }  # fmt: skip
    lines = []
    for row in figures["rows"]:
        memory, times = {}, {}
        for phase in PHASES:
            part = row[phase]
            done = part["status"] == DONE
            memory[phase] = memory_text(part["memory"], figures["device"]) if done else part["status"]
            times[phase] = figure_range(part["seconds_per_image"], ".4f") if done else part["status"]
        flops, parameters = row["flops_per_image"], row["parameters"]
        lines.append(
            [
                row["model"], ROWS[row["row"]][0], str(row["batch"]), memory["training"], times["training"],
                times["inference"], memory["inference"], figure(flops and flops / 1e9, ".1f"),
                figure(parameters and parameters / 1e6, ".1f"), figure(row["tokens"], "d"),
                figure(row["mean_clusters"], ".0f"),
            ]
        )  # fmt: skip
    settings = figures["settings"]
    height, width = settings["size"]
    text = (
        f"{heading(figures)}\n\n"
        f"{height} x {width} pixels, images: {settings['images']}; precision: {settings['precision']}. Seconds: median "
        f"of {settings['repeat']} runs (least to most) of a batch, divided by its size. Peak memory: "
        f"{memory_note(figures['device'])}.\n\n" + markdown_table(columns, lines)
    )
    if figures["ratios"]:
        columns = {
            "ENACT over": LEFT, "training memory": RIGHT, "memory rise": RIGHT, "training time": RIGHT,
            "inference time": RIGHT, "inference memory": RIGHT, "GFLOP": RIGHT,
        }  # fmt: skip
        keys = (
            "training_memory", "training_memory_rise", "training_seconds", "inference_seconds", "inference_memory",
            "flops",
        )  # fmt: skip
        lines = [
            [f"{ratio['model']}, {ROWS[ratio['over']][0]}", *(figure(ratio[key], ".2f") for key in keys)]
            for ratio in figures["ratios"]
        ]
        text += "\n\n" + markdown_table(columns, lines)
    return text


def to_csv(rows: list[dict]) -> list[dict]:
    """Return the figures as CSV rows; missing values are None."""
    flat = []
    for row in rows:
        line = {name: row[name] for name in ("variant", "row", "model", "batch")}
        for phase in PHASES:
            part = row[phase]
            memory, per_image = part.get("memory", {}), part.get("seconds_per_image", {})
            line[f"{phase}_status"] = part["status"]
            line |= {f"{phase}_seconds_per_image_{name}": per_image.get(name) for name in ("median", "least", "most")}
            line |= {f"{phase}_{name}_bytes": memory.get(name) for name in ("peak", "rise", "reserved")}
        names = ("flops_per_image", "parameters", "tokens", "mean_clusters")
        flat.append(line | {name: row[name] for name in names})
    return flat


def plan(args: argparse.Namespace) -> list[Measurement]:
    """Return the rows that the command line selects, by variant."""
    refuse_flags(args.flags, REFUSED)
    if args.coco_path:
        find_split(args.coco_path, "val")
    overrides = ["--amp", args.amp]
    # Noise needs no data set, but the parsers of DETR and Conditional DETR require the flag.
    overrides += ["--coco_path", args.coco_path or "none"]
    overrides += ["--device", args.device] if args.device else []
    overrides += ["--batch_size", str(args.batch)] if args.batch else []
    overrides += ["--compile"] if args.compile else []
    measurements = [
        Measurement(
            variant,
            row,
            parse_flags(variant, default_device(), args.flags, [*overrides, "--encoder_attention", ROWS[row][1]]),
            tuple(args.size),
            args.repeat,
            args.warmup,
            args.coco_path is not None,
            args.graph_encoder,
        )
        for variant in VARIANTS
        if variant in args.variants
        for row in ROWS
        if row in args.rows
    ]
    if args.graph_encoder:
        refuse_graphs(measurements)
    return measurements


def refuse_graphs(measurements: list[Measurement]) -> None:
    """Raise UserError if a measured encoder cannot be captured in CUDA graphs."""
    for measurement in measurements:
        args = measurement.args
        if measurement.variant == "anchor":
            raise UserError("--graph_encoder: Anchor DETR's encoder is not captured; pass --variants detr conditional")
        if args.encoder_attention == "enact" and args.enact_clusters != EQUAL:
            raise UserError("--graph_encoder: the host reads the number of windows; pass -- --enact_clusters equal")
        if args.compile or args.checkpoint_activations:
            raise UserError("--graph_encoder: leave out --compile and --checkpoint_activations")
    if find_device(args.device).type != "cuda":
        raise UserError(f"--graph_encoder: CUDA graphs need a GPU, not {args.device}; leave it out")


def describe(args: argparse.Namespace, measurements: list[Measurement]) -> dict:
    """Return the `environment` and the `settings` of the measurements."""
    return {
        **environment(args.argv, find_device(measurements[0].args.device)),
        "settings": {
            "size": args.size,
            "images": f"validation images of {args.coco_path}, padded" if args.coco_path else "random noise",
            "precision": precision_text(args.amp)
            + (", compiled" if args.compile else "")
            + (", encoder as CUDA graphs" if args.graph_encoder else ""),
            "repeat": args.repeat,
            "warmup": args.warmup,
            "flags": args.flags,
        },
    }


def run(args: argparse.Namespace) -> int:
    """Measure all rows, print the results and write the files; return 1 if one failed, unless for memory."""
    measurements = plan(args)
    report = Report(args.output_dir, "table")
    figures = {**describe(args, measurements), "benchmark": "table", "rows": []}
    with worker_for(find_device(measurements[0].args.device)) as worker:
        for measurement in measurements:
            figures["rows"].append(measure_row(measurement, worker))
            figures["ratios"] = ratios_of(figures["rows"])
            report.save_figures(figures)
    report.save(figures, to_markdown(figures), to_csv(figures["rows"]))
    return int(any(row[phase]["status"] == FAILED for row in figures["rows"] for phase in PHASES))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS),
        help="detectors to measure (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS),
        help="rows of each detector: plain with attention stored, plain as in this project, ENACT (default: all)",
    )  # fmt: skip
    batches = ", ".join(f"{name} {batch}" for name, batch in BATCH_SIZES.items())
    parser.add_argument("--batch", type=positive_int, metavar="N", help=f"images per batch (default: {batches})")
    add_common_flags(parser, size=[800, 1333], amp="none", device=None, repeat=10, warmup=3)
    parser.add_argument("--compile", action="store_true", help="pass --compile to the models")
    parser.add_argument(
        "--graph_encoder", action="store_true",
        help="run the encoders of DETR and Conditional DETR as CUDA graphs; ENACT needs -- --enact_clusters equal",
    )  # fmt: skip
    parser.add_argument(
        "--coco_path", metavar="DIR", help="use the first validation images of this data set (default: noise)"
    )
    add_report_arguments(parser)
    add_model_flags(parser)
