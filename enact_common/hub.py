"""The detectors by name, as `torch.hub` finds them in the checkout's `hubconf.py`.

The names are in the pattern of the original repositories' hubs: `detr_resnet50`, `detr_resnet50_dc5`, ...,
`detr_resnet50_panoptic`, ..., `conditional_detr_resnet101`, ..., `anchor_detr_resnet50_dc5`; with `_enact` at the end,
the encoder attends to clusters.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import nn

from enact_common.checkpoints.contents import arguments_of, averaged_weights, known_variant
from enact_common.checkpoints.files import load_checkpoint, load_model
from enact_common.cli.flags import COCO, MODEL, PANOPTIC, with_flags
from enact_common.data.categories import LabelMap, coco_names
from enact_common.data.panoptic import NUM_CLASSES, things_of
from enact_common.models.segmentation import PostProcessPanoptic
from enact_common.utils.errors import UserError
from enact_common.variants import VARIANTS, load_variant

BACKBONES = ("resnet50", "resnet101")
# Flags of the model that its name decides.
NAMED = ("backbone", "dilation", "encoder_attention")
TITLES = {"detr": "DETR", "conditional": "Conditional DETR", "anchor": "Anchor DETR"}

# Published by DETR's authors; the file's name ends with the beginning of its SHA-256.
PUBLISHED = {
    f"detr_{model}": f"https://dl.fbaipublicfiles.com/detr/detr-{file}.pth"
    for model, file in {
        "resnet50": "r50-e632da11",
        "resnet50_dc5": "r50-dc5-f0fb7ef5",
        "resnet101": "r101-2c7b67e5",
        "resnet101_dc5": "r101-dc5-a2e86def",
        "resnet50_panoptic": "r50-panoptic-00ce5173",
        "resnet50_dc5_panoptic": "r50-dc5-panoptic-da08f1b1",
        "resnet101_panoptic": "r101-panoptic-40021d53",
    }.items()
}

HELP = """{title}.

    Args:
        pretrained: False for random weights; a checkpoint's path, or its URL with the hash in the file's name: of
            this project, of ENACT's authors or of the original repository; {published}
        num_classes: labels; None for the checkpoint's, or COCO's {classes}.
        return_postprocessor: return (model, post-processing) rather than the model alone.
        backbone_weights: of a model that is not pretrained: "none" for random ones, "default" for torchvision's
            ImageNet weights, which are downloaded, or a state dict's path.
        flags: of the model, by the names that `python {folder}/main.py --help` lists under "model": `num_queries=300`,
            `enact_max_clusters=256`; and `aux_loss=True` for the predictions of all decoder layers{threshold}.

    Returns:
        the model, in training mode. It takes a list of images (3, h, w), a batch (batch, 3, H, W), or a NestedTensor:
        uint8, or floating point and normalised. It returns `pred_logits` and `pred_boxes`{masks}.

    Raises:
        UserError: the checkpoint cannot be had, or is of another model; or a flag is not of this model.
    """

# What is said of panoptic models beside that.
THRESHOLD_HELP = """;
            `threshold=0.85`, of the post-processing, is the least probability of a segment's class, in [0, 1]"""
MASKS_HELP = """, and in
        evaluation mode `pred_masks`. `postprocess(outputs, sizes)`, with (height, width) of each image as the model
        saw it, makes segments of them, as `PostProcessPanoptic` of `enact_common.models.segmentation` says"""


@dataclass(frozen=True)
class Model:
    """What a name stands for.

    Attributes:
        variant: a key of `VARIANTS`.
        backbone: its name.
        dilation: stride 16 in place of 32 (DC5).
        encoder_attention: "enact" or "mhsa".
        panoptic: with a mask head, for things and stuff.
    """

    variant: str
    backbone: str
    dilation: bool
    encoder_attention: str
    panoptic: bool = False

    @property
    def name(self) -> str:
        """As the hub has it."""
        prefix = "" if self.variant == "detr" else f"{self.variant}_"
        clustered = self.encoder_attention == "enact"
        suffixes = "_dc5" * self.dilation + "_panoptic" * self.panoptic + "_enact" * clustered
        return f"{prefix}detr_{self.backbone}{suffixes}"

    @property
    def title(self) -> str:
        """In words."""
        attention = "with ENACT" if self.encoder_attention == "enact" else "plain"
        stride = ", its last stage dilated (DC5)" if self.dilation else ""
        kind = ", panoptic" if self.panoptic else ""
        return f"{TITLES[self.variant]}{kind}, {attention}, on a ResNet-{self.backbone.removeprefix('resnet')}{stride}"


def build(
    model: Model,
    pretrained: bool | str | PathLike = False,
    num_classes: int | None = None,
    return_postprocessor: bool = False,
    backbone_weights: str = "none",
    **flags: Any,
) -> nn.Module | tuple[nn.Module, nn.Module]:
    """The model that a name stands for; arguments, result and errors as in `HELP`."""
    threshold = flags.pop("threshold", PostProcessPanoptic.THRESHOLD) if model.panoptic else None
    check_flags(model, flags)
    state, source, label_map = None, None, None
    if pretrained:
        source = checkpoint_of(model, pretrained)
        state = load_checkpoint(source)
        args, label_map = pretrained_arguments(model, state, source, num_classes)
    else:
        args = load_variant(model.variant).main.get_args_parser().parse_args([])
        if num_classes is None and model.panoptic:
            num_classes = NUM_CLASSES
        args = with_flags(
            args, **{name: getattr(model, name) for name in NAMED}, masks=model.panoptic,
            dataset_file=PANOPTIC if model.panoptic else COCO, num_classes=num_classes,
            backbone_weights=backbone_weights, aux_loss=False,
        )  # fmt: skip
    args = with_flags(args, **flags)
    check_arguments(model, args)
    built, _, postprocessors = load_variant(model.variant).models.build_model(args)
    if state is not None:
        load_model(built, averaged_weights(state, source), source)
    if not return_postprocessor:
        return built
    if model.panoptic:
        postprocessors["panoptic"].threshold = threshold
        if label_map is not None:
            postprocessors["panoptic"].things = frozenset(things_of(label_map, source))
        return built, postprocessors["panoptic"]
    return built, postprocessors["bbox"]


def check_flags(model: Model, flags: dict[str, Any]) -> None:
    """Refuse flags that a model does not have, or that its name decides.

    Raises:
        UserError: naming the flag.
    """
    group = load_variant(model.variant).main.get_args_parser().group(MODEL)
    known = {action.dest: action.choices for action in group._group_actions} | {"aux_loss": None}
    for name in NAMED:
        known.pop(name, None)
    for name, value in flags.items():
        if name not in known:
            raise UserError(f"{model.name}: no flag {name} of this model; there are {', '.join(sorted(known))}")
        if known[name] is not None and value not in known[name]:
            raise UserError(f"{model.name}: {name}={value!r}: choose from {', '.join(map(str, known[name]))}")


def check_arguments(model: Model, args: argparse.Namespace) -> None:
    """Refuse values that do not go together, as a training would.

    Raises:
        UserError: naming the flag and the way out.
    """
    # There is no data to ask for.
    args = with_flags(args, coco_path=".", coco_panoptic_path="." if model.panoptic else None)
    try:
        load_variant(model.variant).main.get_args_parser().check(args)
    except UserError as error:
        raise UserError(f"{model.name}: {error}") from error


def checkpoint_of(model: Model, pretrained: bool | str | PathLike) -> str:
    """The path or URL that `pretrained` asks for.

    Raises:
        UserError: it is True, and there is none.
    """
    if pretrained is not True:
        return str(pretrained)
    if model.name not in PUBLISHED:
        raise UserError(
            f"{model.name}: pretrained=True: no published file of this model is known here with its hash. Pass a file "
            "that you have, pretrained='path/to/checkpoint.pth', or an https URL whose file name ends with the "
            "beginning of its SHA-256"
        )
    return PUBLISHED[model.name]


def pretrained_arguments(
    model: Model, state: dict[str, Any], source: str, num_classes: int | None
) -> tuple[argparse.Namespace, LabelMap]:
    """The arguments that build a checkpoint's model, which must be the one that is asked for, and its labels.

    Args:
        model: what is asked for.
        state: of `load_checkpoint`.
        source: where it is from, for messages.
        num_classes: labels that are asked for; None for its own.

    Raises:
        UserError: naming the model that it is of.
    """
    variant = known_variant(state, source)
    dilation = state["args"].get("dilation", model.dilation)
    args, label_map = arguments_of(state, variant, {"dilation": dilation})
    found = Model(variant, args.backbone, args.dilation, args.encoder_attention, args.dataset_file == PANOPTIC)
    if args.masks and not found.panoptic:
        raise UserError(
            f"{source}: is a checkpoint of {found.title}, with a mask head for instances, not of {model.title}: there "
            "is no name for it: enact_common.load_detector"
        )
    if found != model:
        other = f"load {found.name}" if found.name in ENTRIES else "there is no name for it: enact_common.load_detector"
        raise UserError(f"{source}: is a checkpoint of {found.title}, not of {model.title}: {other}")
    if num_classes not in (None, label_map.num_classes):
        raise UserError(
            f"{source}: has {label_map.num_classes} labels, num_classes={num_classes} asks for others: leave it out; "
            f"to train on other classes, pass the file to {VARIANTS[variant][0]}/main.py as --pretrained"
        )
    return args, label_map


def entry(model: Model) -> Callable[..., nn.Module | tuple[nn.Module, nn.Module]]:
    """The function that `torch.hub` calls for a model."""

    def hub_entry(pretrained=False, num_classes=None, return_postprocessor=False, backbone_weights="none", **flags):
        return build(model, pretrained, num_classes, return_postprocessor, backbone_weights, **flags)

    published = "True for the one that its authors published."
    if model.name not in PUBLISHED:
        published = "True is an error: no published one is known with its hash."
    hub_entry.__name__ = hub_entry.__qualname__ = model.name
    hub_entry.__doc__ = HELP.format(
        title=model.title, published=published, folder=VARIANTS[model.variant][0],
        classes=f"{NUM_CLASSES} panoptic ones" if model.panoptic else len(coco_names()),
        threshold=THRESHOLD_HELP if model.panoptic else "", masks=MASKS_HELP if model.panoptic else "",
    )  # fmt: skip
    return hub_entry


MODELS = [
    Model(variant, backbone, dilation, attention)
    for variant in VARIANTS
    for backbone in BACKBONES
    for dilation in (False, True)
    for attention in ("mhsa", "enact")
] + [
    Model("detr", backbone, dilation, attention, panoptic=True)
    for backbone in BACKBONES
    for dilation in (False, True)
    for attention in ("mhsa", "enact")
]

# Name to function, which is what `hubconf.py` offers.
ENTRIES = {model.name: entry(model) for model in MODELS}
