"""The set-up of a training or an evaluation before its first batch: checkpoints, data sets and the model."""

import argparse
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from enact_common.checkpoints.contents import averaged_weights, known_variant
from enact_common.checkpoints.files import (
    BEST,
    LATEST,
    check_model_flags,
    detector_weights,
    load_checkpoint,
    load_model,
    saved_clustering_flags,
)
from enact_common.checkpoints.pretrained import check_pretrained, load_pretrained
from enact_common.cli.flags import PANOPTIC, with_flags
from enact_common.data.build import data_files
from enact_common.data.cache import cache_images
from enact_common.data.categories import LabelMap
from enact_common.data.checks.rules import NOTHING_TO_MEASURE, quick_checks
from enact_common.data.coco import CocoDetection
from enact_common.data.loading import make_loader
from enact_common.data.panoptic import PanopticTruth
from enact_common.models.backbone import load_backbone_weights
from enact_common.training.averaging import WeightAverage
from enact_common.training.optimization import freeze
from enact_common.utils.acceleration import prepare
from enact_common.utils.distributed import failing_together, get_world_size, is_distributed, is_main_process
from enact_common.utils.errors import UserError

logger = logging.getLogger("enact")


@dataclass(frozen=True)
class Sources:
    """The checkpoints of `--resume`, `--pretrained` and `--frozen_weights` that a run starts from."""

    resumed: dict | None
    pretrained: dict | None
    frozen: dict | None

    def saved_args(self) -> dict:
        """Return the arguments with which the loaded weights were trained; empty without a checkpoint."""
        source = self.resumed or self.pretrained or self.frozen
        return source.get("args", {}) if source else {}


def load_sources(variant: str, args: argparse.Namespace) -> Sources:
    """Read the checkpoints that the command line names; a resumed run needs only its own checkpoint.

    Raises:
        UserError: a file is not a checkpoint of this variant.
    """
    resumed = load_checkpoint(args.resume, to_resume=not args.eval) if args.resume else None
    pretrained = load_checkpoint(args.pretrained) if args.pretrained and not resumed else None
    frozen = load_checkpoint(args.frozen_weights) if args.frozen_weights and not resumed else None
    if pretrained:
        check_pretrained(pretrained, variant, args)
    if resumed:
        known_variant(resumed, args.resume)
    if resumed and resumed.get("variant", variant) != variant:
        raise UserError(
            f"{args.resume}: is a checkpoint of the variant {resumed['variant']}, not of {variant}; run that variant"
        )
    return Sources(resumed, pretrained, frozen)


def check_paths(args: argparse.Namespace) -> Path | None:
    """Refuse missing data, and an output folder of another run; return the folder, None without `--output_dir`."""
    for split in (args.eval_set,) if args.eval else ("train", args.eval_set):
        data_files(args, split)
    if not args.output_dir:
        return None
    output_dir = Path(args.output_dir)
    latest = output_dir / LATEST
    goes_on = args.resume and Path(args.resume).resolve().parent == output_dir.resolve()
    if latest.exists() and not goes_on and not args.eval:
        raise UserError(
            f"--output_dir {args.output_dir}: already holds a run; continue it with --resume {latest}, or choose "
            "another folder"
        )
    return output_dir


@dataclass
class Data:
    """The data sets of a run and their loaders.

    Attributes:
        train_set, train_loader: the images to train on; None in an evaluation.
        val_set, val_loader: the images to evaluate on (`--eval_set`).
        label_map: the label of each category.
        ground_truth: pycocotools' ground truth of `val_set`; None for test images, and in all processes except the
            main one.
        panoptic_truth: the segments of `val_set`; None without panoptic annotations.
    """

    train_set: CocoDetection | None
    train_loader: DataLoader | None
    val_set: CocoDetection
    val_loader: DataLoader
    label_map: LabelMap
    ground_truth: object | None
    panoptic_truth: PanopticTruth | None

    def with_batches(self, args: argparse.Namespace, device: torch.device) -> "Data":
        """Return the data of a training with loaders of another `--batch_size`."""
        return replace(
            self,
            train_loader=make_loader(self.train_set, args, device, train=True),
            val_loader=make_loader(self.val_set, args, device, train=False),
        )

    def cache(self, mode: str | None) -> None:
        """Read all images into memory (`--cache_mode`), after all checks and before the loaders' workers start."""
        if mode:
            with failing_together():
                cache_images([data for data in (self.train_set, self.val_set) if data is not None], mode)


def load_data(args: argparse.Namespace, build_dataset: Callable, sources: Sources, device: torch.device) -> Data:
    """Build the data sets with the checkpoint's label map, or else with the annotations' label map.

    Raises:
        UserError: the annotations are invalid, or do not fit the flags or the checkpoint.
    """
    label_map = None
    labelled = sources.resumed or sources.frozen
    if labelled and "label_map" in labelled:
        label_map = LabelMap.from_dict(labelled["label_map"])
    train_set: CocoDetection | None = None
    if not args.eval:
        train_set = build_dataset("train", args, label_map)
        label_map = train_set.label_map
    val_set: CocoDetection = build_dataset("val", args, label_map)
    label_map = val_set.label_map
    if args.num_classes not in (None, label_map.num_classes):
        raise UserError(
            f"--num_classes {args.num_classes}: {args.resume or args.frozen_weights} was trained with "
            f"{label_map.num_classes}; leave the flag out"
        )
    # Only the main process computes metrics.
    ground_truth = val_set.coco_api() if args.eval_set != "test" and is_main_process() else None
    panoptic_truth = val_set.truth() if args.dataset_file == PANOPTIC else None
    if panoptic_truth:
        # Labels are category ids.
        things = sorted(category["id"] for category in panoptic_truth.categories if category["isthing"])
        label_map = replace(label_map, things=tuple(things))
    val_loader = make_loader(val_set, args, device, train=False)
    train_loader = make_loader(train_set, args, device, train=True) if train_set else None
    if train_set and len(train_loader) == 0:
        raise UserError(
            f"--batch_size {args.batch_size}: a batch in each of {get_world_size()} process(es) needs more than the "
            f"{len(train_set)} images to train on; pass a smaller --batch_size"
        )
    return Data(train_set, train_loader, val_set, val_loader, label_map, ground_truth, panoptic_truth)


def is_measurable(data: Data, args: argparse.Namespace, panoptic: bool) -> bool:
    """Whether the validation images have objects, which AP and PQ need; warns if they have none.

    Returns True without ground truth: for test images, and in all processes except the main one.

    Raises:
        UserError: `--early_stop` is given, but its metric cannot be computed.
    """
    if data.ground_truth is None:
        return True
    objects = data.ground_truth.dataset["annotations"]
    if panoptic:
        objects = [segment for segments in data.panoptic_truth.segments.values() for segment in segments]
    if any(not thing.get("iscrowd") for thing in objects):
        return True
    metric = "PQ" if panoptic else "AP"
    limited = f" that --limit_val {args.limit_val} leaves" if args.limit_val else ""
    file, images = data.val_set.annotation_file, len(data.val_set)
    why = f"{file} has no objects (crowds do not count) in the {images} images{limited}"
    if args.early_stop and not args.eval:
        raise UserError(
            f"--early_stop {args.early_stop}: {metric} cannot be computed, because {why}; leave the flag out, or "
            "evaluate on images with objects"
        )
    no_best = "" if args.eval else f"; {BEST} is not written"
    logger.warning("data: %s cannot be computed (COCO's metrics are -1), because %s%s", metric, why, no_best)
    return False


def check_data(data: Data, args: argparse.Namespace, num_queries: int) -> None:
    """Run the quick data checks in the main process: log doubtful data, refuse data that no training can learn from.

    Raises:
        UserError: a check failed.
    """
    if not is_main_process():
        return
    # With `--eval_set train` both splits are one set; check the part that is trained on.
    datasets = {"train": (data.train_set, args.limit_train)}
    if args.eval_set != "train":
        datasets[args.eval_set] = (data.val_set, args.limit_val)
    # With `--limit_*`, files past the limit may be missing.
    limited = {split for split, (_, limit) in datasets.items() if limit}
    # The checks read only COCO's box format, so panoptic annotations are converted first.
    parsed = set(datasets) if args.dataset_file == PANOPTIC else limited
    parts = {split: datasets[split][0].coco_api().dataset for split in parsed}
    files = {split: (dataset.image_folder, dataset.annotation_file) for split, (dataset, _) in datasets.items()}
    for finding in quick_checks(files, num_queries, parts, data.label_map, limited):
        if finding.text != NOTHING_TO_MEASURE:
            logger.info("data: %s", finding)


@dataclass
class Network:
    """A detector with its loss, post-processing and EMA weights.

    Attributes:
        model: on its device; compiled with `--compile`.
        wrapped: the model, or the model in DistributedDataParallel.
        average: the EMA weights (`--ema`); None without EMA.
        num_parameters: trained parameters.
    """

    model: nn.Module
    wrapped: nn.Module
    criterion: nn.Module
    postprocessors: dict[str, nn.Module]
    average: WeightAverage | None
    num_parameters: int


def resolve_model_flags(args: argparse.Namespace, sources: Sources, label_map: LabelMap) -> argparse.Namespace:
    """Return the arguments with the number of labels, and with the checkpoint's values of `CLUSTERING_FLAGS`.

    Raises:
        UserError: the checkpoint's model was built with other flags.
    """
    args = with_flags(args, num_classes=label_map.num_classes)
    saved = sources.saved_args()
    if sources.resumed:
        check_model_flags(args.resume, saved, args)
    elif sources.frozen and not sources.pretrained:
        # A detector's checkpoint has no mask head yet, so its `--masks` may differ.
        check_model_flags(args.frozen_weights, {**saved, "masks": None}, args)
    if sources.resumed or sources.pretrained or sources.frozen:
        args = with_flags(args, **saved_clustering_flags(saved, args))
    return args


def load_network(
    variant: str,
    args: argparse.Namespace,
    build_model: Callable,
    sources: Sources,
    label_map: LabelMap,
    device: torch.device,
) -> Network:
    """Build the model and load the weights of the checkpoint, if there is one."""
    model, criterion, postprocessors = build_model(args)
    if "panoptic" in postprocessors:
        postprocessors["panoptic"].things = frozenset(label_map.things)
    if sources.resumed:
        weights = averaged_weights(sources.resumed, args.resume) if args.eval else sources.resumed["model"]
        load_model(model, weights, args.resume)
    elif sources.pretrained:
        load_pretrained(model, sources.pretrained, variant, args, label_map)
    elif sources.frozen:
        weights = averaged_weights(sources.frozen, args.frozen_weights)
        load_model(model.detr, detector_weights(weights), args.frozen_weights)
    if not args.eval:
        freeze(model, args.freeze)
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # Copy the model before it is compiled: the copy must not call the original's compiled methods.
    average = None if args.ema is None or args.eval else WeightAverage(model, args.ema)
    if average:
        # Not compiled, since it only evaluates.
        prepare(average.model, with_flags(args, compile=False), device)
    prepare(model, args, device)
    criterion.to(device)
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Network(model, model, criterion, postprocessors, average, num_parameters)


def wrap_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model, wrapped in DistributedDataParallel if there are several processes."""
    if not is_distributed():
        return model
    gpus = [device] if device.type == "cuda" else None
    # No broadcast: buffers are constants, or running statistics, which only evaluation reads (`share_buffers`).
    parameters = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    # Newer versions of PyTorch deprecate the old name.
    broadcast = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    return nn.parallel.DistributedDataParallel(model, device_ids=gpus, **{broadcast: False})


def check_backbone_weights(args: argparse.Namespace, sources: Sources) -> None:
    """Load the backbone's weights once, to fail before the annotations are read."""
    if not (sources.resumed or sources.pretrained or sources.frozen):
        load_backbone_weights(args.backbone, args.backbone_weights)
