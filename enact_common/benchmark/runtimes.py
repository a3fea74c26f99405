"""Inference time of a detector on the CPU: in PyTorch, compiled, and exported to other runtimes."""

import argparse
import tempfile
from pathlib import Path

import torch

from enact_common.benchmark.detectors import (
    Measurement,
    add_common_flags,
    add_model_flags,
    build_detector,
    parse_flags,
    refuse_flags,
)
from enact_common.benchmark.isolated import DONE, run_isolated
from enact_common.benchmark.labels import MIB, attention_text
from enact_common.benchmark.measuring import spread, take_turns
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
)
from enact_common.cli.flags import with_flags
from enact_common.export.formats import FORMATS, load_exported, needed, quantize
from enact_common.export.graph import DetectorGraph, Interface, calibrated_lengths, fix_window_lengths, refuse_rival
from enact_common.models.layers import ENCODER_ATTENTIONS
from enact_common.utils.acceleration import prepare
from enact_common.variants import VARIANTS

# Runtimes: name to label in the table.
RUNTIMES = {
    "pytorch": "PyTorch",
    "compiled": "PyTorch, compiled",
    "torchscript": "TorchScript",
    "onnx": "ONNX Runtime",
    "onnx_fixed": "ONNX Runtime, fixed windows",
    "onnx_int8": "ONNX Runtime, int8",
}
# Runtimes that load a file: name to a key of `FORMATS`.
EXPORT_FORMATS = {"torchscript": "torchscript", "onnx": "onnx", "onnx_fixed": "onnx", "onnx_int8": "onnx"}
# Runtimes that only exist for ENACT, since plain models have no windows.
ENACT_RUNTIMES = ("onnx_fixed",)

REFUSED = {
    "--encoder_attention": "pass --attentions before --",
    "--batch_size": "pass --batch before --",
    "--compile": "choose with --runtimes",
    "--amp": "leave it out: exported files are float32",
    "--device": "leave it out: exported files run on the CPU",
    "--resume": "checkpoints are not loaded, leave it out",
}


def measure(measurement: Measurement) -> dict:
    """Time a batch from pixels to detections; run it in a new process.

    Returns `seconds` of each timed run, and `bytes` of the exported file, None without a file.
    """
    args = measurement.args
    samples, _ = measurement.batch()
    model, _, postprocess = build_detector(measurement.variant, args, samples, torch.device("cpu"))
    model.eval()
    if measurement.row == "onnx_fixed":
        fix_window_lengths(model, calibrated_lengths(model, samples.tensors.split(1)))
    graph = DetectorGraph(model, postprocess, Interface(args.batch_size, measurement.size)).eval()
    if measurement.row in EXPORT_FORMATS:
        export_format = FORMATS[EXPORT_FORMATS[measurement.row]]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"model{export_format.suffix}"
            export_format.write(graph, {"outputs": graph.interface.outputs}, path)
            if measurement.row == "onnx_int8":
                quantize(path, path)
            size, run = path.stat().st_size, load_exported(path)
    else:
        prepare(model, with_flags(args, compile=measurement.row == "compiled"), torch.device("cpu"))
        size, run = None, torch.inference_mode()(graph)
    seconds = take_turns({"run": lambda: run(samples.tensors)}, measurement.repeat, warmup=measurement.warmup)["run"]
    return {"seconds": seconds, "bytes": size}


def measure_row(measurement: Measurement) -> dict:
    """Measure one row and return its figures; print the progress to standard error."""
    outcome = run_isolated(measure, measurement, limit=True)
    values = outcome.value or {}
    row = {
        "variant": measurement.variant,
        "model": measurement.name,
        "attention": measurement.args.encoder_attention,
        "runtime": measurement.row,
        **outcome.fields(),
        "runs": values.get("seconds"),
        "seconds": values and spread(values["seconds"]),
        "bytes": values.get("bytes"),
    }
    name = f"{row['model']}, {row['attention']}, {RUNTIMES[measurement.row]}"
    outcome.log(name, lambda: f"{row['seconds']['median']:.3f} s")
    return row


def to_markdown(figures: dict) -> str:
    """Return the figures as a Markdown table."""
    columns = {"model": LEFT, "attention": LEFT, "runtime": LEFT, "ms": RIGHT, "over PyTorch": RIGHT, "file MiB": RIGHT}
    baselines = {
        (row["variant"], row["attention"]): row["seconds"]["median"]
        for row in figures["rows"]
        if row["runtime"] == "pytorch" and row["seconds"]
    }
    lines = []
    for row in figures["rows"]:
        baseline = baselines.get((row["variant"], row["attention"]))
        ratio = row["seconds"]["median"] / baseline if baseline and row["seconds"] else None
        time = figure_range(row["seconds"], ".0f", 1000) if row["status"] == DONE else row["status"]
        attention = attention_text(row["attention"])
        size = figure(row["bytes"] and row["bytes"] / MIB, ".0f")
        lines.append([row["model"], attention, RUNTIMES[row["runtime"]], time, figure(ratio, ".2f"), size])
    settings = figures["settings"]
    height, width = settings["size"]
    return (
        f"{heading(figures)}\n\n"
        f"{settings['batch']} x {height} x {width} pixels of noise, from pixels to detections; float32 except int8; "
        f"median of {settings['repeat']} runs (least to most).\n\n" + markdown_table(columns, lines)
    )


def to_csv(rows: list[dict]) -> list[dict]:
    """Return the figures as CSV rows; missing values are None."""
    names = ("model", "attention", "runtime", "status", "bytes")
    return [
        {name: row[name] for name in names}
        | {f"seconds_{part}": (row["seconds"] or {}).get(part) for part in ("median", "least", "most")}
        for row in rows
    ]


def plan(args: argparse.Namespace) -> list[Measurement]:
    """Return the rows that the command line selects."""
    refuse_flags(args.flags, REFUSED)
    if any(EXPORT_FORMATS.get(runtime) == "onnx" for runtime in args.runtimes):
        for module in ("onnx", "onnxscript", "onnxruntime"):
            needed(module, "--runtimes onnx")
    if any(runtime in EXPORT_FORMATS for runtime in args.runtimes):
        for attention in args.attentions:
            refuse_rival(attention, dynamic=False)
    overrides = ["--batch_size", str(args.batch), "--coco_path", "."]
    return [
        Measurement(
            variant,
            runtime,
            parse_flags(variant, "cpu", args.flags, [*overrides, "--encoder_attention", attention]),
            tuple(args.size),
            args.repeat,
            args.warmup,
        )
        for variant in args.variants
        for attention in args.attentions
        for runtime in args.runtimes
        if attention == "enact" or runtime not in ENACT_RUNTIMES
    ]


def run(args: argparse.Namespace) -> int:
    """Measure all rows, print the results and write the files; return 1 if one failed, unless for memory."""
    rows = plan(args)
    report = Report(args.output_dir, "runtimes")
    settings = {name: getattr(args, name) for name in ("size", "batch", "repeat", "flags")}
    versions = {
        name: needed(name, "--runtimes onnx").__version__
        for name in ("onnx", "onnxruntime")
        if any(EXPORT_FORMATS.get(runtime) == "onnx" for runtime in args.runtimes)
    }
    figures = {"benchmark": "runtimes", **environment(args.argv, torch.device("cpu")), "settings": settings}
    figures["versions"] |= versions
    return report.measure(figures, rows, measure_row, to_markdown, to_csv)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS),
        help="models to measure (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--attentions", nargs="+", choices=ENCODER_ATTENTIONS, default=["enact", "mhsa"],
        help="encoder attentions to measure (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--runtimes", nargs="+", choices=tuple(RUNTIMES), default=list(RUNTIMES),
        help="runtimes to measure (default: all)",
    )  # fmt: skip
    add_common_flags(parser, size=[800, 1333], batch=1, repeat=5, warmup=2)
    add_report_arguments(parser)
    add_model_flags(parser)
