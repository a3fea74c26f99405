"""Where a training step's time goes: a model's parts, each alone, forward and backward, on what a step gives them."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from enact_common.benchmark import table
from enact_common.benchmark.detectors import build_detector, build_train_step, coco_batch, model_name, noise_batch
from enact_common.benchmark.eager import eager_attention
from enact_common.benchmark.isolated import DONE, FAILED, run_isolated
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
    """A call as it was made."""

    function: Callable
    args: tuple
    kwargs: dict[str, Any]


@contextlib.contextmanager
def recorded_calls(owners: list[nn.Module], method: str) -> Iterator[list[Call]]:
    """Within it, the modules' calls of a method are added to a list."""
    calls: list[Call] = []
    with contextlib.ExitStack() as stack:
        for owner in owners:
            stack.enter_context(recorded(owner, method, calls))
        yield calls


@contextlib.contextmanager
def recorded(owner: nn.Module, method: str, calls: list[Call]) -> Iterator[None]:
    """Within it, one module's calls of a method are added to `calls`."""
    function, own = getattr(owner, method), vars(owner).get(method)

    def record(*args, **kwargs):
        calls.append(Call(function, args, kwargs))
        return function(*args, **kwargs)

    setattr(owner, method, record)
    try:
        yield
    finally:
        # A compiled method is the instance's own, any other the class's.
        delattr(owner, method) if own is None else setattr(owner, method, own)


def detached(value: Any) -> Any:
    """A value whose tensors, however deep, begin a graph of their own where they were part of one."""
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
    """The tensors in a value, however deep, that have a graph."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    if dataclasses.is_dataclass(value):
        value = vars(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in differentiable(item)]


def layers_of(model: nn.Module, part: str) -> list[nn.Module]:
    """The "encoder"'s or the "decoder"'s layers, of any variant."""
    layers = model.transformer.named_modules()
    return [layer for name, layer in layers if isinstance(layer, Recomputed) and name.startswith(part)]


def measure(what: Measurement) -> dict[str, list[float]]:
    """Seconds of each part's runs on a batch, and of whole steps; for a process of its own."""
    args = what.args
    device = find_device(args.device)
    with eager_attention(what.variant) if what.row == "eager" else contextlib.nullcontext():
        samples, targets = coco_batch(args, what.size) if what.real else noise_batch(args, what.size)
        model, criterion, _ = build_detector(what.variant, args, samples, device)
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
                        found = differentiable(call.function(*detached(call.args), **detached(call.kwargs)))
                    # A gradient as large as the result, as the rest of the model would send; one from a sum is not.
                    torch.autograd.backward(found, [torch.ones_like(tensor) for tensor in found])
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
        seconds = take_turns(steps, what.repeat, synchronize, what.warmup)
        step.check()
        criterion.total(criterion(model(on_device[0]), on_device[1])).backward()
        seconds |= take_turns({"optimizer": optimizer}, what.repeat, synchronize, what.warmup)
    both = zip(seconds.pop("encoder"), seconds["encoder attention"], strict=True)
    seconds["encoder, the rest"] = [whole - attention for whole, attention in both]
    return seconds


def to_markdown(figures: dict) -> str:
    """The figures as a table in Markdown: seconds a batch."""
    columns = {"model": LEFT, "attention": LEFT, **dict.fromkeys((*PARTS, "their sum", WHOLE), RIGHT)}
    lines = []
    for row in figures["rows"]:
        medians = {name: values["median"] for name, values in row["seconds"].items()}
        total = sum(medians[name] for name in PARTS) if medians else None
        shown = [medians.get(name) for name in PARTS] + [total, medians.get(WHOLE)]
        cells = [figure(value, ".3f") for value in shown] if medians else [row["status"]] * len(shown)
        lines.append([row["model"], ROWS[row["row"]][0], *cells])
    settings = figures["settings"]
    height, width = settings["size"]
    return (
        f"{heading(figures)}\n\n"
        f"{height} x {width} pixels, images: {settings['images']}; precision: {settings['precision']}. Seconds of a "
        f"batch, forward and backward: median of {settings['repeat']} runs. Each part runs alone, all its layers one "
        f"after the other.\n\n" + markdown_table(columns, lines)
    )


def to_csv(rows: list[dict]) -> list[dict]:
    """The figures as rows of numbers."""
    flat = []
    for row in rows:
        line = {name: row[name] for name in ("variant", "row", "model", "batch", "status")}
        flat.append(line | {name: row["seconds"].get(name, {}).get("median") for name in (*PARTS, WHOLE)})
    return flat


def run(args: argparse.Namespace) -> int:
    """Measure all rows, print them and write the files.

    Returns:
        the exit status: 1 where a row failed for another reason than memory, else 0.
    """
    measurements = table.plan(args)
    report = Report(args.output_dir, "parts")
    figures = {**table.describe(args, measurements), "benchmark": "parts", "rows": []}
    for what in measurements:
        outcome = run_isolated(measure, what, limit=find_device(what.args.device).type == "cpu")
        row = {
            "variant": what.variant,
            "row": what.row,
            "model": model_name(what.variant, what.args),
            "batch": what.args.batch_size,
            "status": outcome.status,
            "message": outcome.message,
            "numerics": outcome.numerics,
            "runs": outcome.value or {},
            "seconds": {name: spread(values) for name, values in (outcome.value or {}).items()},
        }
        figures["rows"].append(row)
        said = f"{row['seconds'][WHOLE]['median']:.3f} s a step" if outcome.status == DONE else outcome.message
        print(f"{row['model']}, {ROWS[what.row][0]}: {said}", file=sys.stderr, flush=True)
        print(outcome.details, end="", file=sys.stderr, flush=True)
        report.save_figures(figures)
    report.save(figures, to_markdown(figures), to_csv(figures["rows"]))
    return int(any(row["status"] == FAILED for row in figures["rows"]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags: those of `table`."""
    table.add_arguments(parser)
