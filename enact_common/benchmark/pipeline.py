"""Speed of the data loader: images per second, and how long a training step waits for a batch."""

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator

from torch.utils.data import DataLoader

from enact_common.benchmark.detectors import (
    BATCH_SIZES,
    Batch,
    add_common_flags,
    add_model_flags,
    build_detector,
    build_train_step,
    model_name,
    parse_flags,
    refuse_flags,
)
from enact_common.benchmark.isolated import DONE, run_isolated
from enact_common.benchmark.measuring import spread, synchronizer
from enact_common.benchmark.report import (
    LEFT,
    RIGHT,
    Report,
    add_report_arguments,
    environment,
    figure_range,
    heading,
    markdown_table,
)
from enact_common.cli.flags import with_flags
from enact_common.cli.types import natural_int, positive_int
from enact_common.data.annotations import find_split
from enact_common.data.cache import cache_images
from enact_common.data.loading import make_loader
from enact_common.data.synthetic import make_shapes
from enact_common.utils.acceleration import prepare
from enact_common.utils.device import default_device, find_device
from enact_common.utils.errors import UserError
from enact_common.variants import VARIANTS, load_variant

# Images drawn without --coco_path: the size of most COCO images, and about as many objects. Their extents are fractions
# of the shorter side.
SHAPES = {"size": (480, 640), "objects": (3, 11), "object_size": (0.05, 0.5)}

# Values of --cache_mode, and the variant's flags for each.
CACHE_MODES = {"off": [], "encoded": ["--cache_mode", "encoded"], "decoded": ["--cache_mode", "decoded"]}

REFUSED = {
    "--cache_mode": "pass it before --",
    "--coco_path": "pass it before --",
    "--resume": "checkpoints are not loaded, leave it out",
    "--limit_train": "pass --images before --",
}


def epochs(loader: DataLoader) -> Iterator[int]:
    """Yield epoch numbers without end, after setting each in the sampler and the data set."""
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        loader.dataset.set_epoch(epoch)
        yield epoch


def batches(loader: DataLoader) -> Iterator[Batch]:
    """Yield the batches of all epochs without end."""
    for _ in epochs(loader):
        yield from loader


def loading_rates(loader: DataLoader, repeat: int) -> list[float]:
    """Return the loader's images per second in each of `repeat` epochs, after one in which the workers start."""
    rates = []
    for epoch in itertools.islice(epochs(loader), repeat + 1):
        start = time.perf_counter()
        images = sum(len(targets) for _, targets in loader)
        if epoch:
            rates.append(images / (time.perf_counter() - start))
    return rates


def training_waits(variant: str, args: argparse.Namespace, loader: DataLoader, repeat: int, steps: int) -> dict:
    """Measure which fraction of training time is spent waiting for batches, `repeat` times over some training steps.

    The device is synchronized after each step, so that its work does not count as waiting for the loader. Returns a
    list with one value per measurement each: `wait_shares`, in [0, 1], and `step_seconds`, the mean of a step without
    its wait.
    """
    device = find_device(args.device)
    synchronize = synchronizer(device)
    batch_iterator = batches(loader)
    model, criterion, _ = build_detector(variant, args, next(batch_iterator)[0], device)
    prepare(model, args, device)
    step = build_train_step(model, criterion, args, device)
    # Use up the prefetched batches, which would hide the speed of the workers.
    for _ in range(loader.num_workers * (loader.prefetch_factor or 0) + 1):
        step(*next(batch_iterator))
        synchronize()

    wait_shares, step_seconds = [], []
    for _ in range(repeat):
        wait_time = step_time = 0.0
        for _ in range(steps):
            start = time.perf_counter()
            samples, targets = next(batch_iterator)
            loaded = time.perf_counter()
            step(samples, targets)
            synchronize()
            wait_time += loaded - start
            step_time += time.perf_counter() - loaded
        wait_shares.append(wait_time / (wait_time + step_time))
        step_seconds.append(step_time / steps)
    step.check()
    return {"wait_shares": wait_shares, "step_seconds": step_seconds}


def measure(variant: str, args: argparse.Namespace, repeat: int, steps: int) -> dict:
    """Measure one number of workers with one cache mode, `repeat` times; run it in a new process.

    Returns `images_per_second` of each measurement; with `steps` also the result of `training_waits`.
    """
    dataset = load_variant(variant).datasets.build_dataset("train", args)
    args = with_flags(args, num_classes=dataset.label_map.num_classes)
    loader = make_loader(dataset, args, find_device(args.device), train=True)
    if len(loader) == 0:
        raise UserError(
            f"--images: {len(dataset)} images do not fill a batch of {args.batch_size}; pass more, or reduce --batch"
        )
    if args.cache_mode:
        cache_images([dataset], args.cache_mode)
    figures = {"images_per_second": loading_rates(loader, repeat)}
    if steps:
        figures |= training_waits(variant, args, loader, repeat, steps)
    return figures


def to_markdown(figures: dict) -> str:
    """Return the figures as a Markdown table."""
    columns = {"cache": LEFT, **dict.fromkeys(("workers", "images/s", "training step s", "waiting %"), RIGHT)}
    lines = []
    for row in figures["rows"]:
        rate = figure_range(row["images_per_second"], ".1f") if row["status"] == DONE else row["status"]
        step, wait = figure_range(row["step_seconds"], ".3f"), figure_range(row["wait_share"], ".1f", 100)
        lines.append([row["cache_mode"], str(row["workers"]), rate, step, wait])
    settings = figures["settings"]
    return (
        f"{heading(figures)}\n\n"
        f"{settings['model']}, batch {settings['batch']}, on {figures['device']}; {settings['source']}. "
        f"Median of {settings['repeat']} measurements (least to most): images per second of the loader in an epoch "
        f"without training, seconds of a training step without its wait for a batch, and the percentage of training "
        f"time spent waiting, over {settings['steps']} steps.\n\n" + markdown_table(columns, lines)
    )


def to_csv(rows: list[dict]) -> list[dict]:
    """Return the figures as CSV rows; missing values are None."""
    flat = []
    for row in rows:
        line = {name: row[name] for name in ("cache_mode", "workers", "status")}
        for name in ("images_per_second", "step_seconds", "wait_share"):
            line |= {f"{name}_{part}": (row[name] or {}).get(part) for part in ("median", "least", "most")}
        flat.append(line)
    return flat


def plan(args: argparse.Namespace, coco_path: str) -> list[tuple[str, argparse.Namespace]]:
    """Return (cache mode, parsed arguments) of each row that the command line selects."""
    refuse_flags(args.flags, REFUSED)
    if args.coco_path:
        find_split(args.coco_path, "train")
    overrides = ["--coco_path", coco_path, "--limit_train", str(args.images)]
    overrides += ["--device", args.device] if args.device else []
    overrides += ["--batch_size", str(args.batch)] if args.batch else []
    rows = []
    for mode, workers in itertools.product(args.cache_mode, args.workers):
        own = [*overrides, "--num_workers", str(workers), *CACHE_MODES[mode]]
        rows.append((mode, parse_flags(args.variant, default_device(), args.flags, own)))
    return rows


def measure_row(mode: str, variant: str, flags: argparse.Namespace, repeat: int, steps: int) -> dict:
    """Measure one row and return its figures; print the progress to standard error."""
    limit = find_device(flags.device).type == "cpu"
    outcome = run_isolated(measure, variant, flags, repeat, steps, limit=limit)
    values = outcome.value or {}
    runs = {name: values.get(name) for name in ("images_per_second", "step_seconds", "wait_shares")}
    row = {
        "cache_mode": mode,
        "workers": flags.num_workers,
        **outcome.fields(),
        "runs": runs,
        "images_per_second": runs["images_per_second"] and spread(runs["images_per_second"]),
        "step_seconds": runs["step_seconds"] and spread(runs["step_seconds"]),
        "wait_share": runs["wait_shares"] and spread(runs["wait_shares"]),
    }
    name = f"cache {mode}, {flags.num_workers} workers"
    outcome.log(name, lambda: f"{row['images_per_second']['median']:.1f} images/s")
    return row


def run(args: argparse.Namespace) -> int:
    """Measure all rows, print the results and write the files; return 1 if one failed, unless for memory."""
    with tempfile.TemporaryDirectory() as folder:
        rows = plan(args, args.coco_path or folder)
        report = Report(args.output_dir, "pipeline")
        if not args.coco_path:
            make_shapes(folder, args.images, val=0, parallel=True, **SHAPES)
        flags = rows[0][1]
        height, width = SHAPES["size"]
        source = f"{args.images} JPEG files of drawn shapes, {height} x {width} pixels"
        if args.coco_path:
            source = f"up to {args.images} training images of {args.coco_path}"
        figures = {
            "benchmark": "pipeline",
            **environment(args.argv, find_device(flags.device)),
            "settings": {
                "variant": args.variant,
                "model": model_name(args.variant, flags),
                "batch": flags.batch_size,
                "source": source,
                **{name: getattr(args, name) for name in ("images", "repeat", "steps", "flags")},
            },
        }

        def measured(row: tuple[str, argparse.Namespace]) -> dict:
            return measure_row(row[0], args.variant, row[1], args.repeat, args.steps)

        return report.measure(figures, rows, measured, to_markdown, to_csv)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--variant", choices=tuple(VARIANTS), default="detr",
        help="variant of the model and its data loader (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=natural_int, nargs="+", default=[0, 1, 2, 4], metavar="N",
        help="numbers of loader processes, one row for each (default: 0 1 2 4)",
    )  # fmt: skip
    parser.add_argument(
        "--cache_mode", nargs="+", choices=tuple(CACHE_MODES), default=list(CACHE_MODES),
        help="image caches to measure, one row for each: none, encoded files, decoded images (default: all)",
    )  # fmt: skip
    parser.add_argument("--coco_path", metavar="DIR", help="data set (default: drawn shapes in a temporary folder)")
    parser.add_argument(
        "--images", type=positive_int, default=256, metavar="N", help="number of training images (default: %(default)s)"
    )
    batches = ", ".join(f"{name} {batch}" for name, batch in BATCH_SIZES.items())
    parser.add_argument("--batch", type=positive_int, metavar="N", help=f"images per batch (default: {batches})")
    parser.add_argument(
        "--steps", type=natural_int, default=20, metavar="N",
        help="training steps per measurement; 0 measures only the loader (default: %(default)s)",
    )  # fmt: skip
    add_common_flags(parser, device=None)
    parser.add_argument(
        "--repeat", type=positive_int, default=3, metavar="N", help="measurements per row (default: %(default)s)"
    )
    add_report_arguments(parser)
    add_model_flags(parser)
