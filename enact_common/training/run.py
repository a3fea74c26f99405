"""Training and evaluation from parsed arguments, shared by every variant's `main.py`."""

import argparse
import logging
import random
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import yaml

from enact_common.checkpoints.files import LATEST
from enact_common.cli.arguments import VariantParser
from enact_common.cli.checks import is_installed
from enact_common.cli.config import CONFIG, config_text
from enact_common.cli.flags import AUTO_BATCH, with_flags
from enact_common.data.annotations import parse_once
from enact_common.data.coco import CocoDetection
from enact_common.data.loading import worker_death
from enact_common.evaluation.coco import CocoBoxEvaluator
from enact_common.evaluation.panoptic import PanopticEvaluator
from enact_common.training.auto_batch import check_auto_device, resolve_batch
from enact_common.training.best import BestTracker
from enact_common.training.engine import NonFiniteLossError, evaluate, train_one_epoch
from enact_common.training.logs import RunLog, main_metric, setup_logging
from enact_common.training.optimization import build_optimization
from enact_common.training.pictures import evaluation_pictures
from enact_common.training.report import report_evaluation
from enact_common.training.setup import (
    Data,
    Network,
    check_backbone_weights,
    check_data,
    check_paths,
    is_measurable,
    load_data,
    load_network,
    load_sources,
    resolve_model_flags,
    wrap_model,
)
from enact_common.training.state import Position, TrainingState
from enact_common.training.summary import log_summary
from enact_common.training.trackers import Trackers
from enact_common.utils.device import check_precision, find_device, peak_memory, start_counting_memory
from enact_common.utils.distributed import (
    SharedError,
    abandon_process_group,
    failing_together,
    gather_objects,
    get_rank,
    init_distributed_mode,
    is_main_process,
    leave_process_group,
    lost_process,
    share_buffers,
)
from enact_common.utils.errors import UserError
from enact_common.utils.files import make_folder, write_file
from enact_common.utils.signals import STOPPED, Stopped, listening, stop_requested

logger = logging.getLogger("enact")

# Unreadable images that one warning names.
MOST_NAMED = 20


def main(
    variant: str,
    parser: VariantParser,
    build_model: Callable,
    build_dataset: Callable,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a variant's command line.

    Args:
        variant: name of the variant, which goes into checkpoints.
        parser: the variant's command line.
        build_model: from arguments to (model, criterion, postprocessors).
        build_dataset: from ("train" or "val", arguments, label map or None) to a data set.
        argv: command-line words; None for `sys.argv`.

    Returns:
        the exit status: 0; 2 for a UserError; 1 for a loss that is not finite or a lost process; 75 after a signal
        that asked the run to stop; 130 after Ctrl-C.
    """
    args = parser.parse_args(argv)
    status, problem, together = 0, "", True
    try:
        with listening():
            args = with_latest(args)
            parser.check(args)
            run(variant, parser, args, build_model, build_dataset)
    except UserError as error:
        # An error from a loader's worker has the worker's traceback in front of its message.
        status, problem = 2, "error: " + str(error).rsplit("UserError: ", 1)[-1].strip()
        together = isinstance(error, SharedError)
    except NonFiniteLossError as error:
        status, problem = 1, f"stopped: {error}"
    except Stopped as stop:
        status, problem = STOPPED, f"stopped: {stop}"
    except KeyboardInterrupt:
        status, problem, together = 130, "interrupted; earlier checkpoints are complete", False
    except RuntimeError as error:
        death = worker_death(error)
        if death is None and not lost_process(error):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        status, problem, together = 1, f"stopped: {death or f'another process has ended, or hangs ({reason})'}", False
    if problem and (is_main_process() or not together):
        print(f"{parser.prog}: {problem}", file=sys.stderr)
    if together:
        leave_process_group()
    else:
        abandon_process_group(status)
    return status


def with_latest(args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments; with `--auto_resume` and no `--resume`, `resume` is the latest checkpoint if it exists.

    Each process looks for the file, which is safe: no process writes a checkpoint before all have started.
    """
    if args.auto_resume and args.output_dir and not args.resume:
        latest = Path(args.output_dir) / LATEST
        return with_flags(args, resume=str(latest) if latest.is_file() else "")
    return args


def run(
    variant: str, parser: VariantParser, args: argparse.Namespace, build_model: Callable, build_dataset: Callable
) -> None:
    """Check files and devices, set up, then train or evaluate; arguments are as in `main`.

    Raises:
        UserError: the arguments, the data or a file is wrong; raised before any work starts, except for unreadable
            images.
        NonFiniteLossError: the loss or a gradient is not finite.
    """
    device = find_device(args.device)
    check_precision(args.amp, device)
    if args.sync_bn and device.type != "cuda":
        raise UserError(
            f"--sync_bn: PyTorch synchronises batch norm only on GPUs, not on --device {args.device}; leave it out"
        )
    asked, args = args, init_distributed_mode(args)
    device = torch.device(args.device)
    setup_logging()
    check_auto_device(args, device)
    if args.auto_resume and len(set(gather_objects(args.resume))) > 1:
        raise UserError(
            f"--auto_resume: only some processes see {Path(args.output_dir) / LATEST}; pass an --output_dir that all "
            "machines share, or --resume CKPT"
        )

    with failing_together(), parse_once():
        sources = load_sources(variant, args)
        output_dir = check_paths(args)
        check_backbone_weights(args, sources)
        if output_dir:
            make_folder(output_dir)
    # The same seed in all processes, so that randomly initialised weights are equal.
    seed_generators(args.seed)
    with failing_together(), parse_once():
        auto = args.batch_size == AUTO_BATCH
        data = load_data(with_flags(args, batch_size=1) if auto else args, build_dataset, sources, device)
        args = resolve_model_flags(args, sources, data.label_map)
        network = load_network(variant, args, build_model, sources, data.label_map, device)
        measurable = is_measurable(data, args, "panoptic" in network.postprocessors)
        if not args.eval:
            check_data(data, args, network.model.num_queries)
        if auto:
            args = resolve_batch(args, network, data.train_set, device)
            data = data.with_batches(args, device)
    if get_rank():
        # From here on a different seed per process, so that dropout differs.
        seed_generators(args.seed + get_rank())

    unreadable = UnreadableImages()
    if args.eval:
        log_summary(variant, args, data, network, device, output_dir)
        data.cache(args.cache_mode)
        _, evaluator, panoptic = evaluate_network(args, data, network, device, unreadable)
        epoch = (sources.resumed or {}).get("epoch")
        source = {"set": args.eval_set, "epoch": epoch, "checkpoint": args.resume or args.pretrained}
        masks = "segm" in network.postprocessors
        report_evaluation(data, evaluator, panoptic, source, output_dir, masks, per_class=True)
    else:
        network.wrapped = wrap_model(network.model, device)
        # With several GPUs, args.device is this process's device; save the user's.
        settings = config_text(parser, with_flags(args, device=asked.device))
        train(variant, args, settings, data, network, sources.resumed, device, output_dir, unreadable, measurable)


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def train(
    variant: str,
    args: argparse.Namespace,
    settings: str,
    data: Data,
    network: Network,
    checkpoint: dict | None,
    device: torch.device,
    output_dir: Path | None,
    unreadable: "UnreadableImages",
    measurable: bool,
) -> None:
    """Train to the last epoch from what `run` has set up; save, evaluate and log after each epoch.

    Args:
        settings: the content of `config.yaml`.
        checkpoint: the checkpoint to resume; None for a new training.
        measurable: whether the validation images have objects, so that AP or PQ can be computed.

    Raises:
        Stopped: a signal asked the run to stop; its progress is saved.
        NonFiniteLossError: the loss or a gradient is not finite.
    """
    optimization = build_optimization(network.model, args, device, network.average)
    state = TrainingState(variant, args, network, optimization, data.label_map, output_dir, device)
    start = state.resume(checkpoint, len(data.train_loader))
    args = state.args = with_flags(args, start_epoch=start.epoch)
    log_summary(variant, args, data, network, device, output_dir, optimization.optimizer, start.epoch)
    data.cache(args.cache_mode)
    # Only now, after all checks: a refused run must not leave a config.
    with failing_together():
        if output_dir and is_main_process():
            write_file(output_dir / CONFIG, lambda file: file.write(settings.encode()))
    with RunLog(output_dir, open_trackers(variant, args, settings, output_dir)) as log:
        best = BestTracker(log.ap_history(start.epoch), output_dir, args.resume)
        begin = time.perf_counter()

        def finish_epoch(epoch: int, train_stats: dict[str, float], cost: dict[str, float]) -> None:
            """Log the epoch, after an evaluation if it is due. `cost` is empty if an earlier run trained the epoch."""
            stats, improved = {f"train_{name}": value for name, value in train_stats.items()} | cost, False
            if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
                evaluation_begin = time.perf_counter()
                try:
                    test_stats, evaluator, panoptic = evaluate_network(args, data, network, device, unreadable)
                except Stopped as stop:
                    raise stopped(
                        f"in the evaluation of epoch {epoch}, which a resumed run repeats", output_dir
                    ) from stop
                source = {"set": args.eval_set, "epoch": epoch}
                metrics = report_evaluation(
                    data, evaluator, panoptic, source, output_dir, masks="segm" in network.postprocessors
                )
                test_stats["seconds"] = time.perf_counter() - evaluation_begin
                stats |= {f"test_{name}": value for name, value in test_stats.items()} | metrics
                if metrics:
                    improved = best.add(epoch, main_metric(metrics) if measurable else None)
            log.write(epoch, {**stats, "n_parameters": network.num_parameters})
            if improved:
                # Without --log, TensorBoard gets no pictures: its files would grow large unasked.
                log.write_best(epoch, stats, lambda: evaluation_pictures(data, evaluator) if args.log else {})

        # A run may have stopped between its checkpoint and its evaluation. Only the main process has the log.
        if checkpoint and "train_stats" in checkpoint and not gather_objects(log.has_epoch(checkpoint["epoch"]))[0]:
            finish_epoch(checkpoint["epoch"], checkpoint["train_stats"], cost={})
        if start.epoch >= args.epochs:
            logger.info("nothing left to train: %d epochs are done, --epochs is %d", start.epoch, args.epochs)
        for epoch in range(start.epoch, args.epochs):
            if best.has_stopped_improving(args.early_stop):
                break
            position = start if epoch == start.epoch else Position(epoch)
            data.train_loader.sampler.set_epoch(epoch)
            data.train_loader.sampler.first = position.batches * args.batch_size
            data.train_set.set_epoch(epoch)
            start_counting_memory(device)
            epoch_begin = time.perf_counter() - position.seconds

            def after_step(batches: int, stop: bool, epoch=epoch, position=position, begin=epoch_begin) -> None:
                steps = batches // args.accumulate
                if stop or (args.save_every_steps and steps % args.save_every_steps == 0):
                    state.save_within_epoch(epoch, batches, position.meter, time.perf_counter() - begin)
                if stop:
                    unreadable.log(data.train_set, "others take their places")
                    raise stopped(f"in epoch {epoch}, after {batches} of {len(data.train_loader)} batches", output_dir)

            train_stats = train_one_epoch(
                network.wrapped, network.criterion, data.train_loader, optimization, device, epoch, args.print_freq,
                position.meter, position.batches, after_step,
            )  # fmt: skip
            cost = {
                "train_seconds": time.perf_counter() - epoch_begin,
                "peak_memory_gib": peak_memory(device) / 2**30,
            }
            state.save_epoch(epoch, train_stats)
            bad_images = unreadable.log(data.train_set, "others take their places")
            if any(gather_objects(stop_requested() is not None)):
                raise stopped(f"after epoch {epoch}, before its evaluation", output_dir)
            finish_epoch(epoch, train_stats, cost | ({"unreadable_images": bad_images} if bad_images else {}))
    logger.info("training took %s", timedelta(seconds=round(time.perf_counter() - begin)))


def open_trackers(variant: str, args: argparse.Namespace, settings: str, output_dir: Path | None) -> Trackers | None:
    """Open the trackers of `--log`, in the main process; without the flag, TensorBoard if it is installed."""
    if output_dir is None or not is_main_process():
        return None
    if args.log:
        return Trackers(args.log, output_dir, {"variant": variant, **yaml.safe_load(settings)})
    if not is_installed("tensorboard"):
        logger.info("TensorBoard is not installed, so no event files are written: pip install tensorboard")
        return None
    return Trackers(["tensorboard"], output_dir, {})


def evaluate_network(
    args: argparse.Namespace, data: Data, network: Network, device: torch.device, unreadable: "UnreadableImages"
) -> tuple[dict[str, float], CocoBoxEvaluator, PanopticEvaluator | None]:
    """Run the model on the images to evaluate on.

    Returns (losses, evaluator, panoptic). The losses are empty without annotations; `panoptic` is None for a model
    without segments.
    """
    evaluator = CocoBoxEvaluator(data.label_map)
    panoptic = PanopticEvaluator() if "panoptic" in network.postprocessors else None
    model = network.average.model if network.average else network.model
    share_buffers(model)
    criterion = None if args.eval_set == "test" else network.criterion
    stats = evaluate(
        model, criterion, network.postprocessors, data.val_loader, evaluator, device, args.amp, args.print_freq,
        panoptic,
    )  # fmt: skip
    unreadable.log(data.val_set, "their objects count as missed")
    return stats, evaluator, panoptic


def stopped(where: str, output_dir: Path | None) -> Stopped:
    """Return the error that ends a training after a signal."""
    advice = "nothing is saved without --output_dir"
    if output_dir:
        advice = f"progress is saved in {output_dir / LATEST}: continue with --auto_resume, or --resume and its path"
    signal_name = next(name for name in gather_objects(getattr(stop_requested(), "name", None)) if name)
    return Stopped(f"received {signal_name} {where}; {advice}")


class UnreadableImages:
    """A log of unreadable images that names each image once per run."""

    def __init__(self):
        self.named: set[tuple[CocoDetection, int]] = set()

    def log(self, dataset: CocoDetection, consequence: str) -> int:
        """Warn about images that could not be read and were not named yet; `consequence` is how the run treats them.

        Returns the number of unreadable images of the data set since the run started, over all processes.
        """
        bad = sorted(set().union(*gather_objects(dataset.unreadable())))
        new = [i for i in bad if (dataset, i) not in self.named]
        self.named.update((dataset, i) for i in new)
        if new and is_main_process():
            shown = "".join(f"\n  {dataset.why_unreadable(i)}" for i in new[:MOST_NAMED])
            more = f"\n  and {len(new) - MOST_NAMED} more" if len(new) > MOST_NAMED else ""
            logger.warning(
                "data: %d of %d images in %s cannot be read; %s (--strict_data stops the run instead)%s%s",
                len(bad), len(dataset), dataset.image_folder, consequence, shown, more,
            )  # fmt: skip
        return len(bad)
