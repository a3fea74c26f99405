"""From parsed arguments to a trained or evaluated model: what every variant's `main.py` calls."""

import argparse
import json
import logging
import math
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from enact_common.checkpoints.contents import averaged_weights, known_variant
from enact_common.checkpoints.files import (
    BEST,
    LATEST,
    check_model_flags,
    detector_weights,
    load_checkpoint,
    load_model,
    optimizer_state_by_name,
    random_states,
    restore_clustering_flags,
    restore_random_states,
    save_checkpoint,
)
from enact_common.checkpoints.pretrained import check_pretrained, load_pretrained
from enact_common.cli.arguments import VariantParser
from enact_common.cli.flags import CLUSTERING_FLAGS, ENACT_LR, PANOPTIC, PLAIN_LR
from enact_common.data.build import data_files
from enact_common.data.cache import cache_images
from enact_common.data.categories import LabelMap
from enact_common.data.checks.rules import NOTHING_TO_MEASURE, quick_checks
from enact_common.data.coco import CocoDetection
from enact_common.data.loading import make_loader, worker_death
from enact_common.evaluation.coco import EVALUATION, CocoBoxEvaluator, evaluation_record, metrics_text, per_class_text
from enact_common.evaluation.panoptic import (
    FOLDER,
    PanopticEvaluator,
    panoptic_metrics,
    panoptic_record,
    panoptic_text,
)
from enact_common.models.backbone import load_backbone_weights
from enact_common.models.layers import encoder_settings
from enact_common.models.segmentation import PostProcessPanoptic
from enact_common.training.averaging import WeightAverage
from enact_common.training.engine import NonFiniteLossError, evaluate, train_one_epoch
from enact_common.training.logs import AverageMeter, RunLog, main_metric, setup_logging
from enact_common.training.optimization import Optimization, build_optimization, drops_until, freeze
from enact_common.utils.acceleration import prepare
from enact_common.utils.device import check_precision, find_device, peak_memory, start_counting_memory
from enact_common.utils.distributed import (
    SharedError,
    abandon_process_group,
    failing_together,
    gather_objects,
    get_rank,
    get_world_size,
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

# A checkpoint that stays, by the number of its epoch.
NUMBERED = re.compile(r"checkpoint(\d{4,})\.pth")

# Unreadable images whose names are written out at a time.
MOST_NAMED = 20


@dataclass
class WithinEpoch:
    """How far an epoch had come when a checkpoint was written in its middle.

    Attributes:
        images: done, of all processes.
        batch: images in a batch of all processes.
        processes: how many there were.
        meters: each one's losses, `AverageMeter.state`.
        seconds: of training in this epoch.
    """

    images: int
    batch: int
    processes: int
    meters: list[dict]
    seconds: float


def main(
    variant: str,
    parser: VariantParser,
    build_model: Callable,
    build_dataset: Callable,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a variant's command line.

    Args:
        variant: its name, which goes into checkpoints.
        parser: its command line.
        build_model: from arguments to (model, criterion, postprocessors).
        build_dataset: from ("train" or "val", arguments, label map or None) to a data set.
        argv: the command line's words; None for the process's own.

    Returns:
        the exit status: 0; 2 for what the user can mend; 1 for a loss that is not finite, or another process that is
        gone; 75 after a signal that asked it to stop; 130 after Ctrl-C.
    """
    args = parser.parse_args(argv)
    status, problem, together = 0, "", True
    try:
        with listening():
            find_latest(args)
            parser.check(args)
            Run(variant, args, build_model, build_dataset).start()
    except UserError as error:
        # One that a loader's worker raised comes with that process's traceback before it.
        status, problem = 2, "error: " + str(error).rsplit("UserError: ", 1)[-1].strip()
        together = isinstance(error, SharedError)
    except NonFiniteLossError as error:
        status, problem = 1, f"stopped: {error}"
    except Stopped as stop:
        status, problem = STOPPED, f"stopped: {stop}"
    except KeyboardInterrupt:
        status, problem, together = 130, "interrupted; what was saved before is whole", False
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


def find_latest(args: argparse.Namespace) -> None:
    """With `--auto_resume` and no `--resume`, let `args.resume` be the latest checkpoint, where there is one.

    Every process looks for itself: none writes a checkpoint before all have met.
    """
    if args.auto_resume and args.output_dir and not args.resume:
        latest = Path(args.output_dir) / LATEST
        args.resume = str(latest) if latest.is_file() else ""


class Run:
    """One run of a command line.

    Args:
        variant: its name.
        args: parsed arguments.
        build_model, build_dataset: as in `main`.
    """

    def __init__(self, variant: str, args: argparse.Namespace, build_model: Callable, build_dataset: Callable):
        self.variant = variant
        self.args = args
        self.build_model = build_model
        self.build_dataset = build_dataset
        # Of an epoch that was begun before: its batches that are done, their losses, and their seconds.
        self.begun = (0, AverageMeter(), 0.0)
        # Unreadable images that were named: data set and item.
        self.named: set[tuple[CocoDetection, int]] = set()

    def start(self) -> None:
        """Check what the parser cannot, set up, then train or evaluate.

        Raises:
            UserError: something is wrong that the user can mend. All but unreadable images is found before any work
                starts.
            NonFiniteLossError: training broke down.
        """
        args = self.args
        self.device = find_device(args.device)
        check_precision(args.amp, self.device)
        if args.sync_bn and self.device.type != "cuda":
            raise UserError(
                f"--sync_bn: PyTorch synchronises batch norm on GPUs alone, not on --device {args.device}; leave it out"
            )
        init_distributed_mode(args)
        self.device = torch.device(args.device)
        setup_logging()
        if args.auto_resume and len(set(gather_objects(args.resume))) > 1:
            raise UserError(
                f"--auto_resume: {Path(args.output_dir) / LATEST} is there for some processes alone; --output_dir must "
                "be a folder that all machines share, or pass --resume CKPT"
            )
        with failing_together():
            checkpoint = self.load_checkpoints()
            self.check_paths()
            if not checkpoint and not self.pretrained and not self.frozen:
                # Fails here, before annotations are read, where weights cannot be had.
                load_backbone_weights(args.backbone, args.backbone_weights)
            if self.output_dir:
                make_folder(self.output_dir)
        # Alike in all processes: what a checkpoint does not have begins with equal random weights.
        self.seed()
        with failing_together():
            self.load_data(checkpoint)
            self.load_model(checkpoint)
            self.check_truth()
        self.wrap_model()
        if get_rank():
            # From here on they differ, so that dropout does.
            self.seed(get_rank())

        if args.eval:
            self.describe()
            self.cache_images()
            _, evaluator, panoptic = self.evaluate()
            self.report(evaluator, panoptic, (checkpoint or {}).get("epoch"), per_class=True)
        else:
            with failing_together():
                self.check_data()
            self.train(checkpoint)

    def load_checkpoints(self) -> dict | None:
        """Read the checkpoint to go on from, if there is one, and set `pretrained` to the one to begin from, if any."""
        args = self.args
        checkpoint = load_checkpoint(args.resume, to_resume=not args.eval) if args.resume else None
        # A run that goes on has left what it began from behind.
        self.pretrained = load_checkpoint(args.pretrained) if args.pretrained and not checkpoint else None
        self.frozen = load_checkpoint(args.frozen_weights) if args.frozen_weights and not checkpoint else None
        if self.pretrained:
            check_pretrained(self.pretrained, self.variant, args)
        if checkpoint:
            known_variant(checkpoint, args.resume)
        if checkpoint and checkpoint.get("variant", self.variant) != self.variant:
            raise UserError(f"{args.resume}: is a checkpoint of the variant {checkpoint['variant']}")
        return checkpoint

    def check_paths(self) -> None:
        """Refuse missing data, and an output folder that another run would be lost in."""
        args = self.args
        for split in (args.eval_set,) if args.eval else ("train", args.eval_set):
            data_files(args, split)
        self.output_dir = Path(args.output_dir) if args.output_dir else None
        if self.output_dir is None:
            return
        latest = self.output_dir / LATEST
        goes_on = args.resume and Path(args.resume).resolve().parent == self.output_dir.resolve()
        if latest.exists() and not goes_on and not args.eval:
            raise UserError(
                f"--output_dir {args.output_dir}: holds a run already; go on with --resume {latest}, or choose "
                "another folder"
            )

    def seed(self, offset: int = 0) -> None:
        """Seed all generators, from `--seed` plus the offset."""
        seed = self.args.seed + offset
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def load_data(self, checkpoint: dict | None) -> None:
        """Build the data sets and the label map, which a checkpoint of ours brings along."""
        args = self.args
        label_map = None
        labelled = checkpoint or self.frozen
        if labelled and "label_map" in labelled:
            label_map = LabelMap.from_dict(labelled["label_map"])
        self.train_set: CocoDetection | None = None
        if not args.eval:
            self.train_set = self.build_dataset("train", args, label_map)
            label_map = self.train_set.label_map
        self.val_set: CocoDetection = self.build_dataset("val", args, label_map)
        self.label_map = self.val_set.label_map
        if args.num_classes not in (None, self.label_map.num_classes):
            raise UserError(
                f"--num_classes {args.num_classes}: {args.resume or args.frozen_weights} was trained with "
                f"{self.label_map.num_classes}; leave the flag out"
            )
        args.num_classes = self.label_map.num_classes

        # The main process alone computes the figures.
        has_truth = args.eval_set != "test"
        self.ground_truth = self.val_set.coco_api() if has_truth and is_main_process() else None
        self.panoptic_truth = self.val_set.truth() if args.dataset_file == PANOPTIC else None
        if self.panoptic_truth:
            # Labels are category ids.
            things = sorted(category["id"] for category in self.panoptic_truth.categories if category["isthing"])
            self.label_map = replace(self.label_map, things=tuple(things))
        self.val_loader = make_loader(self.val_set, args, self.device, train=False)
        if self.train_set:
            self.train_loader = make_loader(self.train_set, args, self.device, train=True)
            if len(self.train_loader) == 0:
                raise UserError(
                    f"--batch_size {args.batch_size}: {get_world_size()} processes' batches need more than the "
                    f"{len(self.train_set)} images there are to train on"
                )

    def check_truth(self) -> None:
        """Say where there is nothing to measure AP or PQ by, and set `measurable`; the main process has the truth.

        Raises:
            UserError: `--early_stop` would wait for it.
        """
        args, file, self.measurable = self.args, self.val_set.annotation_file, True
        if self.ground_truth is None:
            return
        objects = self.ground_truth.dataset["annotations"]
        if "panoptic" in self.postprocessors:
            objects = [segment for segments in self.panoptic_truth.segments.values() for segment in segments]
        if any(not thing.get("iscrowd") for thing in objects):
            return
        self.measurable = False
        figure = "PQ" if "panoptic" in self.postprocessors else "AP"
        limited = f" that --limit_val {args.limit_val} leaves" if args.limit_val else ""
        why = f"{file} has no objects (crowds do not count) in the {len(self.val_set)} images{limited}"
        if args.early_stop and not args.eval:
            raise UserError(
                f"--early_stop {args.early_stop}: there is no {figure} to go by, since {why}; leave the flag out, or "
                "evaluate on images with objects"
            )
        kept = "" if args.eval else f"; {BEST} is not written"
        logger.warning("data: no %s can be measured (COCO's figures are -1), since %s%s", figure, why, kept)

    def check_data(self) -> None:
        """Look for what makes a training on this data vain, and log what makes it doubtful; the main process does.

        Raises:
            UserError: it is vain.
        """
        args = self.args
        # Where both are of one set, what is trained on counts.
        datasets = {"train": (self.train_set, args.limit_train)}
        if args.eval_set != "train":
            datasets[args.eval_set] = (self.val_set, args.limit_val)
        if is_main_process():
            # Of a part of the images, files beyond it need not be there.
            limited = {split for split, (_, limit) in datasets.items() if limit}
            # The checks know COCO's boxes alone.
            parsed = set(datasets) if args.dataset_file == PANOPTIC else limited
            parts = {split: datasets[split][0].coco_api().dataset for split in parsed}
            files = {split: (data.image_folder, data.annotation_file) for split, (data, _) in datasets.items()}
            for finding in quick_checks(files, self.model.num_queries, parts, self.label_map, limited):
                if finding.text != NOTHING_TO_MEASURE:
                    logger.info("data: %s", finding)

    def cache_images(self) -> None:
        """With `--cache_mode`, read all images: before the loaders' workers start, after all else is checked."""
        if self.args.cache_mode:
            with failing_together():
                cache_images(
                    [data for data in (self.train_set, self.val_set) if data is not None], self.args.cache_mode
                )

    def load_model(self, checkpoint: dict | None) -> None:
        """Build the model, with the checkpoint's weights where there is one."""
        args = self.args
        if checkpoint:
            check_model_flags(args.resume, checkpoint.get("args", {}), args)
            restore_clustering_flags(checkpoint.get("args", {}), args)
        elif self.pretrained:
            restore_clustering_flags(self.pretrained["args"], args)
        elif self.frozen:
            # Its masks are what is to be learned.
            check_model_flags(args.frozen_weights, {**self.frozen["args"], "masks": None}, args)
            restore_clustering_flags(self.frozen["args"], args)
        self.model, self.criterion, self.postprocessors = self.build_model(args)
        if "panoptic" in self.postprocessors:
            self.postprocessors["panoptic"] = PostProcessPanoptic(self.label_map.things, args.panoptic_threshold)
        if checkpoint:
            weights = averaged_weights(checkpoint, args.resume) if args.eval else checkpoint["model"]
            load_model(self.model, weights, args.resume)
        elif self.pretrained:
            load_pretrained(self.model, self.pretrained, self.variant, args, self.label_map)
        elif self.frozen:
            weights = averaged_weights(self.frozen, args.frozen_weights)
            load_model(self.model.detr, detector_weights(weights), args.frozen_weights)
        if not args.eval:
            freeze(self.model, args.freeze)
        if args.sync_bn:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        # A copy, so from before parts of the model are compiled.
        self.average = None if args.ema is None or args.eval else WeightAverage(self.model, args.ema)
        if self.average:
            self.average.prepare(args, self.device)
        prepare(self.model, args, self.device)
        self.criterion.to(self.device)
        self.num_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def wrap_model(self) -> None:
        """Let the processes' models learn together, where they train."""
        args = self.args
        self.wrapped = self.model
        if args.distributed and not args.eval:
            gpus = [self.device] if self.device.type == "cuda" else None
            # Buffers are constants, or running statistics, which training does not read and `share_buffers` shares.
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, device_ids=gpus, broadcast_buffers=False)

    def describe(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Say what will happen; with an optimizer, in training."""
        args, processes = self.args, get_world_size()
        attention = "row-column" if getattr(args, "attention_type", "") == "RCDA" else "multi-head"
        if args.encoder_attention == "enact":
            settings = {name: value for name, value in encoder_settings(args).items() if value}
            if settings["clusters"] == "regions":
                # Regions are an image's own in any case.
                settings.pop("per_image", None)
            attention += f" over ENACT's clusters ({', '.join(f'{name} {value}' for name, value in settings.items())})"
        dilated = " DC5" if args.dilation else ""
        names = [self.label_map.names[label] for label in self.label_map.labels().values()]
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        precision = "float32" if args.amp == "none" else args.amp
        rows = {
            "model": f"{self.variant}, {args.backbone}{dilated}, {self.model.num_queries} queries",
            "encoder attention": attention,
            "parameters": f"{self.num_parameters:,} trained",
            "weights": args.resume
            or args.pretrained
            or args.frozen_weights
            or f"backbone {args.backbone_weights}, the rest random",
            "classes": f"{len(names)} ({shown}), {args.num_classes} labels",
            "device": f"{self.device}, {processes} {'process' if processes == 1 else 'processes'}, {precision}"
            + ", deterministic" * args.deterministic,
        }
        if optimizer:
            rates = ", ".join(f"{g['name']} {g['initial_lr']:g}".strip() for g in optimizer.param_groups)
            batch = self.effective_batch()
            made_of = f"{args.batch_size} images x {args.accumulate} accumulated x {processes} processes"
            rows |= {
                "train images": f"{len(self.train_set):,} with {self.train_set.num_objects:,} objects",
                "effective batch": f"{batch} = {made_of}",
                "learning rates": f"{rates}; {args.lr_schedule} schedule",
                "rate and batch": self.rate_rule(batch),
                "epochs": f"{args.start_epoch} to {args.epochs}, {len(self.train_loader)} batches each",
            }
            if args.frozen_weights:
                rows["frozen"] = "all but the mask head"
            if args.freeze:
                rows["frozen"] = f"what is named with {', '.join(args.freeze)}"
            if args.ema is not None:
                rows["evaluated weights"] = f"averaged over the steps, decay {args.ema:g}"
        truth = "" if args.eval_set == "test" else f" with {self.val_set.num_objects:,} objects"
        rows["evaluated images"] = f"{len(self.val_set):,}{truth}, of {args.eval_set}"
        rows["output"] = str(self.output_dir or "none (--output_dir)")
        logger.info("\n".join(f"{name:<18} {text}" for name, text in rows.items()))
        idle = [f"--{flag}" for flag in (*CLUSTERING_FLAGS, "enact_scale_logits") if getattr(args, flag)]
        if idle and args.encoder_attention != "enact":
            logger.info("note: %s: no effect with --encoder_attention %s", ", ".join(idle), args.encoder_attention)
        if (
            args.backbone_norm == "frozen"
            and args.backbone_weights == "none"
            and not (args.resume or args.pretrained or args.frozen_weights)
        ):
            logger.info("note: a random backbone hardly trains under frozen batch norm; --backbone_norm batch does")

    def effective_batch(self) -> int:
        """Images that make one step of the optimizer, of all processes together."""
        return self.args.batch_size * self.args.accumulate * get_world_size()

    def rate_rule(self, batch: int) -> str:
        """How learning rate and effective batch go together, in words."""
        args, published = self.args, self.args.published_batch
        default = ENACT_LR if args.encoder_attention == "enact" else PLAIN_LR
        rule = f"--lr is taken as it is, whatever the batch; {default:g} was published with {published} images a step"
        if args.lr == default and batch != published:
            # Goyal et al., arXiv:1706.02677; for Adam, Malladi et al., arXiv:2205.10287.
            ratio = batch / published
            linear, root = args.lr * ratio, args.lr * ratio**0.5
            rule += f"; for {batch}, the linear rule gives {linear:.2g}, the square-root rule for Adam {root:.2g}"
        return rule

    def check_same_training(self, checkpoint: dict) -> None:
        """Refuse to go on with what the checkpoint's training did not do.

        Raises:
            UserError: it froze other parts, or averaged weights that would be lost.
        """
        args, saved = self.args, checkpoint.get("args", {})
        frozen = saved.get("freeze") or []
        if sorted(frozen) != sorted(args.freeze):
            asked = f"--freeze {' '.join(frozen)}" if frozen else "no --freeze"
            raise UserError(f"{args.resume}: was trained with {asked}; pass the same, or begin anew with --pretrained")
        if bool(saved.get("frozen_weights")) != bool(args.frozen_weights):
            asked = "--frozen_weights CKPT" if saved.get("frozen_weights") else "no --frozen_weights"
            raise UserError(f"{args.resume}: was trained with {asked}; pass the same, or begin anew with --pretrained")
        if checkpoint.get("model_ema") and not self.average:
            raise UserError(
                f"{args.resume}: holds averaged weights, which would be lost: pass --ema, as then "
                f"({saved.get('ema')}), or begin anew with --pretrained"
            )

    def resume(self, checkpoint: dict, optimization: Optimization) -> None:
        """Put the optimizer, the scaler, the random states and the place in the data where the checkpoint left them."""
        args = self.args
        if "optimizer" not in checkpoint or "epoch" not in checkpoint:
            logger.info("%s has weights alone: training starts from them at epoch %d", args.resume, args.start_epoch)
            return
        self.check_same_training(checkpoint)
        try:
            state = optimizer_state_by_name(checkpoint, self.model, optimization.optimizer)
        except UserError as error:
            raise UserError(f"{args.resume}: {error}") from error
        asked = [(group["name"], group["initial_lr"]) for group in optimization.optimizer.param_groups]
        optimization.optimizer.load_state_dict(state)
        for group, (name, _) in zip(optimization.optimizer.param_groups, asked, strict=True):
            # What other projects save has neither.
            group["name"] = name
            group.setdefault("initial_lr", group["lr"])
        kept = [(group["name"], group["initial_lr"]) for group in optimization.optimizer.param_groups]
        if kept != asked:
            logger.info("note: the checkpoint's learning rates go on, not this command's")
        if self.average and checkpoint.get("model_ema"):
            self.average.load(checkpoint["model_ema"], checkpoint["ema_steps"])
        if checkpoint.get("scaler"):
            optimization.scaler.load_state_dict(checkpoint["scaler"])
        if "random_states" in checkpoint:
            restore_random_states(checkpoint["random_states"][get_rank() % len(checkpoint["random_states"])])
        args.start_epoch = checkpoint["epoch"] + 1
        if checkpoint.get("within_epoch"):
            self.resume_within(WithinEpoch(**checkpoint["within_epoch"]))

    def resume_within(self, place: "WithinEpoch") -> None:
        """Go on in the middle of an epoch, with the images that are left."""
        args, batch = self.args, self.args.batch_size * get_world_size()
        # Whole steps of the optimizer, should the batch be another one than then.
        batches = place.images // batch // args.accumulate * args.accumulate
        same = (place.batch, place.processes) == (batch, get_world_size())
        if same:
            meter = AverageMeter.merged([place.meters[get_rank()]], self.device)
        else:
            meter = AverageMeter.merged(place.meters if is_main_process() else [], self.device)
            logger.info(
                "note: the epoch was begun with batches of %d images in %d processes, now they are of %d in %d: the "
                "images that are left are the same but for some at the cut, the course of the training is not",
                place.batch, place.processes, batch, get_world_size(),
            )  # fmt: skip
        self.begun = (min(batches, len(self.train_loader)), meter, place.seconds)

    def train(self, checkpoint: dict | None) -> None:
        """Train to the last epoch; after each, save, evaluate and log."""
        args = self.args
        optimization = build_optimization(self.model, args, self.device, self.average)
        if checkpoint:
            self.resume(checkpoint, optimization)
        self.describe(optimization.optimizer)
        self.cache_images()
        log = RunLog(self.output_dir)
        self.ap_history = log.ap_history(args.start_epoch)
        begin = time.perf_counter()
        # A run may have been stopped between its checkpoint and its evaluation. The main process has the log.
        if checkpoint and "train_stats" in checkpoint and not gather_objects(log.has_epoch(checkpoint["epoch"]))[0]:
            self.finish_epoch(checkpoint["epoch"], checkpoint["train_stats"], log)
        if args.start_epoch >= args.epochs:
            logger.info(
                "nothing left to train: %d epochs are done, --epochs asks for %d", args.start_epoch, args.epochs
            )
        for epoch in range(args.start_epoch, args.epochs):
            if self.has_stopped_improving():
                break
            self.train_epoch(epoch, optimization, log)
        log.close()
        logger.info("training took %s", timedelta(seconds=round(time.perf_counter() - begin)))

    def train_epoch(self, epoch: int, optimization: Optimization, log: RunLog) -> None:
        """Train on all images, or those that are left of the epoch; save, evaluate and log.

        Raises:
            Stopped: a signal asked for it; all that was done is saved.
        """
        args = self.args
        (first, meter, earlier), self.begun = self.begun, (0, AverageMeter(), 0.0)
        self.train_loader.sampler.set_epoch(epoch)
        self.train_loader.sampler.first = first * args.batch_size
        self.train_set.set_epoch(epoch)
        start_counting_memory(self.device)
        epoch_begin = time.perf_counter() - earlier

        def after_step(batches: int, stop: bool) -> None:
            steps = batches // args.accumulate
            if stop or (args.save_every_steps and steps % args.save_every_steps == 0):
                place = WithinEpoch(
                    images=batches * args.batch_size * get_world_size(),
                    batch=args.batch_size * get_world_size(),
                    processes=get_world_size(),
                    meters=gather_objects(meter.state()),
                    seconds=time.perf_counter() - epoch_begin,
                )
                self.save(epoch - 1, optimization, [LATEST], {"within_epoch": asdict(place)})
            if stop:
                self.name_unreadable(self.train_set)
                raise self.stopped(f"in epoch {epoch}, after {batches} of {len(self.train_loader)} batches")

        stats = train_one_epoch(
            self.wrapped, self.criterion, self.train_loader, optimization, self.device, epoch, args.print_freq, meter,
            first, after_step,
        )  # fmt: skip
        cost = {
            "train_seconds": time.perf_counter() - epoch_begin,
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        self.save(epoch, optimization, [LATEST, *self.numbered(epoch)], {"train_stats": stats})
        self.remove_old()
        unreadable = self.name_unreadable(self.train_set)
        if any(gather_objects(stop_requested() is not None)):
            raise self.stopped(f"after epoch {epoch}, before its evaluation")
        self.finish_epoch(epoch, stats, log, cost | ({"unreadable_images": unreadable} if unreadable else {}))

    def stopped(self, where: str) -> Stopped:
        """What is said when a signal stops the training."""
        saved = "nothing is saved without --output_dir"
        if self.output_dir:
            saved = f"{self.output_dir / LATEST} holds all of it: go on with --auto_resume, or --resume and its path"
        reason = next(name for name in gather_objects(getattr(stop_requested(), "name", None)) if name)
        return Stopped(f"{reason} came; {where}; {saved}")

    def name_unreadable(self, dataset: CocoDetection) -> int:
        """Say which images of a data set could not be read, each once in the run.

        Returns:
            how many there are, over all processes and since the run began.
        """
        bad = sorted(set().union(*gather_objects(dataset.unreadable())))
        new = [i for i in bad if (dataset, i) not in self.named]
        self.named.update((dataset, i) for i in new)
        if new and is_main_process():
            done = "others are in their places" if dataset is self.train_set else "their objects count as not found"
            shown = "".join(f"\n  {dataset.why_unreadable(i)}" for i in new[:MOST_NAMED])
            more = f"\n  and {len(new) - MOST_NAMED} more" if len(new) > MOST_NAMED else ""
            logger.warning(
                "data: %d of %d images in %s cannot be read; %s (--strict_data ends the run instead)%s%s",
                len(bad), len(dataset), dataset.image_folder, done, shown, more,
            )  # fmt: skip
        return len(bad)

    def finish_epoch(
        self, epoch: int, train_stats: dict[str, float], log: RunLog, cost: dict[str, float] | None = None
    ) -> None:
        """Evaluate, where this epoch's turn it is, and log.

        Args:
            epoch: number, from 0.
            train_stats: of `train_one_epoch`.
            log: where to.
            cost: time and memory of the training; None where another process trained.
        """
        stats = {f"train_{name}": value for name, value in train_stats.items()} | (cost or {})
        if (epoch + 1) % self.args.eval_every == 0 or epoch + 1 == self.args.epochs:
            begin = time.perf_counter()
            try:
                test_stats, evaluator, panoptic = self.evaluate()
            except Stopped as stop:
                raise self.stopped(f"in the evaluation of epoch {epoch}, which comes first then") from stop
            figures = self.report(evaluator, panoptic, epoch)
            test_stats["seconds"] = time.perf_counter() - begin
            stats |= {f"test_{name}": value for name, value in test_stats.items()}
            if figures:
                stats |= figures
                self.note_precision(epoch, main_metric(figures) if self.measurable else None)
        log.write(epoch, {**stats, "n_parameters": self.num_parameters})

    def note_precision(self, epoch: int, precision: float | None) -> None:
        """Remember an evaluation's AP; where it is the highest so far, keep its checkpoint as `best.pth`.

        Args:
            epoch: from 0.
            precision: of `main_metric`; None, where it was not measured, counts neither here nor for `--early_stop`.
        """
        if precision is None:
            return
        best = max(self.ap_history, default=-math.inf)
        self.ap_history.append(precision)
        if self.output_dir is None or precision <= best:
            return
        latest = self.output_dir / LATEST
        # A run that goes on from another folder's checkpoint may evaluate that before it writes its own.
        latest = latest if latest.is_file() else Path(self.args.resume)
        if latest.is_file():
            with open(latest, "rb") as source:
                write_file(self.output_dir / BEST, lambda file: shutil.copyfileobj(source, file))
            logger.info("epoch %d has the highest AP so far: kept as %s", epoch, self.output_dir / BEST)

    def has_stopped_improving(self) -> bool:
        """Whether `--early_stop` ends the training, in all processes alike: the main one has the figures."""
        patience, stop = self.args.early_stop, False
        if patience and is_main_process() and self.ap_history:
            best = self.ap_history.index(max(self.ap_history))
            stop = len(self.ap_history) - 1 - best >= patience
            if stop:
                logger.info(
                    "--early_stop: the AP has not risen in the last %d evaluations; the highest is %.3f",
                    len(self.ap_history) - 1 - best, self.ap_history[best],
                )  # fmt: skip
        return gather_objects(stop)[0]

    def numbered(self, epoch: int) -> list[str]:
        """The name of the checkpoint that stays when an epoch is done, where one does: every `--save_every` epochs, and
        before the learning rate drops."""
        args = self.args
        before, after = (drops_until(done, args.lr_drop, args.lr_drop_epochs) for done in (epoch, epoch + 1))
        drops = args.lr_schedule == "step" and after > before
        return [f"checkpoint{epoch:04}.pth"] if drops or (epoch + 1) % args.save_every == 0 else []

    def remove_old(self) -> None:
        """With `--keep`, remove all numbered checkpoints but the latest."""
        if self.args.keep and self.output_dir and is_main_process():
            numbered = [path for path in self.output_dir.iterdir() if NUMBERED.fullmatch(path.name)]
            numbered.sort(key=lambda path: int(NUMBERED.fullmatch(path.name)[1]))
            for path in numbered[: -self.args.keep]:
                path.unlink()

    def save(self, epoch: int, optimization: Optimization, names: list[str], more: dict) -> None:
        """Write a checkpoint, whole or not at all.

        Args:
            epoch: the last one that is done, -1 before the first.
            optimization: whose state goes in.
            names: of the files.
            more: what else goes in.

        Raises:
            UserError: it cannot be written; in all processes.
        """
        states = gather_objects(random_states())
        if self.output_dir is None:
            return
        with failing_together():
            if not is_main_process():
                return
            if self.average:
                more = {**more, "model_ema": self.average.model.state_dict(), "ema_steps": self.average.steps}
            content = {
                "model": self.model.state_dict(),
                "optimizer": optimization.optimizer.state_dict(),
                "scaler": optimization.scaler.state_dict(),
                "epoch": epoch,
                "args": dict(vars(self.args)),
                "variant": self.variant,
                "label_map": self.label_map.to_dict(),
                "random_states": states,
                **more,
            }
            for name in names:
                save_checkpoint(self.output_dir / name, content)

    def evaluate(self) -> tuple[dict[str, float], CocoBoxEvaluator, PanopticEvaluator | None]:
        """Losses on the images to evaluate on, where they have annotations, and the evaluators with what was found: of
        boxes and masks, and of segments where the model gives some."""
        evaluator = CocoBoxEvaluator(self.label_map)
        panoptic = PanopticEvaluator() if "panoptic" in self.postprocessors else None
        model = self.average.model if self.average else self.model
        share_buffers(model)
        stats = evaluate(
            model,
            None if self.args.eval_set == "test" else self.criterion,
            self.postprocessors,
            self.val_loader,
            evaluator,
            self.device,
            self.args.amp,
            self.args.print_freq,
            panoptic,
        )
        self.name_unreadable(self.val_set)
        return stats, evaluator, panoptic

    def report(
        self,
        evaluator: CocoBoxEvaluator,
        panoptic: PanopticEvaluator | None,
        epoch: int | None,
        per_class: bool = False,
    ) -> dict[str, Any]:
        """Print the figures and write them to `evaluation.json`, which the next evaluation replaces; with `per_class`
        also print each class's and write `results.json`, and what a panoptic model found to `panoptic_results/`.

        Without ground truth there are no figures.

        Args:
            evaluator: with the detections.
            panoptic: with the segments; None where the model gives none.
            epoch: that the weights come from; None where the checkpoint does not say.
            per_class: see above.

        Returns:
            the figures under the log's names: COCO's twelve of boxes and of masks as lists, PQ, SQ and RQ as dicts. In
            the main process alone; empty in the others and without ground truth.
        """
        if not is_main_process():
            return {}
        figures: dict[str, Any] = {}
        if self.ground_truth is not None:
            record, figures["test_coco_eval_bbox"] = self.compute_metrics(evaluator, per_class)
            if "segm" in self.postprocessors:
                logger.info("masks:")
                record["masks"], figures["test_coco_eval_masks"] = self.compute_metrics(
                    evaluator, per_class, masks=True
                )
            if panoptic is not None:
                quality = panoptic.evaluate(self.panoptic_truth)
                logger.info("panoptic quality:\n%s", panoptic_text(quality))
                record["panoptic"] = panoptic_record(quality)
                figures |= panoptic_metrics(record["panoptic"])
            if self.output_dir:
                source = {"set": self.args.eval_set, "epoch": epoch}
                if self.args.eval:
                    source["checkpoint"] = self.args.resume or self.args.pretrained
                text = json.dumps({**source, **record})
                write_file(self.output_dir / EVALUATION, lambda file: file.write(text.encode()))
        if per_class and self.output_dir:
            path = self.output_dir / "results.json"
            logger.info("%d detections written to %s", evaluator.write_results(path), path)
            if panoptic is not None:
                folder, truth = self.output_dir / FOLDER, self.panoptic_truth
                count = panoptic.write_results(folder, truth.images, truth.categories)
                logger.info("segments of %d images written to %s", count, folder)
        return figures

    def compute_metrics(
        self, evaluator: CocoBoxEvaluator, per_class: bool, masks: bool = False
    ) -> tuple[dict, list[float]]:
        """Compute and print COCO's figures of boxes, or of masks: the `evaluation_record`, and the twelve figures."""
        evaluation = evaluator.evaluate(self.ground_truth, masks)
        logger.info("%s", metrics_text(evaluation))
        record = evaluation_record(evaluation)
        if per_class:
            logger.info("%s", per_class_text(record))
        return record, [float(value) for value in evaluation.stats]
