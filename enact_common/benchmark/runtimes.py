"""How long a detector takes for an image in PyTorch, compiled, and exported to other runtimes, on the CPU."""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from enact_common.benchmark.detectors import (
    add_model_flags,
    build_detector,
    model_name,
    noise_batch,
    parse_flags,
    refuse_flags,
)
from enact_common.benchmark.isolated import DONE, FAILED, run_isolated
from enact_common.benchmark.labels import MIB
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
from enact_common.cli.types import natural_int, positive_int
from enact_common.export.formats import FORMATS, load_exported, needed, quantize
from enact_common.export.graph import DetectorGraph, Interface, calibrated_lengths, fix_window_lengths
from enact_common.models.layers import ENCODER_ATTENTIONS
from enact_common.utils.acceleration import prepare
from enact_common.variants import VARIANTS

# What runs the model, in words.
RUNTIMES = {
    "pytorch": "PyTorch",
    "compiled": "PyTorch, compiled",
    "torchscript": "TorchScript",
    "onnx": "ONNX Runtime",
    "onnx_fixed": "ONNX Runtime, fixed windows",
    "onnx_int8": "ONNX Runtime, int8",
}
# By the runtimes' names, what the others are written as.
WRITTEN = {"torchscript": "torchscript", "onnx": "onnx", "onnx_fixed": "onnx", "onnx_int8": "onnx"}
# The plain models have no windows.
OF_ENACT = ("onnx_fixed",)

REFUSED = {
    "--encoder_attention": "pass --attentions before --",
    "--batch_size": "pass --batch before --",
    "--compile": "choose with --runtimes",
    "--amp": "leave it out: exported files are float32",
    "--device": "leave it out: exported files are run on the CPU",
    "--resume": "checkpoints are not loaded, leave it out",
}


@dataclass(frozen=True)
class Measurement:
    """What one process measures.

    Attributes:
        variant: a key of `VARIANTS`.
        runtime: a key of `RUNTIMES`.
        args: the variant's parsed arguments.
        size: (height, width) of the images, pixels.
        repeat, warmup: timed runs, and runs before them.
    """

    variant: str
    runtime: str
    args: argparse.Namespace
    size: tuple[int, int]
    repeat: int
    warmup: int


def measure(what: Measurement) -> dict:
    """Time of a batch from pixels to detections; for a process of its own.

    Returns:
        `seconds` of each timed run, and `bytes` of the exported file; None where there is none.
    """
    args = what.args
    samples, _ = noise_batch(args, what.size)
    model, _, postprocess = build_detector(what.variant, args, samples, torch.device("cpu"))
    model.eval()
    if what.runtime == "onnx_fixed":
        fix_window_lengths(model, calibrated_lengths(model, samples.tensors.split(1)))
    graph = DetectorGraph(model, postprocess, Interface(args.batch_size, what.size)).eval()
    if what.runtime in WRITTEN:
        form = FORMATS[WRITTEN[what.runtime]]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"model{form.suffix}"
            form.write(graph, {"outputs": graph.interface.outputs}, path)
            if what.runtime == "onnx_int8":
                quantize(path, path)
            size, run = path.stat().st_size, load_exported(path)
    else:
        prepare(model, with_flags(args, compile=what.runtime == "compiled"), torch.device("cpu"))
        size, run = None, torch.inference_mode()(graph)
    seconds = take_turns({"run": lambda: run(samples.tensors)}, what.repeat, warmup=what.warmup)["run"]
    return {"seconds": seconds, "bytes": size}


def measure_row(what: Measurement) -> dict:
    """The figures of one row; says on standard error how it goes."""
    outcome = run_isolated(measure, what, limit=True)
    measured = outcome.value or {}
    row = {
        "variant": what.variant,
        "model": model_name(what.variant, what.args),
        "attention": what.args.encoder_attention,
        "runtime": what.runtime,
        "status": outcome.status,
        "message": outcome.message,
        "numerics": outcome.numerics,
        "runs": measured.get("seconds"),
        "seconds": measured and spread(measured["seconds"]),
        "bytes": measured.get("bytes"),
    }
    said = f"{row['seconds']['median']:.3f} s" if measured else f"{outcome.status} ({outcome.message})"
    print(f"{row['model']}, {row['attention']}, {RUNTIMES[what.runtime]}: {said}", file=sys.stderr)
    print(outcome.details, end="", file=sys.stderr, flush=True)
    return row


def to_markdown(figures: dict) -> str:
    """The figures as a table in Markdown."""
    columns = {"model": LEFT, "attention": LEFT, "runtime": LEFT, "ms": RIGHT, "over PyTorch": RIGHT, "file MiB": RIGHT}
    base = {
        (row["variant"], row["attention"]): row["seconds"]["median"]
        for row in figures["rows"]
        if row["runtime"] == "pytorch" and row["seconds"]
    }
    lines = []
    for row in figures["rows"]:
        own = base.get((row["variant"], row["attention"]))
        ratio = row["seconds"]["median"] / own if own and row["seconds"] else None
        time = figure_range(row["seconds"], ".0f", 1000) if row["status"] == DONE else row["status"]
        attention = "ENACT" if row["attention"] == "enact" else "plain"
        size = figure(row["bytes"] and row["bytes"] / MIB, ".0f")
        lines.append([row["model"], attention, RUNTIMES[row["runtime"]], time, figure(ratio, ".2f"), size])
    settings = figures["settings"]
    height, width = settings["size"]
    return (
        f"{heading(figures)}\n\n"
        f"{settings['batch']} x {height} x {width} pixels of noise, from pixels to detections; float32 but for int8; "
        f"median of {settings['repeat']} runs (least to most).\n\n" + markdown_table(columns, lines)
    )


def to_csv(rows: list[dict]) -> list[dict]:
    """The figures as rows of numbers; None where there is none."""
    names = ("model", "attention", "runtime", "status", "bytes")
    return [
        {name: row[name] for name in names}
        | {f"seconds_{part}": (row["seconds"] or {}).get(part) for part in ("median", "least", "most")}
        for row in rows
    ]


def plan(args: argparse.Namespace) -> list[Measurement]:
    """The rows that the command line asks for.

    Raises:
        UserError: model flags do not work together, or are the benchmark's own, or a package is missing.
    """
    refuse_flags(args.flags, REFUSED)
    if any(WRITTEN.get(runtime) == "onnx" for runtime in args.runtimes):
        for module in ("onnx", "onnxscript", "onnxruntime"):
            needed(module, "--runtimes onnx")
    own = ["--batch_size", str(args.batch), "--coco_path", "."]
    return [
        Measurement(
            variant,
            runtime,
            parse_flags(variant, "cpu", args.flags, [*own, "--encoder_attention", attention]),
            tuple(args.size),
            args.repeat,
            args.warmup,
        )
        for variant in args.variants
        for attention in args.attentions
        for runtime in args.runtimes
        if attention == "enact" or runtime not in OF_ENACT
    ]


def run(args: argparse.Namespace) -> int:
    """Measure, print and write the files.

    Returns:
        the exit status: 1 where a row failed for another reason than memory, else 0.
    """
    rows = plan(args)
    report = Report(args.output_dir, "runtimes")
    settings = {name: getattr(args, name) for name in ("size", "batch", "repeat", "flags")}
    versions = {
        name: needed(name, "--runtimes onnx").__version__
        for name in ("onnx", "onnxruntime")
        if any(WRITTEN.get(runtime) == "onnx" for runtime in args.runtimes)
    }
    figures = {"benchmark": "runtimes", **environment(args.argv, torch.device("cpu")), "settings": settings, "rows": []}
    figures["versions"] |= versions
    for what in rows:
        figures["rows"].append(measure_row(what))
        report.save_figures(figures)
    report.save(figures, to_markdown(figures), to_csv(figures["rows"]))
    return int(any(row["status"] == FAILED for row in figures["rows"]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), help="models (default: all)"
    )
    parser.add_argument(
        "--attentions", nargs="+", choices=ENCODER_ATTENTIONS, default=list(ENCODER_ATTENTIONS),
        help="of the encoder (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--runtimes", nargs="+", choices=tuple(RUNTIMES), default=list(RUNTIMES), help="what runs them (default: all)"
    )
    parser.add_argument(
        "--size", type=positive_int, nargs=2, default=[800, 1333], metavar=("H", "W"),
        help="of the images, pixels (default: 800 1333)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=positive_int, default=1, metavar="N", help="images at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat", type=positive_int, default=5, metavar="N", help="timed runs of each (default: %(default)s)"
    )
    parser.add_argument(
        "--warmup", type=natural_int, default=2, metavar="N", help="runs before them (default: %(default)s)"
    )
    add_report_arguments(parser)
    add_model_flags(parser)
