"""The command line that the variants share. Each variant's `main.py` adds its own flags and sets its defaults."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from enact_common.attention.clustering import CLUSTERS
from enact_common.attention.clusters import DEFAULT_SHARE
from enact_common.attention.hilbert import ORDERS, ROWS
from enact_common.attention.kernels import AUTO, KERNELS
from enact_common.cli.checks import check_arguments, check_position_embedding
from enact_common.cli.config import add_opposites, read_config
from enact_common.cli.flags import AUTO_BATCH, COCO, ENACT_LR, LOSSES, MODEL, PANOPTIC, PLAIN_LR, TRACKERS
from enact_common.cli.program import Parser
from enact_common.cli.types import (
    HelpFormatter,
    batch_size,
    boolean,
    decay,
    fraction,
    natural_int,
    non_negative_float,
    positive_int,
)
from enact_common.models.backbone import ALL_STAGES, BACKBONES, NORMS
from enact_common.models.layers import ENCODER_ATTENTIONS
from enact_common.models.segmentation import PostProcessPanoptic
from enact_common.utils.device import AMP_DTYPE
from enact_common.utils.errors import UserError

LR_SCHEDULES = ("step", "cosine")
CACHE_MODES = ("encoded", "decoded")

# Averages over about a thousand steps: a few epochs of a small data set, a hundredth of a training on COCO.
EMA_DECAY = 0.999


class VariantParser(Parser):
    """A parser with two dependent defaults: encoder attentions other than ENACT set the plain models' learning rate
    unless `--lr` is given, and `--config FILE` sets flags from a file that the command line overrides.

    Attributes:
        checks: functions of the parsed arguments that raise a UserError; `check` calls them.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.checks: list[Callable[[argparse.Namespace], None]] = []
        # Prefix of error messages: the config file and key whose words are being parsed.
        self.origin = ""

    def check(self, args: argparse.Namespace) -> None:
        """Refuse flags that cannot work, before any work starts; the UserError names the flag and says what to do."""
        for check in self.checks:
            check(args)

    def group(self, title: str):
        """Return the argument group with this title, so that a variant can add its own flags."""
        return {group.title: group for group in self._action_groups}[title]

    def parse_known_args(self, args=None, namespace=None):
        add_opposites(self)
        words = sys.argv[1:] if args is None else list(args)
        parsed, rest = super().parse_known_args(words, namespace)
        if getattr(parsed, "config", None):
            # The last value of a repeated flag counts, so the command line overrides the file.
            words = [*self.config_words(parsed.config), *words]
            parsed, rest = super().parse_known_args(words, namespace)
        if namespace is None and getattr(parsed, "encoder_attention", "enact") != "enact":
            parsed, rest = super().parse_known_args(words, argparse.Namespace(lr=PLAIN_LR))
        # The other flags now hold the file's settings; checkpoints and logs need not name the file.
        vars(parsed).pop("config", None)
        return parsed, rest

    def config_words(self, name: str) -> list[str]:
        """Return a config file as command-line words, each checked by its flag's type; exits if one is wrong."""
        try:
            settings = read_config(name, self)
        except UserError as error:
            self.exit(2, f"{self.prog}: error: {error}\n")
        for key, words in settings:
            self.origin = f"--config {name}: {key}: "
            super().parse_known_args(words, argparse.Namespace())
            self.origin = ""
        return [word for _, words in settings for word in words]

    def error(self, message: str) -> NoReturn:
        super().error(self.origin + message)


def common_parser(description: str) -> VariantParser:
    """Return a parser with the flags of all variants, with DETR's defaults where variants differ."""
    parser = VariantParser(description=description, formatter_class=HelpFormatter)
    # Images per step in the published trainings with ENACT. Not a flag: the start-up summary compares --lr with it.
    parser.set_defaults(published_batch=8)
    add_data_flags(parser.add_argument_group("data"))
    add_model_flags(parser.add_argument_group(MODEL))
    add_loss_flags(parser.add_argument_group(LOSSES))
    add_training_flags(parser.add_argument_group("training"))
    add_segmentation_flags(parser.add_argument_group("segmentation"))
    add_run_flags(parser.add_argument_group("run"))
    parser.checks.append(check_arguments)
    return parser


def add_query_flags(parser: VariantParser, num_queries: int) -> None:
    """Add the flags that DETR and Conditional DETR share: learned queries, position embeddings and pre-norm."""
    group = parser.group(MODEL)
    group.add_argument(
        "--position_embedding", type=str, default="sine", choices=("sine", "learned"),
        help="position embedding of the feature map",
    )  # fmt: skip
    group.add_argument(
        "--num_queries", type=positive_int, default=num_queries, metavar="N",
        help="object queries, the most objects that an image can have",
    )  # fmt: skip
    group.add_argument("--pre_norm", action="store_true", help="apply layer norm before each block instead of after it")
    parser.checks.append(check_position_embedding)


def add_focal_flags(parser: VariantParser) -> None:
    """Add the flags of a focal classification loss, and set its class matching cost."""
    group = parser.group(LOSSES)
    group.add_argument("--cls_loss_coef", type=non_negative_float, default=2, metavar="W", help="loss weight: class")
    group.add_argument(
        "--focal_alpha", type=fraction, default=0.25, metavar="A",
        help="focal loss: weight A of the object's class, and 1 - A of all other classes; 0 to 1",
    )  # fmt: skip
    parser.set_defaults(set_cost_class=2)


def add_data_flags(group) -> None:
    """Add the flags of the images: folders, sizes, augmentation."""
    add = group.add_argument
    add("--dataset_file", default=COCO, help=f"kind of data set: {COCO} or {PANOPTIC}")
    add(
        "--coco_path", type=str, metavar="DIR",
        help="folder with train2017/, val2017/ (or images/train2017, ...) and annotations/instances_*2017.json; or a "
        "Roboflow export: train/, valid/ (or val/), test/, each with images and _annotations.coco.json",
    )  # fmt: skip
    for split, purpose in (("train", "train on"), ("val", "evaluate on")):
        add(
            f"--{split}_images", type=str, metavar="DIR",
            help=f"folder of images to {purpose}, for data not in COCO's layout; takes precedence over --coco_path",
        )  # fmt: skip
        add(f"--{split}_annotations", type=str, metavar="FILE", help=f"COCO-format JSON of --{split}_images")
    add(
        "--num_classes", type=positive_int, metavar="N",
        help="number of labels; default: 91 for COCO's categories, whose labels are their ids (only person, id 1, "
        "needs 2), else the number of categories in the annotations",
    )  # fmt: skip
    add(
        "--train_sizes", type=positive_int, nargs="+", metavar="PIXELS", default=list(range(480, 801, 32)),
        help="shorter sides in training, one drawn per image; the crops of the augmentation scale with the largest",
    )  # fmt: skip
    add("--eval_size", type=positive_int, default=800, metavar="PIXELS", help="shorter side in evaluation")
    add("--max_size", type=positive_int, default=1333, metavar="PIXELS", help="upper limit of the longer side")
    add("--limit_train", type=positive_int, metavar="N", help="train on the first N images only")
    add("--limit_val", type=positive_int, metavar="N", help="evaluate on the first N images only")
    add(
        "--eval_set", choices=("val", "train", "test"), default="val",
        help="images to evaluate on; train measures how well the training images were learned; test has no "
        "annotations, and --eval writes results.json for COCO's evaluation server",
    )  # fmt: skip
    add(
        "--remove_difficult", action="store_true",
        help='treat annotations with "difficult": 1 (Pascal VOC) as crowds: ignored in training and evaluation',
    )  # fmt: skip
    add(
        "--cache_mode", nargs="?", choices=CACHE_MODES, const="encoded", default=False,
        help="read the images once and keep them in memory, one copy per torchrun process: as files (encoded, also "
        "without a value), or as pixels (decoded), five to ten times as large but decoded only once; default: read "
        "from disk in every epoch",
    )  # fmt: skip
    add(
        "--strict_data", action="store_true",
        help="stop at the first unreadable image; default: replace it in training, count its objects as missed in "
        "evaluation, and stop if most images are unreadable",
    )  # fmt: skip
    add(
        "--no_augmentation", dest="augmentation", action="store_false",
        help="train on whole images at --eval_size: no flips, scales or crops",
    )  # fmt: skip


def add_model_flags(group) -> None:
    """Add the flags of the network."""
    add = group.add_argument
    add(
        "--encoder_attention", choices=ENCODER_ATTENTIONS, default="enact",
        help="encoder self-attention: ENACT's entropy-based clusters, the original model's plain attention (mhsa), or "
        "a rival of ENACT (docs/method/rivals.md)",
    )  # fmt: skip
    add(
        "--smoothing_sigma", type=float, default=3.0, metavar="TOKENS",
        help="ENACT: standard deviation of the Gaussian that smooths the entropy; larger gives fewer clusters",
    )  # fmt: skip
    add(
        "--enact_clusters", choices=CLUSTERS,
        help="ENACT: pool fixed-length windows, as long as the average region of the entropy; or the regions "
        "themselves; or clusters of equal information, as many as --enact_max_clusters; default: the checkpoint's, "
        f"else {CLUSTERS[0]}",
    )  # fmt: skip
    add(
        "--enact_order", choices=ORDERS,
        help="ENACT: order of the tokens, row by row or along a Hilbert curve, which makes clusters compact patches; "
        f"default: the checkpoint's, else {ROWS}",
    )  # fmt: skip
    add(
        "--enact_per_image", action=argparse.BooleanOptionalAction, default=None,
        help="ENACT: compute the window length per image instead of per batch; default: the checkpoint's, else no",
    )  # fmt: skip
    add(
        "--enact_mask_padding", action=argparse.BooleanOptionalAction, default=None,
        help="ENACT: apply the padding mask, so that padding is not scored, clustered or attended to; default: the "
        "checkpoint's, else no",
    )  # fmt: skip
    add(
        "--enact_max_clusters", type=natural_int, metavar="M",
        help="ENACT: upper limit of clusters, for images of any size; clusters grow to meet it; 0 sets no limit, or a "
        f"{DEFAULT_SHARE}th of the tokens with --enact_clusters equal; default: the checkpoint's, else 0",
    )  # fmt: skip
    add(
        "--enact_temperature", type=non_negative_float, metavar="T",
        help="ENACT: pooling weights are a softmax of each token's information divided by T times the image's mean "
        "information, so that informative tokens weigh more; 0 uses the information in bits, as published, which makes "
        "the weights almost equal; default: the checkpoint's, else 0",
    )  # fmt: skip
    add(
        "--enact_kernels", choices=KERNELS,
        help="ENACT, and Anchor DETR's row-column attention: compute clusters and products in PyTorch (torch) or with "
        "Triton's kernels on a GPU (triton), where they cover the settings (docs/dev/kernels.md); auto is torch until "
        f"GPUs have confirmed the kernels; default: the checkpoint's, else {AUTO}",
    )  # fmt: skip
    add(
        "--enact_scale_logits", action="store_true",
        help="ENACT: scale the logits by head_dim^-0.5 before the softmax, as plain attention does, and do not divide "
        "the attended values by head_dim; for new trainings; leave it off for published weights",
    )  # fmt: skip
    add(
        "--enact_zero_scores", action="store_true",
        help="ENACT, and the rivals topk and pnp: start training with scores of zero instead of random ones, so that "
        "all tokens count alike until training tells them apart; for new trainings",
    )  # fmt: skip
    add(
        "--token_budget", type=natural_int, metavar="M",
        help=f"rivals of ENACT: most keys and values per image; 0 is 1/{DEFAULT_SHARE} of the tokens; default: the "
        "checkpoint's, else 0",
    )  # fmt: skip
    add("--backbone", type=str, choices=BACKBONES, default="resnet50", help="torchvision's ResNet")
    add(
        "--backbone_stages", type=int, choices=range(1, len(ALL_STAGES) + 1), default=len(ALL_STAGES),
        help="ResNet stages in use: 4, 3, 2 or 1 give a feature map of stride 32, 16, 8 or 4; fewer stages give finer "
        "maps of simpler features",
    )  # fmt: skip
    add(
        "--backbone_weights", type=str, default="default", metavar="default|none|PATH",
        help="initial weights: torchvision's ImageNet weights (downloaded, checked and cached), random weights, or a "
        "state-dict file",
    )  # fmt: skip
    add(
        "--backbone_norm", choices=tuple(NORMS), default="frozen",
        help="frozen: batch norm as loaded; batch: train batch norm and the whole backbone, for training from scratch",
    )  # fmt: skip
    add(
        "--dilation", type=boolean, nargs="?", const=True, default=False, metavar="BOOL",
        help="stride 16 instead of 32 in the last backbone stage (DC5)",
    )  # fmt: skip
    add(
        "--no-dilation", dest="dilation", action="store_false", default=argparse.SUPPRESS,
        help="stride 32 in the last backbone stage (C5)",
    )  # fmt: skip
    add("--enc_layers", type=natural_int, default=6, metavar="N", help="encoder layers")
    add("--dec_layers", type=positive_int, default=6, metavar="N", help="decoder layers")
    add(
        "--dim_feedforward", type=positive_int, default=2048, metavar="CHANNELS",
        help="hidden width of the feed-forward networks",
    )  # fmt: skip
    add("--hidden_dim", type=positive_int, default=256, metavar="CHANNELS", help="transformer width")
    add("--dropout", type=float, default=0.1, metavar="P", help="dropout probability in the transformer")
    add("--nheads", type=positive_int, default=8, metavar="N", help="attention heads")


def add_loss_flags(group) -> None:
    """Add the weights of matching costs and losses."""
    add = group.add_argument
    add(
        "--no_aux_loss", dest="aux_loss", action="store_false",
        help="no auxiliary losses: supervise the last decoder layer only",
    )  # fmt: skip
    add("--set_cost_class", type=non_negative_float, default=1, metavar="W", help="matching cost weight: class")
    add("--set_cost_bbox", type=non_negative_float, default=5, metavar="W", help="matching cost weight: box L1")
    add(
        "--set_cost_giou", type=non_negative_float, default=2, metavar="W", help="matching cost weight: generalized IoU"
    )
    add("--bbox_loss_coef", type=non_negative_float, default=5, metavar="W", help="loss weight: box L1")
    add("--giou_loss_coef", type=non_negative_float, default=2, metavar="W", help="loss weight: generalized IoU")


def add_training_flags(group) -> None:
    """Add the flags of the optimization."""
    add = group.add_argument
    add(
        "--lr", type=non_negative_float, default=ENACT_LR, metavar="RATE",
        help=f"learning rate; default: {ENACT_LR:g} with --encoder_attention enact, {PLAIN_LR:g} with any other",
    )  # fmt: skip
    add(
        "--lr_backbone", type=non_negative_float, default=1e-5, metavar="RATE",
        help="learning rate of the backbone; 0 freezes it",
    )  # fmt: skip
    add(
        "--lr_backbone_names", nargs="+", default=["backbone"], metavar="NAME",
        help="parameters whose name contains one of these learn at --lr_backbone",
    )  # fmt: skip
    add(
        "--lr_linear_proj_names", nargs="+", default=[], metavar="NAME",
        help="parameters whose name contains one of these learn at --lr times --lr_linear_proj_mult; default: none",
    )  # fmt: skip
    add(
        "--lr_linear_proj_mult", type=non_negative_float, default=0.1, metavar="FACTOR",
        help="learning rate of --lr_linear_proj_names, as a fraction of --lr",
    )  # fmt: skip
    add("--sgd", action="store_true", help="SGD with momentum 0.9 instead of AdamW")
    add(
        "--batch_size", type=batch_size, default=2, metavar="N",
        help=f"images per process and forward pass; {AUTO_BATCH} measures the largest that fits into the GPU's memory",
    )  # fmt: skip
    add("--accumulate", type=positive_int, default=1, metavar="N", help="batches whose gradients are averaged per step")
    add(
        "--effective_batch_size", type=positive_int, metavar="N",
        help=f"images per optimizer step, for --batch_size {AUTO_BATCH}, which sets --accumulate; default: 8, as in "
        "the published trainings",
    )  # fmt: skip
    add(
        "--freeze", nargs="+", default=[], metavar="NAME",
        help="do not train parameters whose name contains one of these: backbone, encoder, ...; default: none",
    )  # fmt: skip
    add(
        "--ema", type=decay, nargs="?", const=EMA_DECAY, metavar="DECAY",
        help=f"evaluate EMA weights with this decay ({EMA_DECAY} without a value; smaller in the first steps); "
        "default: no EMA",
    )  # fmt: skip
    add(
        "--early_stop", type=positive_int, metavar="N",
        help="stop after N evaluations in a row without a better AP, which needs validation images with objects; "
        "default: train all --epochs",
    )  # fmt: skip
    add("--weight_decay", type=non_negative_float, default=1e-4, metavar="RATE", help="weight decay of the optimizer")
    add("--epochs", type=natural_int, default=300, metavar="N", help="total epochs, including those before a resume")
    add(
        "--lr_schedule", choices=LR_SCHEDULES, default="step",
        help="learning rate: divided by 10 every --lr_drop epochs, or a cosine over the steps",
    )  # fmt: skip
    add(
        "--lr_drop", type=positive_int, default=200, metavar="EPOCHS",
        help="for --lr_schedule step: epochs between two drops",
    )  # fmt: skip
    add(
        "--lr_drop_epochs", type=positive_int, nargs="+", metavar="EPOCH",
        help="for --lr_schedule step: drop after these epochs instead of every --lr_drop",
    )  # fmt: skip
    add(
        "--warmup_steps", type=natural_int, default=0, metavar="STEPS",
        help="steps of linear warm-up, in which learning rates rise from 0",
    )  # fmt: skip
    add(
        "--clip_max_norm", type=non_negative_float, default=0.1, metavar="NORM",
        help="clip the gradient norm to this; 0 does not clip",
    )  # fmt: skip
    add(
        "--sync_bn", action="store_true",
        help="trained batch norms (--backbone_norm batch) use the mean and variance over all processes; GPUs only",
    )  # fmt: skip
    add("--amp", choices=tuple(AMP_DTYPE), default="none", help="mixed precision; fp16 scales the loss and needs a GPU")
    add(
        "--compile", action="store_true",
        help="torch.compile the backbone, the feed-forward networks and the decoder (except Anchor DETR's): minutes at "
        "the start, then faster steps",
    )  # fmt: skip
    add(
        "--checkpoint_activations", action="store_true",
        help="activation checkpointing: keep only layer inputs and recompute the rest in the backward pass; less "
        "memory, more time",
    )  # fmt: skip


def add_segmentation_flags(group) -> None:
    """Add the reference's mask flags. Variants other than DETR parse them, for shared scripts, and then refuse them."""
    add = group.add_argument
    add("--masks", action="store_true", help="predict masks too, with a mask head on the detector (DETR only)")
    add(
        "--frozen_weights", type=str, metavar="CKPT",
        help="checkpoint of a detector (path or URL, as for --resume) to freeze, training only the mask head; needs "
        "--masks",
    )  # fmt: skip
    add(
        "--coco_panoptic_path", type=str, metavar="DIR",
        help=f"folder of COCO's panoptic annotations, for --dataset_file {PANOPTIC}",
    )  # fmt: skip
    add(
        "--panoptic_threshold", type=fraction, default=PostProcessPanoptic.THRESHOLD, metavar="P",
        help="panoptic segments: minimum class probability of a query; default: %(default)s, which short "
        "trainings seldom reach",
    )  # fmt: skip
    add("--mask_loss_coef", type=non_negative_float, default=1, metavar="W", help="loss weight: focal loss of masks")
    add("--dice_loss_coef", type=non_negative_float, default=1, metavar="W", help="loss weight: dice loss of masks")


def add_run_flags(group) -> None:
    """Add the flags of the run: output, device, checkpoints, processes."""
    add = group.add_argument
    add(
        "--config", metavar="FILE",
        help="YAML file whose keys are flags, such as another training's config.yaml, or the name of a shipped config "
        "(docs/use/configs.md); the command line overrides it; default: none",
    )  # fmt: skip
    add(
        "--output_dir", default="", metavar="DIR",
        help="folder for the log, checkpoints and results; without it nothing is written",
    )  # fmt: skip
    add(
        "--log", nargs="+", choices=tuple(TRACKERS), metavar="TRACKER",
        help="send scalars, settings, and metrics and pictures of the best evaluation to these trackers: "
        f"{', '.join(TRACKERS)}; default: scalars to TensorBoard if it is installed",
    )  # fmt: skip
    add("--device", default="cuda", help="device: cuda, cuda:1, cpu")
    add(
        "--seed", default=42, type=natural_int, metavar="N", help="random seed of weights, image order and augmentation"
    )
    add(
        "--deterministic", action="store_true",
        help="on a GPU, repeat results bit for bit and resume exactly, but slower; CPUs always do (default: off)",
    )  # fmt: skip
    add(
        "--resume", default="", metavar="CKPT",
        help="checkpoint to resume or to evaluate: a path, or an https URL with at least 8 digits of the file's "
        "SHA-256 in its name (name-HASH.pth) or at its end (#sha256=HASH)",
    )  # fmt: skip
    add(
        "--pretrained", default="", metavar="CKPT",
        help="checkpoint to fine-tune (path or URL, as for --resume), also with other classes or settings: loads the "
        "tensors that fit, converts plain attention to ENACT, and lists the rest; --resume takes precedence",
    )  # fmt: skip
    add(
        "--auto_resume", action="store_true",
        help="resume OUTPUT_DIR/checkpoint.pth if it exists, else start a new training; --resume takes precedence",
    )  # fmt: skip
    add(
        "--start_epoch",
        default=0,
        type=natural_int,
        metavar="N",
        help="number of the first epoch of a new training",
    )
    add("--eval", action="store_true", help="evaluate only, without training")
    add("--num_workers", default=2, type=natural_int, metavar="N", help="processes that load images")
    add(
        "--save_every", default=100, type=positive_int, metavar="EPOCHS",
        help="keep a numbered checkpoint every so many epochs and before the learning rate drops, in addition to "
        "checkpoint.pth, which every epoch replaces",
    )  # fmt: skip
    add("--keep", type=positive_int, metavar="N", help="keep only the latest N numbered checkpoints; default: all")
    add(
        "--save_every_steps", default=0, type=natural_int, metavar="STEPS",
        help="also replace checkpoint.pth within an epoch, every so many optimizer steps; 0 saves only after epochs "
        "and when SIGTERM or SIGUSR1 stops the run",
    )  # fmt: skip
    add(
        "--eval_every", default=1, type=positive_int, metavar="EPOCHS",
        help="evaluate every so many epochs, and after the last",
    )  # fmt: skip
    add("--print_freq", default=10, type=positive_int, metavar="STEPS", help="steps between two progress lines")
    add("--world_size", default=1, type=positive_int, metavar="N", help="processes; torchrun sets it")
    add("--dist_url", default="env://", help="address where the processes of a training meet")
    add(
        "--dist_timeout", default=30, type=positive_int, metavar="MINUTES",
        help="time after which a process stops waiting for another",
    )  # fmt: skip
