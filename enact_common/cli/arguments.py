"""The command line that the variants share. Each variant's `main.py` adds what is its own and sets its defaults."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from enact_common.attention.clustering import CLUSTERS
from enact_common.attention.hilbert import ORDERS, ROWS
from enact_common.cli.checks import check_arguments, check_position_embedding
from enact_common.cli.config import add_opposites, read_config
from enact_common.cli.flags import COCO, ENACT_LR, LOSSES, MODEL, PANOPTIC, PLAIN_LR
from enact_common.cli.types import (
    HelpFormatter,
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

# Remembers about a thousand steps: some epochs of a small data set, a hundredth of COCO's training.
EMA_DECAY = 0.999


class VariantParser(argparse.ArgumentParser):
    """A parser in which `--encoder_attention mhsa` brings the plain models' learning rate, unless `--lr` is given, and
    `--config FILE` brings flags from a file, over which those of the command line win.

    Attributes:
        checks: what `check` calls: functions of the parsed arguments that raise a UserError.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.checks: list[Callable[[argparse.Namespace], None]] = []
        # Goes before an error's message: where the words come from that are being parsed.
        self.origin = ""

    def check(self, args: argparse.Namespace) -> None:
        """Refuse what cannot work, before any work starts.

        Raises:
            UserError: naming the flag and the way out.
        """
        for check in self.checks:
            check(args)

    def group(self, title: str):
        """The group of this title, for a variant's own flags.

        Raises:
            KeyError: there is none.
        """
        return {group.title: group for group in self._action_groups}[title]

    def parse_known_args(self, args=None, namespace=None):
        add_opposites(self)
        words = sys.argv[1:] if args is None else list(args)
        parsed, rest = super().parse_known_args(words, namespace)
        if getattr(parsed, "config", None):
            # Before the command line's words: of a flag that is given twice, the last counts.
            words = [*self.config_words(parsed.config), *words]
            parsed, rest = super().parse_known_args(words, namespace)
        if namespace is None and getattr(parsed, "encoder_attention", None) == "mhsa":
            parsed, rest = super().parse_known_args(words, argparse.Namespace(lr=PLAIN_LR))
        # The file's settings are the other flags' values now; checkpoints and logs need not name the file.
        vars(parsed).pop("config", None)
        return parsed, rest

    def config_words(self, name: str) -> list[str]:
        """The words of the command line that a file of settings stands for, each checked by its flag's type.

        Raises:
            SystemExit: the file is missing, or something in it is wrong; a message names it and the key.
        """
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
        """End with a message; where a file's setting is at fault, it names the file and the key."""
        if self.origin:
            self.exit(2, f"{self.prog}: error: {self.origin}{message}\n")
        super().error(message)


def common_parser(description: str) -> VariantParser:
    """A parser with the flags of all variants, at DETR's defaults where variants differ.

    Args:
        description: the first line of `--help`.
    """
    parser = VariantParser(description=description, formatter_class=HelpFormatter)
    # Images a step in the published trainings with ENACT: no flag, what the start says of the learning rate.
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
    """What DETR and Conditional DETR have in common: learned queries, position embeddings and pre-norm.

    Args:
        parser: of `common_parser`.
        num_queries: default.
    """
    group = parser.group(MODEL)
    group.add_argument(
        "--position_embedding", type=str, default="sine", choices=("sine", "learned"), help="of the feature map"
    )
    group.add_argument(
        "--num_queries", type=positive_int, default=num_queries, metavar="N", help="objects that one image can hold"
    )
    group.add_argument("--pre_norm", action="store_true", help="layer norm before each block rather than after it")
    parser.checks.append(check_position_embedding)


def add_focal_flags(parser: VariantParser) -> None:
    """A focal classification loss, and the matching cost of the class that goes with it.

    Args:
        parser: of `common_parser`.
    """
    group = parser.group(LOSSES)
    group.add_argument("--cls_loss_coef", type=non_negative_float, default=2, metavar="W", help="loss: class")
    group.add_argument(
        "--focal_alpha", type=fraction, default=0.25, metavar="A",
        help="focal loss: weight of the object's class, against 1 - A for all others; 0 to 1",
    )  # fmt: skip
    parser.set_defaults(set_cost_class=2)


def add_data_flags(group) -> None:
    """Where the images are and how they are resized."""
    group.add_argument("--dataset_file", default=COCO, help=f"kind of data set: {COCO}, {PANOPTIC}")
    group.add_argument(
        "--coco_path", type=str, metavar="DIR",
        help="folder with train2017/, val2017/ (or images/train2017, ...) and annotations/instances_*2017.json; or a "
        "Roboflow export: train/, valid/ (or val/), test/, each with _annotations.coco.json beside the images",
    )  # fmt: skip
    for split, purpose in (("train", "train on"), ("val", "evaluate on")):
        group.add_argument(
            f"--{split}_images", type=str, metavar="DIR",
            help=f"folder of the images to {purpose}, where they are not laid out like COCO; goes before --coco_path",
        )  # fmt: skip
        group.add_argument(
            f"--{split}_annotations", type=str, metavar="FILE", help=f"COCO-format JSON; goes with --{split}_images"
        )
    group.add_argument(
        "--num_classes", type=positive_int, metavar="N",
        help="labels; default: 91 where the categories are COCO's own, whose labels are their ids (person alone, id 1, "
        "needs 2), else as many as the annotations have",
    )  # fmt: skip
    group.add_argument(
        "--train_sizes", type=positive_int, nargs="+", metavar="PIXELS", default=list(range(480, 801, 32)),
        help="shorter sides to choose from in training; the crops of the augmentation scale with the largest",
    )  # fmt: skip
    group.add_argument(
        "--eval_size", type=positive_int, default=800, metavar="PIXELS", help="shorter side in evaluation"
    )
    group.add_argument(
        "--max_size", type=positive_int, default=1333, metavar="PIXELS", help="longer side is at most this"
    )
    group.add_argument("--limit_train", type=positive_int, metavar="N", help="train on the first N images only")
    group.add_argument("--limit_val", type=positive_int, metavar="N", help="evaluate on the first N images only")
    group.add_argument(
        "--eval_set", choices=("val", "train", "test"), default="val",
        help="images to evaluate on; train shows how far it has learned them by heart; test has no annotations: --eval "
        "writes results.json for COCO's server",
    )  # fmt: skip
    group.add_argument(
        "--remove_difficult", action="store_true",
        help='treat annotations marked "difficult": 1 (Pascal VOC) as crowds: not trained on, nor right or wrong',
    )  # fmt: skip
    group.add_argument(
        "--cache_mode", nargs="?", choices=CACHE_MODES, const="encoded", default=False,
        help="read the images once and hold them in memory, once for each process of torchrun: the files as they are "
        "(encoded, also where no word follows), or their pixels (decoded), five to ten times as large but not "
        "decoded again in every epoch; default: read anew each time",
    )  # fmt: skip
    group.add_argument(
        "--strict_data", action="store_true",
        help="end at the first image that cannot be read; default: train on another one in its place, count its "
        "objects as not found in evaluation, and end where most images cannot be read",
    )  # fmt: skip
    group.add_argument(
        "--no_augmentation", dest="augmentation", action="store_false",
        help="train on whole images at the evaluation's size: no flips, scales or crops",
    )  # fmt: skip


def add_model_flags(group) -> None:
    """What the network looks like."""
    group.add_argument(
        "--encoder_attention", choices=ENCODER_ATTENTIONS, default="enact",
        help="encoder self-attention: clustered by entropy, or the original model's",
    )  # fmt: skip
    group.add_argument(
        "--smoothing_sigma", type=float, default=3.0, metavar="TOKENS",
        help="ENACT: standard deviation of the entropy's smoothing; larger gives fewer clusters",
    )  # fmt: skip
    group.add_argument(
        "--enact_clusters", choices=CLUSTERS,
        help="ENACT: what is pooled, windows as long as the entropy's regions are on average, or each region itself; "
        f"default: the checkpoint's, else {CLUSTERS[0]}",
    )  # fmt: skip
    group.add_argument(
        "--enact_order", choices=ORDERS,
        help="ENACT: the tokens that follow each other are cells of a row, or of a Hilbert curve, so that clusters are "
        f"compact patches; default: the checkpoint's, else {ROWS}",
    )  # fmt: skip
    group.add_argument(
        "--enact_per_image", action=argparse.BooleanOptionalAction, default=None,
        help="ENACT: each image has its own window length, rather than one for the batch; default: the checkpoint's, "
        "else no",
    )  # fmt: skip
    group.add_argument(
        "--enact_mask_padding", action=argparse.BooleanOptionalAction, default=None,
        help="ENACT: padding is not scored, clustered or attended to; default: the checkpoint's, else no",
    )  # fmt: skip
    group.add_argument(
        "--enact_max_clusters", type=natural_int, metavar="M",
        help="ENACT: clusters grow until there are at most so many, whatever the image's size; 0 sets no limit; "
        "default: the checkpoint's, else none",
    )  # fmt: skip
    group.add_argument(
        "--enact_temperature", type=non_negative_float, metavar="T",
        help="ENACT: a token's share in its cluster follows from its information over T times the image's mean of it, "
        "so that the more informative count more; 0: from the information itself, in bits, which makes all but equal "
        "shares, as published; default: the checkpoint's, else 0",
    )  # fmt: skip
    group.add_argument(
        "--enact_scale_logits", action="store_true",
        help="ENACT: logits are scaled by e^-0.5 before the softmax, as in plain attention, and attended values are "
        "not divided by e, e being the width of a head: for trainings of one's own, the published weights have neither",
    )  # fmt: skip
    group.add_argument("--backbone", type=str, choices=BACKBONES, default="resnet50", help="ResNet from torchvision")
    group.add_argument(
        "--backbone_stages", type=int, choices=range(1, len(ALL_STAGES) + 1), default=len(ALL_STAGES),
        help="of the ResNet, those in use: 4 give a map of stride 32, 3 of 16, 2 of 8, 1 of 4: finer, its features "
        "simpler",
    )  # fmt: skip
    group.add_argument(
        "--backbone_weights", type=str, default="default", metavar="default|none|PATH",
        help="torchvision's ImageNet weights (downloaded, checked and cached), random ones, or a state dict's file",
    )  # fmt: skip
    group.add_argument(
        "--backbone_norm", choices=tuple(NORMS), default="frozen",
        help="batch norm as loaded, or trained (from scratch; then the whole backbone trains)",
    )  # fmt: skip
    group.add_argument(
        "--dilation", type=boolean, nargs="?", const=True, default=False, metavar="BOOL",
        help="stride 16 in place of 32 in the last backbone stage (DC5)",
    )  # fmt: skip
    group.add_argument(
        "--no-dilation", dest="dilation", action="store_false", default=argparse.SUPPRESS,
        help="stride 32 in the last backbone stage (C5)",
    )  # fmt: skip
    group.add_argument("--enc_layers", type=natural_int, default=6, metavar="N", help="encoder layers")
    group.add_argument("--dec_layers", type=positive_int, default=6, metavar="N", help="decoder layers")
    group.add_argument(
        "--dim_feedforward", type=positive_int, default=2048, metavar="CHANNELS", help="in feed-forward networks"
    )
    group.add_argument("--hidden_dim", type=positive_int, default=256, metavar="CHANNELS", help="of the transformer")
    group.add_argument("--dropout", type=float, default=0.1, metavar="P", help="in the transformer, probability")
    group.add_argument("--nheads", type=positive_int, default=8, metavar="N", help="attention heads")


def add_loss_flags(group) -> None:
    """Weights of matching costs and losses."""
    group.add_argument(
        "--no_aux_loss", dest="aux_loss", action="store_false", help="supervise the last decoder layer alone"
    )
    group.add_argument("--set_cost_class", type=non_negative_float, default=1, metavar="W", help="matching: class")
    group.add_argument(
        "--set_cost_bbox", type=non_negative_float, default=5, metavar="W", help="matching: L1 of the box"
    )
    group.add_argument(
        "--set_cost_giou", type=non_negative_float, default=2, metavar="W", help="matching: generalized IoU"
    )
    group.add_argument("--bbox_loss_coef", type=non_negative_float, default=5, metavar="W", help="loss: L1 of the box")
    group.add_argument(
        "--giou_loss_coef", type=non_negative_float, default=2, metavar="W", help="loss: generalized IoU"
    )


def add_training_flags(group) -> None:
    """Optimisation."""
    group.add_argument(
        "--lr", type=non_negative_float, default=ENACT_LR, metavar="RATE",
        help=f"learning rate; default: {ENACT_LR:g}, with --encoder_attention mhsa {PLAIN_LR:g}",
    )  # fmt: skip
    group.add_argument(
        "--lr_backbone", type=non_negative_float, default=1e-5, metavar="RATE", help="the backbone's; 0 freezes it"
    )
    group.add_argument(
        "--lr_backbone_names", nargs="+", default=["backbone"], metavar="NAME",
        help="parameters whose name contains one of these learn at --lr_backbone",
    )  # fmt: skip
    group.add_argument(
        "--lr_linear_proj_names", nargs="+", default=[], metavar="NAME",
        help="parameters whose name contains one of these learn at --lr times --lr_linear_proj_mult; default: none",
    )  # fmt: skip
    group.add_argument(
        "--lr_linear_proj_mult", type=non_negative_float, default=0.1, metavar="FACTOR",
        help="learning rate of --lr_linear_proj_names, as a part of --lr",
    )  # fmt: skip
    group.add_argument("--sgd", action="store_true", help="SGD with momentum 0.9 in place of AdamW")
    group.add_argument(
        "--batch_size", type=positive_int, default=2, metavar="N", help="images a process and a forward pass"
    )
    group.add_argument(
        "--accumulate", type=positive_int, default=1, metavar="N", help="batches whose gradients make one step"
    )
    group.add_argument(
        "--freeze", nargs="+", default=[], metavar="NAME",
        help="parameters whose name contains one of these keep their values: backbone, encoder, ...; default: none",
    )  # fmt: skip
    group.add_argument(
        "--ema", type=decay, nargs="?", const=EMA_DECAY, metavar="DECAY",
        help="evaluate an exponential moving average of the weights, which this much of remains after a step "
        f"(without a number {EMA_DECAY}; less in the first steps); default: none",
    )  # fmt: skip
    group.add_argument(
        "--early_stop", type=positive_int, metavar="N",
        help="end after N evaluations in a row without a better AP, for which validation needs objects; default: train "
        "all --epochs",
    )  # fmt: skip
    group.add_argument("--weight_decay", type=non_negative_float, default=1e-4, metavar="RATE", help="the optimizer's")
    group.add_argument("--epochs", type=natural_int, default=300, metavar="N", help="train up to this many in all")
    group.add_argument(
        "--lr_schedule", choices=LR_SCHEDULES, default="step",
        help="learning rate: a tenth after every --lr_drop epochs, or falling along a cosine in every step",
    )  # fmt: skip
    group.add_argument("--lr_drop", type=positive_int, default=200, metavar="EPOCHS", help="for --lr_schedule step")
    group.add_argument(
        "--lr_drop_epochs", type=positive_int, nargs="+", metavar="EPOCH",
        help="for --lr_schedule step: a tenth after each of these epochs, rather than every --lr_drop",
    )  # fmt: skip
    group.add_argument(
        "--warmup_steps", type=natural_int, default=0, metavar="STEPS", help="learning rates rise from 0 over these"
    )
    group.add_argument(
        "--clip_max_norm",
        type=non_negative_float,
        default=0.1,
        metavar="NORM",
        help="largest gradient norm; 0 does not clip",
    )
    group.add_argument(
        "--sync_bn", action="store_true",
        help="batch norms that train (--backbone_norm batch) take the mean and variance of all processes' images",
    )  # fmt: skip
    group.add_argument(
        "--amp", choices=tuple(AMP_DTYPE), default="none", help="mixed precision; fp16 scales the loss and needs a GPU"
    )
    group.add_argument(
        "--compile", action="store_true",
        help="let PyTorch compile the backbone, the feed-forward networks and, but for Anchor DETR, the decoder: "
        "minutes at the start, then faster steps",
    )  # fmt: skip
    group.add_argument(
        "--checkpoint_activations", action="store_true",
        help="keep layers' inputs alone for the backward pass, which computes the rest again: less memory, more time",
    )  # fmt: skip


def add_segmentation_flags(group) -> None:
    """Masks: the reference's flags. Other variants than DETR know them so that scripts parse, and refuse them."""
    group.add_argument(
        "--masks", action="store_true", help="find objects' masks, too, by a mask head on the detector (DETR alone)"
    )
    group.add_argument(
        "--frozen_weights", type=str, metavar="CKPT",
        help="detector, a checkpoint as for --resume, whose weights stay as they are: the mask head alone is trained; "
        "needs --masks",
    )  # fmt: skip
    group.add_argument(
        "--coco_panoptic_path",
        type=str,
        metavar="DIR",
        help=f"COCO's panoptic annotations, for --dataset_file {PANOPTIC}",
    )
    group.add_argument(
        "--panoptic_threshold", type=fraction, default=PostProcessPanoptic.THRESHOLD, metavar="P",
        help="panoptic segments: the least probability of a query's class; short trainings seldom reach the default",
    )  # fmt: skip
    group.add_argument(
        "--mask_loss_coef", type=non_negative_float, default=1, metavar="W", help="loss: focal loss of masks"
    )
    group.add_argument(
        "--dice_loss_coef", type=non_negative_float, default=1, metavar="W", help="loss: dice loss of masks"
    )


def add_run_flags(group) -> None:
    """Where and how it runs."""
    group.add_argument(
        "--config", metavar="FILE",
        help="YAML file whose keys are flags, such as the config.yaml of another training, or the name of a published "
        "training (docs/use/configs.md); flags given here win over it; default: none",
    )  # fmt: skip
    group.add_argument(
        "--output_dir", default="", metavar="DIR", help="for log, checkpoints and results; without it none is written"
    )
    group.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    group.add_argument("--seed", default=42, type=natural_int, metavar="N", help="of weights, order and augmentation")
    group.add_argument(
        "--deterministic", action="store_true",
        help="on a GPU, results repeat to the bit and a resumed training is exact, at some cost in time; on a CPU they "
        "do anyway (default: off)",
    )  # fmt: skip
    group.add_argument(
        "--resume", default="", metavar="CKPT",
        help="checkpoint to go on from or to evaluate: a path, or an https URL with the file's SHA-256 (8 digits of it "
        "or more) in the file's name, name-HASH.pth, or at its end, #sha256=HASH",
    )  # fmt: skip
    group.add_argument(
        "--pretrained", default="", metavar="CKPT",
        help="checkpoint to begin a training from, as for --resume, of other classes or settings too: what fits is "
        "taken, plain attention is converted to ENACT, the rest is listed; --resume goes before it",
    )  # fmt: skip
    group.add_argument(
        "--auto_resume", action="store_true",
        help="go on from OUTPUT_DIR/checkpoint.pth where there is one, else start anew; --resume goes before it",
    )  # fmt: skip
    group.add_argument("--start_epoch", default=0, type=natural_int, metavar="N", help="count epochs from here")
    group.add_argument("--eval", action="store_true", help="evaluate and end")
    group.add_argument("--num_workers", default=2, type=natural_int, metavar="N", help="processes that load images")
    group.add_argument(
        "--save_every", default=100, type=positive_int, metavar="EPOCHS",
        help="beside checkpoint.pth, which each epoch replaces, keep a numbered one after every so many, and before "
        "the learning rate drops",
    )  # fmt: skip
    group.add_argument(
        "--keep", type=positive_int, metavar="N", help="numbered checkpoints that stay, the latest; default: all"
    )
    group.add_argument(
        "--save_every_steps", default=0, type=natural_int, metavar="STEPS",
        help="replace checkpoint.pth within the epoch, too, after every so many steps of the optimizer; 0: at epochs' "
        "ends alone, and when SIGTERM or SIGUSR1 asks the run to stop",
    )  # fmt: skip
    group.add_argument(
        "--eval_every",
        default=1,
        type=positive_int,
        metavar="EPOCHS",
        help="evaluate after every so many epochs, and after the last",
    )
    group.add_argument(
        "--print_freq", default=10, type=positive_int, metavar="STEPS", help="steps between two lines of progress"
    )
    group.add_argument("--world_size", default=1, type=positive_int, metavar="N", help="processes; torchrun sets it")
    group.add_argument("--dist_url", default="env://", help="where processes meet")
    group.add_argument(
        "--dist_timeout", default=30, type=positive_int, metavar="MINUTES",
        help="after which a process that waits for another one gives up",
    )  # fmt: skip
