"""Time of a training step by part: each part runs separately, forward and backward, on the inputs of a real step."""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from enact_common.benchmark import table
from enact_common.benchmark.detectors import build_detector, build_train_step
from enact_common.benchmark.eager import eager_attention
from enact_common.benchmark.isolated import run_isolated
from enact_common.benchmark.labels import PARTS, ROWS
from enact_common.benchmark.measuring import spread, synchronizer, take_turns
from enact_common.benchmark.report import LEFT, RIGHT, Report, figure, heading, markdown_table
from enact_common.benchmark.table import Measurement
from enact_common.training.engine import to_device
from enact_common.utils.acceleration import Recomputed, prepare
from enact_common.utils.device import autocast, find_device

WHOLE = "whole step"


@dataclasses.dataclass
class Call:
    """A recorded call: the function and its arguments."""

    function: Callable
    args: tuple
    kwargs: dict[str, Any]


@contextlib.contextmanager
def recorded_calls(owners: list[nn.Module], method: str) -> Iterator[list[Call]]:
    """Yield a list to which each call of a method of the modules is appended."""
    calls: list[Call] = []
    with contextlib.ExitStack() as stack:
        for owner in owners:
            stack.enter_context(record_calls(owner, method, calls))
        yield calls


@contextlib.contextmanager
def record_calls(owner: nn.Module, method: str, calls: list[Call]) -> Iterator[None]:
    """Context in which each call of a method of one module is appended to `calls`."""
    function, instance_attribute = getattr(owner, method), vars(owner).get(method)

    def record(*args, **kwargs):
        calls.append(Call(function, args, kwargs))
        return function(*args, **kwargs)

    setattr(owner, method, record)
    try:
        yield
    finally:
        # A compiled method is an instance attribute; other methods belong to the class.
        delattr(owner, method) if instance_attribute is None else setattr(owner, method, instance_attribute)


def detached(value: Any) -> Any:
    """Return a copy of a nested value whose tensors are detached and keep `requires_grad`."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(detached, value))
    if dataclasses.is_dataclass(value):
        fields = {field.name: detached(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def differentiable(value: Any) -> list[Tensor]:
    """Return the tensors in a nested value that require a gradient."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    if dataclasses.is_dataclass(value):
        value = vars(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in differentiable(item)]


def layers_of(model: nn.Module, part: str) -> list[nn.Module]:
    """Return the layers of the "encoder" or the "decoder", for any variant."""
    layers = model.transformer.named_modules()
    return [layer for name, layer in layers if isinstance(layer, Recomputed) and name.startswith(part)]


def measure(measurement: Measurement) -> dict[str, list[float]]:
    """Return the seconds of each run, by part and for whole steps; run it in a new process."""
    args = measurement.args
    device = find_device(args.device)
    with eager_attention(measurement.variant) if measurement.row == "eager" else contextlib.nullcontext():
        samples, targets = measurement.batch()
        model, criterion, _ = build_detector(measurement.variant, args, samples, device)
        prepare(model, args, device)
        step = build_train_step(model, criterion, args, device)

        on_device = to_device(samples, targets, device)
        encoder, decoder = (layers_of(model, part) for part in ("encoder", "decoder"))
        attending = [layer for layer in encoder if hasattr(layer, "attend")]
        with (
            recorded_calls([model.backbone], "forward") as backbone_calls,
            recorded_calls(encoder, "forward") as encoder_calls,
            recorded_calls(attending, "attend") as attention_calls,
            recorded_calls(decoder, "forward") as decoder_calls,
            autocast(device, args.amp),
        ):
            outputs = model(on_device[0])

        def passes(calls: list[Call]) -> Callable[[], None]:
            def run() -> None:
                for call in calls:
                    with autocast(device, args.amp):
                        results = differentiable(call.function(*detached(call.args), **detached(call.kwargs)))
                    # Dense gradients, as from the rest of the model; sum().backward() would send an expanded scalar.
                    torch.autograd.backward(results, [torch.ones_like(tensor) for tensor in results])
                model.zero_grad(set_to_none=True)

            return run

        def losses() -> None:
            criterion.total(criterion(detached(outputs), on_device[1])).backward()

        def optimizer() -> None:
            step.step_optimizer(torch.ones((), dtype=torch.bool, device=device))

        steps = {
            "backbone": passes(backbone_calls),
            "encoder": passes(encoder_calls),
            "encoder attention": passes(attention_calls),
            "decoder": passes(decoder_calls),
            "losses": losses,
            WHOLE: lambda: step(samples, targets),
        }
        synchronize = synchronizer(device)
        seconds = take_turns(steps, measurement.repeat, synchronize, measurement.warmup)
        step.check()
        criterion.total(criterion(model(on_device[0]), on_device[1])).backward()
        seconds |= take_turns({"optimizer": optimizer}, measurement.repeat, synchronize, measurement.warmup)
    pairs = zip(seconds.pop("encoder"), seconds["encoder attention"], strict=True)
    seconds["encoder, the rest"] = [whole - attention for whole, attention in pairs]
    return seconds


def to_markdown(figures: dict) -> str:
    """Return the seconds per batch as a Markdown table."""
    columns = {"model": LEFT, "attention": LEFT, **dict.fromkeys((*PARTS, "their sum", WHOLE), RIGHT)}
    lines = []
    for row in figures["rows"]:
        medians = {name: values["median"] for name, values in row["seconds"].items()}
        total = sum(medians[name] for name in PARTS) if medians else None
        values = [medians.get(name) for name in PARTS] + [total, medians.get(WHOLE)]
        cells = [figure(value, ".3f") for value in values] if medians else [row["status"]] * len(values)
        lines.append([row["model"], ROWS[row["row"]][0], *cells])
    settings = figures["settings"]
    height, width = settings["size"]
    return (
        f"{heading(figures)}\n\n"
        f"{height} x {width} pixels, images: {settings['images']}; precision: {settings['precision']}. Seconds per "
        f"batch, forward and backward: median of {settings['repeat']} runs. Each part runs separately, its layers one "
        f"after the other.\n\n" + markdown_table(columns, lines)
    )


def to_csv(rows: list[dict]) -> list[dict]:
    """Return the median seconds as CSV rows."""
    flat = []
    for row in rows:
        line = {name: row[name] for name in ("variant", "row", "model", "batch", "status")}
        flat.append(line | {name: row["seconds"].get(name, {}).get("median") for name in (*PARTS, WHOLE)})
    return flat


def measure_row(measurement: Measurement) -> dict:
    """Measure one row and return its figures; print the progress to standard error."""
    outcome = run_isolated(measure, measurement, limit=find_device(measurement.args.device).type == "cpu")
    row = {
        "variant": measurement.variant,
        "row": measurement.row,
        "model": measurement.name,
        "batch": measurement.args.batch_size,
        **outcome.fields(),
        "runs": outcome.value or {},
        "seconds": {name: spread(values) for name, values in (outcome.value or {}).items()},
    }
    name = f"{row['model']}, {ROWS[measurement.row][0]}"
    outcome.log(name, lambda: f"{row['seconds'][WHOLE]['median']:.3f} s a step")
    return row


def run(args: argparse.Namespace) -> int:
    """Measure all rows, print the results and write the files; return 1 if one failed, unless for memory."""
    measurements = table.plan(args)
    report = Report(args.output_dir, "parts")
    figures = {**table.describe(args, measurements), "benchmark": "parts"}
    return report.measure(figures, measurements, measure_row, to_markdown, to_csv)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags, the same as for `table`."""
    table.add_arguments(parser)
