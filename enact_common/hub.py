"""The detectors by name, for `torch.hub` and the checkout's `hubconf.py`.

Names follow the original repositories' hubs: `detr_resnet50`, `detr_resnet50_dc5`, ..., `detr_resnet50_panoptic`, ...,
`conditional_detr_resnet101`, ..., `anchor_detr_resnet50_dc5`. With `_enact` at the end, the encoder attends to
clusters.
"""

import argparse
import contextlib
from collections.abc import Callable
from os import PathLike
from typing import Any

from torch import nn

from enact_common.checkpoints.contents import arguments_of, averaged_weights, known_variant
from enact_common.checkpoints.files import Undrawn, load_checkpoint, load_model
from enact_common.checkpoints.published import FILES, NAMED, Model
from enact_common.cli.flags import MODEL, with_flags
from enact_common.data.categories import LabelMap, coco_names
from enact_common.data.panoptic import NUM_CLASSES, things_of
from enact_common.models.segmentation import PostProcessPanoptic
from enact_common.utils.download import HASH_IN_NAME
from enact_common.utils.errors import UserError
from enact_common.variants import VARIANTS, load_variant

BACKBONES = ("resnet50", "resnet101")

# The published checkpoints that can be checked after a download: file names end with the first digits of their SHA-256.
PUBLISHED = {file.name: file.url for file in FILES if HASH_IN_NAME.search(file.url)}

HELP = """{title}.

    Args:
        pretrained: False for random weights; or a checkpoint's path, or its URL with the hash in the file name: from
            this project, ENACT's authors or the original repository; {published}
        num_classes: labels; None for the checkpoint's, or COCO's {classes}.
        return_postprocessor: return (model, post-processing) instead of only the model.
        backbone_weights: for a model that is not pretrained: "none" for random ones, "default" for torchvision's
            ImageNet weights, which are downloaded, or the path of a state dict.
        flags: the flags that `python {folder}/main.py --help` lists under "model", by name: `num_queries=300`,
            `enact_max_clusters=256`; and `aux_loss=True` for the predictions of all decoder layers{threshold}.

    Returns:
        the model, in training mode. It takes a list of images (3, h, w), a batch (batch, 3, H, W), or a NestedTensor:
        uint8, or floating point and normalised. It returns `pred_logits` and `pred_boxes`{masks}.

    Raises:
        UserError: the checkpoint cannot be loaded or is of another model, or a flag is not one of this model.
    """

# Additional help of panoptic models.
THRESHOLD_HELP = """;
            `threshold=0.85`, of the post-processing, is the lowest probability of a segment's class, in [0, 1]"""
MASKS_HELP = """, and in
        evaluation mode `pred_masks`. `postprocess(outputs, sizes)`, with (height, width) of each image at the model's
        input, turns them into segments (see `enact_common.models.segmentation.PostProcessPanoptic`)"""


def build(
    model: Model,
    pretrained: bool | str | PathLike = False,
    num_classes: int | None = None,
    return_postprocessor: bool = False,
    backbone_weights: str = "none",
    **flags: Any,
) -> nn.Module | tuple[nn.Module, nn.Module]:
    """Build a named model; see `HELP` for arguments, result and errors."""
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
            args, **model.flags, num_classes=num_classes, backbone_weights=backbone_weights, aux_loss=False
        )
    args = with_flags(args, **flags)
    check_arguments(model, args)
    with contextlib.nullcontext() if state is None else Undrawn():
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
    """Check that all flags belong to the model and are not set by its name."""
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
    """Check the flags for conflicts, as a training does."""
    # Placeholders: building a model needs no data.
    args = with_flags(args, coco_path=".", coco_panoptic_path="." if model.panoptic else None)
    try:
        load_variant(model.variant).main.get_args_parser().check(args)
    except UserError as error:
        raise UserError(f"{model.name}: {error}") from error


def checkpoint_of(model: Model, pretrained: bool | str | PathLike) -> str:
    """Return the path or URL of the checkpoint for `pretrained`."""
    if pretrained is not True:
        return str(pretrained)
    if model.name not in PUBLISHED:
        raise UserError(
            f"{model.name}: pretrained=True: no published file of this model with a known hash. Pass your own file, "
            "pretrained='path/to/checkpoint.pth', or an https URL whose file name ends with the first digits of its "
            "SHA-256"
        )
    return PUBLISHED[model.name]


def pretrained_arguments(
    model: Model, state: dict[str, Any], source: str, num_classes: int | None
) -> tuple[argparse.Namespace, LabelMap]:
    """Return the arguments that build a checkpoint's model, and its labels.

    Refuse a checkpoint of another model, which the message names, or with another number of labels.
    """
    variant = known_variant(state, source)
    dilation = state["args"].get("dilation", model.dilation)
    args, label_map = arguments_of(state, variant, {"dilation": dilation})
    found = Model.of(args, variant)
    if args.masks and not found.panoptic:
        raise UserError(
            f"{source}: is a checkpoint of {found.title}, with a mask head for instances, not of {model.title}: the "
            "hub has no name for it; use enact_common.load_detector"
        )
    if found != model:
        other = f"load {found.name}" if found.name in ENTRIES else "use enact_common.load_detector"
        raise UserError(f"{source}: is a checkpoint of {found.title}, not of {model.title}: {other}")
    if num_classes not in (None, label_map.num_classes):
        raise UserError(
            f"{source}: has {label_map.num_classes} labels, num_classes={num_classes} does not fit: leave it out. "
            f"To train on other classes, pass the file to {VARIANTS[variant][0]}/main.py as --pretrained"
        )
    return args, label_map


def entry(model: Model) -> Callable[..., nn.Module | tuple[nn.Module, nn.Module]]:
    """Return the function that `torch.hub` calls for a model."""

    def hub_entry(pretrained=False, num_classes=None, return_postprocessor=False, backbone_weights="none", **flags):
        return build(model, pretrained, num_classes, return_postprocessor, backbone_weights, **flags)

    published = "True for its authors' checkpoint."
    if model.name not in PUBLISHED:
        published = "True is an error: no published checkpoint with a known hash."
    hub_entry.__name__ = hub_entry.__qualname__ = model.name
    hub_entry.__doc__ = HELP.format(
        title=model.title, published=published, folder=VARIANTS[model.variant][0],
        classes=f"{NUM_CLASSES} panoptic ones" if model.panoptic else len(coco_names()),
        threshold=THRESHOLD_HELP if model.panoptic else "", masks=MASKS_HELP if model.panoptic else "",
    )  # fmt: skip
    return hub_entry


MODELS = [
    Model(variant, backbone, dilation, attention, panoptic)
    for variant, panoptic in (*((variant, False) for variant in VARIANTS), ("detr", True))
    for backbone in BACKBONES
    for dilation in (False, True)
    for attention in ("mhsa", "enact")
]

# name: function; `hubconf.py` exports these.
ENTRIES = {model.name: entry(model) for model in MODELS}
