"""The models of the published table, on one machine: each plain, as the original code and as this project's runs it,
and with ENACT."""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from enact_common.benchmark.detectors import (
    BATCH_SIZES,
    add_model_flags,
    build_detector,
    build_train_step,
    coco_batch,
    inspect_forward,
    model_name,
    noise_batch,
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
    quotient,
)
from enact_common.cli.types import natural_int, positive_int
from enact_common.data.annotations import find_split
from enact_common.utils.acceleration import prepare
from enact_common.utils.device import AMP_DTYPE, autocast, default_device, find_device
from enact_common.variants import VARIANTS

PHASES = ("training", "inference")

REFUSED = {
    "--encoder_attention": "each row has its own; choose with --rows",
    "--amp": "pass it before --",
    "--compile": "pass it before --",
    "--coco_path": "pass it before --",
    "--resume": "checkpoints are not loaded, leave it out",
}


@dataclass
class Measurement:
    """What one process measures.

    Attributes:
        variant: a key of `VARIANTS`.
        row: a key of `ROWS`.
        args: the variant's parsed arguments.
        size: (height, width) of the images, pixels.
        real: take images of `args.coco_path` rather than noise.
        repeat, warmup: timed runs, and runs before them.
    """

    variant: str
    row: str
    args: argparse.Namespace
    size: tuple[int, int]
    real: bool
    repeat: int
    warmup: int


def measure(what: Measurement, phase: str) -> dict:
    """Time and memory of a model's training steps or of its inference.

    Returns:
        `seconds` of each timed run, of a whole batch; `memory` as `MemoryMeter` reads it. Of inference also
        `parameters`, and what `inspect_forward` counts, where memory suffices for that.
    """
    args = what.args
    device = find_device(args.device)
    with eager_attention(what.variant) if what.row == "eager" else contextlib.nullcontext():
        samples, targets = coco_batch(args, what.size) if what.real else noise_batch(args, what.size)
        model, criterion, postprocess = build_detector(what.variant, args, samples, device)
        if phase == "training":
            prepare(model, args, device)
            if device.type == "cuda":
                # As a loader leaves it.
                samples = samples.pin_memory()
            step = build_train_step(model, criterion, args, device)
            figures = measure_step(lambda: step(samples, targets), what, device)
            step.check()
            return figures

        samples = samples.to(device)
        sizes = torch.stack([target["orig_size"] for target in targets])
        try:
            counted = inspect_forward(model, samples, args.amp)
        except Exception as error:
            # Unfused, attention may need more than what is measured.
            if not is_out_of_memory(error):
                raise
            counted = {}
        prepare(model, args, device)

        @torch.no_grad()
        def detect() -> None:
            with autocast(device, args.amp):
                outputs = model(samples)
            postprocess(outputs, sizes)

        figures = measure_step(detect, what, device)
    return {**figures, **counted, "parameters": sum(parameter.numel() for parameter in model.parameters())}


def measure_step(step: Callable[[], object], what: Measurement, device: torch.device) -> dict:
    """`seconds` of each timed run of a step, and the `memory` of all of them."""
    meter = MemoryMeter(device)
    seconds = take_turns({"step": step}, what.repeat, synchronizer(device), what.warmup)["step"]
    return {"seconds": seconds, "memory": meter.read()}


def measure_row(what: Measurement, worker: Worker) -> dict:
    """All figures of one row, measured by a worker; says on standard error how it goes."""
    args = what.args
    row = {
        "variant": what.variant,
        "row": what.row,
        "model": model_name(what.variant, args),
        "batch": args.batch_size,
    }
    counted = {}
    for phase in PHASES:
        begin = time.perf_counter()
        outcome = worker.call(measure, what, phase)
        row[phase] = {"status": outcome.status, "message": outcome.message}
        said = f"{outcome.status} ({outcome.message})"
        if outcome.status == DONE:
            row["numerics"] = outcome.numerics
            figures = outcome.value
            counted = {name: value for name, value in figures.items() if name not in ("seconds", "memory")}
            per_image = spread([seconds / args.batch_size for seconds in figures["seconds"]])
            row[phase] |= {
                "seconds": figures["seconds"],
                "seconds_per_image": per_image,
                "memory": figures["memory"],
            }
            said = f"{per_image['median']:.4f} s an image, peak {figures['memory']['peak'] / GIB:.2f} GiB"
        print(
            f"{row['model']}, {ROWS[what.row][0]}, {phase}: {said}; took {time.perf_counter() - begin:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        print(outcome.details, end="", file=sys.stderr, flush=True)
    clusters = counted.get("clusters")
    return {
        **row,
        "flops_per_image": counted.get("flops"),
        "parameters": counted.get("parameters"),
        "tokens": counted.get("tokens"),
        "clusters": clusters,
        "mean_clusters": statistics.mean(clusters) if clusters else None,
    }


def comparable(row: dict) -> dict[str, float | None]:
    """The figures of a row that ratios are taken of; None for those that were not measured."""
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
    """ENACT's figures over those of each plain row of the same variant; None where one of the two is missing."""
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


def phase_cell(phase: dict, text: str) -> str:
    """What stands in a table for a phase's figure: the text, or what went wrong."""
    return text if phase["status"] == DONE else phase["status"]


def to_markdown(figures: dict) -> str:
    """The figures as two tables in Markdown."""
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
            memory[phase] = phase_cell(part, memory_text(part.get("memory"), figures["device"]))
            times[phase] = phase_cell(part, figure_range(part.get("seconds_per_image"), ".4f"))
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
    memory = (
        "allocated (reserved)" if figures["device"].startswith("cuda") else "resident in the process (rise in the runs)"
    )
    text = (
        f"{heading(figures)}\n\n"
        f"{height} x {width} pixels, images: {settings['images']}; precision: {settings['precision']}. Seconds: median "
        f"of {settings['repeat']} runs (least to most) of a batch, over its images. Peak memory: {memory}.\n\n"
        + markdown_table(columns, lines)
    )
    if figures["ratios"]:
        columns = {
            "ENACT over": LEFT, "training memory": RIGHT, "its rise": RIGHT, "training time": RIGHT,
            "inference time": RIGHT, "inference memory": RIGHT, "GFLOP": RIGHT,
        }  # fmt: skip
        keys = (
            "training_memory",
            "training_memory_rise",
            "training_seconds",
            "inference_seconds",
            "inference_memory",
            "flops",
        )
        lines = [
            [f"{ratio['model']}, {ROWS[ratio['over']][0]}", *(figure(ratio[key], ".2f") for key in keys)]
            for ratio in figures["ratios"]
        ]
        text += "\n\n" + markdown_table(columns, lines)
    return text


def memory_text(memory: dict | None, device: str) -> str:
    """Peak GiB, and in brackets what else says how much that is."""
    if memory is None:
        return "-"
    other = memory["reserved" if device.startswith("cuda") else "rise"]
    return f"{memory['peak'] / GIB:.2f} ({other / GIB:.2f})"


def to_csv(rows: list[dict]) -> list[dict]:
    """The figures as rows of numbers; None where there is none."""
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
    """The rows that the command line asks for, variant by variant.

    Raises:
        UserError: model flags do not work together, or are the benchmark's own, or the data set is not there.
    """
    refuse_flags(args.flags, REFUSED)
    if args.coco_path:
        find_split(args.coco_path, "val")
    own = ["--amp", args.amp]
    # Anchor DETR alone has a default for it; the parsers want one, though noise needs none.
    own += ["--coco_path", args.coco_path or "none"]
    own += ["--device", args.device] if args.device else []
    own += ["--batch_size", str(args.batch)] if args.batch else []
    own += ["--compile"] if args.compile else []
    return [
        Measurement(
            variant,
            row,
            parse_flags(variant, default_device(), args.flags, [*own, "--encoder_attention", ROWS[row][1]]),
            tuple(args.size),
            args.coco_path is not None,
            args.repeat,
            args.warmup,
        )
        for variant in VARIANTS
        if variant in args.variants
        for row in ROWS
        if row in args.rows
    ]


def describe(args: argparse.Namespace, measurements: list[Measurement]) -> dict:
    """What the figures depend on: `environment`, and the `settings`."""
    return {
        **environment(args.argv, find_device(measurements[0].args.device)),
        "settings": {
            "size": args.size,
            "images": f"validation images of {args.coco_path}, padded" if args.coco_path else "random noise",
            "precision": precision_text(args.amp) + (", compiled" if args.compile else ""),
            "repeat": args.repeat,
            "warmup": args.warmup,
            "flags": args.flags,
        },
    }


def run(args: argparse.Namespace) -> int:
    """Measure all rows, print them and write the files.

    Returns:
        the exit status: 1 where a row failed for another reason than memory, else 0.
    """
    measurements = plan(args)
    report = Report(args.output_dir, "table")
    figures = {**describe(args, measurements), "benchmark": "table", "rows": []}
    with worker_for(find_device(measurements[0].args.device)) as worker:
        for what in measurements:
            figures["rows"].append(measure_row(what, worker))
            figures["ratios"] = ratios_of(figures["rows"])
            report.save_figures(figures)
    report.save(figures, to_markdown(figures), to_csv(figures["rows"]))
    return int(any(row[phase]["status"] == FAILED for row in figures["rows"] for phase in PHASES))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), help="detectors (default: all)"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=tuple(ROWS),
        default=list(ROWS),
        help="of each: plain with attention stored, plain as this project computes it, ENACT (default: all)",
    )
    parser.add_argument(
        "--size",
        type=positive_int,
        nargs=2,
        default=[800, 1333],
        metavar=("H", "W"),
        help="of the images, pixels (default: 800 1333)",
    )
    batches = ", ".join(f"{name} {batch}" for name, batch in BATCH_SIZES.items())
    parser.add_argument("--batch", type=positive_int, metavar="N", help=f"images a batch (default: {batches})")
    parser.add_argument(
        "--amp", choices=tuple(AMP_DTYPE), default="none", help="mixed precision (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="pass --compile to the models")
    parser.add_argument("--device", help="where to compute: cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--coco_path", metavar="DIR", help="take the first validation images of this data set, rather than noise"
    )
    parser.add_argument(
        "--repeat", type=positive_int, default=10, metavar="N", help="timed runs of each (default: %(default)s)"
    )
    parser.add_argument(
        "--warmup", type=natural_int, default=3, metavar="N", help="runs before them (default: %(default)s)"
    )
    add_report_arguments(parser)
    add_model_flags(parser)
