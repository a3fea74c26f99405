"""Checks that refuse impossible combinations of flags before any work starts, by a UserError that says what to do."""

import importlib.util
import math

import torch

from enact_common.attention.rivals import RIVALS
from enact_common.cli.flags import AUTO_BATCH, COCO, PANOPTIC, TRACKERS
from enact_common.models.backbone import ALL_STAGES, SHALLOW_BACKBONES, stride_of
from enact_common.models.position_encoding import PositionEmbeddingLearned
from enact_common.utils.device import TORCH_VERSION
from enact_common.utils.errors import UserError

# PyTorch 2.4 fails when a compiled module is recomputed; this is the first later release that was tested.
COMPILED_AND_RECOMPUTED = (2, 15)


def check_arguments(args) -> None:
    """Refuse flags that no variant can work with."""
    if args.frozen_weights and not args.masks:
        raise UserError(
            "--frozen_weights freezes a detector and trains a mask head on it: pass --masks too, or use --pretrained "
            "to fine-tune the checkpoint"
        )
    if args.frozen_weights and args.pretrained:
        raise UserError(
            "--frozen_weights and --pretrained both set the initial weights: leave one of them out. --pretrained loads "
            "the tensors that fit and trains the whole model, --frozen_weights trains the mask head only"
        )
    if args.masks and args.hidden_dim < 16:
        raise UserError(f"--hidden_dim {args.hidden_dim}: the mask head (--masks) needs 16 or more")
    if args.dataset_file not in (COCO, PANOPTIC):
        raise UserError(f"--dataset_file {args.dataset_file}: no such kind of data set; use {COCO} or {PANOPTIC}")
    if (args.dataset_file == PANOPTIC) != bool(args.coco_panoptic_path):
        raise UserError(
            f"--dataset_file {PANOPTIC} and --coco_panoptic_path DIR go together: --coco_path holds the images, "
            "--coco_panoptic_path their panoptic annotations; pass both or neither"
        )
    if args.dataset_file == PANOPTIC and (args.train_images or args.val_images or args.eval_set == "test"):
        raise UserError(
            f"--dataset_file {PANOPTIC} needs COCO's layout and annotations: pass --coco_path, and leave out "
            "--train_images, --val_images and --eval_set test"
        )
    if args.dilation and args.backbone in SHALLOW_BACKBONES:
        raise UserError(
            f"--backbone {args.backbone} has no dilated form: pass --no-dilation, or --backbone resnet50 or resnet101"
        )
    if args.backbone_stages < len(ALL_STAGES) and (args.dilation or args.masks):
        flag = "--dilation" if args.dilation else "--masks"
        raise UserError(
            f"--backbone_stages {args.backbone_stages}: {flag} needs all {len(ALL_STAGES)}; leave one of them out"
            + (", or pass --no-dilation" if args.dilation else "")
        )
    if args.compile and args.checkpoint_activations and TORCH_VERSION < COMPILED_AND_RECOMPUTED:
        needed = ".".join(map(str, COMPILED_AND_RECOMPUTED))
        raise UserError(
            f"--compile with --checkpoint_activations needs PyTorch {needed}, this is {torch.__version__}: leave one "
            "of them out"
        )
    if args.hidden_dim % args.nheads or args.hidden_dim % 4:
        raise UserError(
            f"--hidden_dim {args.hidden_dim}: must be a multiple of --nheads ({args.nheads}) and of 4, because "
            "attention heads and position encodings divide it"
        )
    if not args.smoothing_sigma > 1 / 3:
        raise UserError(f"--smoothing_sigma {args.smoothing_sigma}: must be above 1/3 token")
    if not 0 <= args.dropout < 1:
        raise UserError(f"--dropout {args.dropout}: must be a probability below 1")
    if args.max_size < max(*args.train_sizes, args.eval_size):
        raise UserError(
            f"--max_size {args.max_size}: must be at least the largest of --train_sizes and --eval_size, "
            f"{max(*args.train_sizes, args.eval_size)}"
        )
    if args.backbone_norm == "batch" and args.backbone_weights == "none" and args.lr_backbone <= 0:
        raise UserError("--lr_backbone 0 would freeze a random backbone: pass a learning rate, for example 1e-4")
    if args.sync_bn and args.backbone_norm != "batch":
        raise UserError(
            f"--sync_bn has no effect with --backbone_norm {args.backbone_norm}: no batch norm trains; leave it out"
        )
    if args.save_every_steps and not args.output_dir:
        raise UserError("--save_every_steps needs a folder for the checkpoints: pass --output_dir DIR")
    check_trackers(args)
    check_auto_batch(args)
    if args.auto_resume and not args.output_dir:
        raise UserError("--auto_resume needs the folder of the run to resume: pass --output_dir DIR")
    if args.eval_set == "test" and not args.eval:
        raise UserError(
            "--eval_set test: test images have no annotations, so they cannot validate a training; pass "
            "--eval --resume CKPT, or another --eval_set"
        )
    check_own_data(args)
    if args.eval and not (args.resume or args.pretrained):
        raise UserError(
            "--eval needs the checkpoint to evaluate: pass --resume CKPT; or --pretrained CKPT, to evaluate a model of "
            "other flags with the tensors that fit"
        )
    if args.lr_drop_epochs and args.lr_schedule != "step":
        raise UserError(f"--lr_drop_epochs has no effect with --lr_schedule {args.lr_schedule}: leave one of them out")
    if args.eval_set == "test" and not args.output_dir:
        raise UserError("--eval_set test needs a folder for results.json, its only result: pass --output_dir DIR")
    if args.set_cost_class == args.set_cost_bbox == args.set_cost_giou == 0:
        raise UserError("--set_cost_class, --set_cost_bbox and --set_cost_giou are all 0: matching needs one above 0")


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a folder of that name without code, such as W&B's `wandb/`, does not count."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # sys.modules holds None or a module without a spec
        return False
    return spec is not None and spec.origin is not None


def check_trackers(args) -> None:
    """Refuse `--log` without an output folder or without a tracker's package. `--eval` ignores the flag, which a
    training's `config.yaml` brings along."""
    if args.eval:
        return
    if args.log and not args.output_dir:
        raise UserError(f"--log {' '.join(args.log)}: needs a folder for the run's files: pass --output_dir DIR")
    for name in args.log or ():
        package, extra = TRACKERS[name]
        if not is_installed(package):
            raise UserError(f"--log {name}: {package} is not installed: pip install 'enact-detection[{extra}]'")


def check_auto_batch(args) -> None:
    """Refuse `--batch_size auto` with flags that it sets or cannot measure, and its own flag without it."""
    if args.batch_size != AUTO_BATCH:
        if args.effective_batch_size:
            raise UserError(
                f"--effective_batch_size needs --batch_size {AUTO_BATCH}; else the images per step are --batch_size "
                "times --accumulate"
            )
    elif args.accumulate != 1:
        raise UserError(
            f"--batch_size {AUTO_BATCH} sets --accumulate itself, not to {args.accumulate}: leave it out (pass "
            "--accumulate 1 if it comes from --config), and pass --effective_batch_size N, the images per step"
        )
    elif args.eval or args.compile:
        flag = "--eval" if args.eval else "--compile"
        raise UserError(
            f"--batch_size {AUTO_BATCH} measures a training step that is not compiled: pass a number with {flag}"
        )


def refuse_masks(args) -> None:
    """Refuse masks, for variants whose original has no mask head."""
    if args.masks or args.frozen_weights or args.dataset_file == PANOPTIC:
        raise UserError(
            f"--masks, --frozen_weights, --dataset_file {PANOPTIC}: only DETR has a mask head; this model was "
            "published for boxes only. Run DETR-ENACT/main.py, or leave the flags out"
        )


def refuse_rivals_of_row_column_attention(args) -> None:
    """Refuse rivals of ENACT in Anchor DETR's row-column attention, whose keys are rows and columns."""
    if args.encoder_attention in RIVALS and args.attention_type == "RCDA":
        raise UserError(
            f"--encoder_attention {args.encoder_attention} works on attention between cells, not on row-column "
            "attention: pass --attention_type nn.MultiheadAttention"
        )


def check_own_data(args) -> None:
    """Refuse a data set of which only images or only annotations are given."""
    needed = [args.eval_set] if args.eval else ["train", args.eval_set]
    own = {split: vars(args).get(f"{split}_images") for split in needed}
    for split in ("train", "val"):
        pair = {flag: getattr(args, flag) for flag in (f"{split}_images", f"{split}_annotations")}
        if any(pair.values()) and not all(pair.values()):
            (missing,) = (flag for flag, value in pair.items() if not value)
            raise UserError(f"--{missing} is missing: your own images and annotations must be given together")
    if any(own.values()) and not all(own.values()):
        missing = next(split for split, folder in own.items() if not folder)
        raise UserError(f"--{missing}_images is missing: pass your own images to train on and to evaluate on together")
    if not any(own.values()) and not args.coco_path:
        raise UserError(
            "--coco_path is missing: pass the folder with train2017, val2017 and annotations, or with a Roboflow "
            "export's train and valid; or --train_images, --train_annotations, --val_images and --val_annotations"
        )


def check_position_embedding(args) -> None:
    """Refuse feature maps that are larger than the learned position embedding."""
    cells = math.ceil(args.max_size / stride_of(args))
    if args.position_embedding == "learned" and cells > PositionEmbeddingLearned.MAX_CELLS:
        raise UserError(
            f"--position_embedding learned covers {PositionEmbeddingLearned.MAX_CELLS} rows and columns of the feature "
            f"map, --max_size {args.max_size} needs {cells}: use sine, a smaller --max_size, or --no-dilation"
        )
