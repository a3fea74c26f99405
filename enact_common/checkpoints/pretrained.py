"""Fine-tuning: begin with the weights of another training, as far as they fit (`--pretrained`)."""

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from enact_common.attention.conversion import PACKED, clustered_weights
from enact_common.checkpoints.contents import averaged_weights, backbone_of, known_variant, labels_of, stages_of
from enact_common.checkpoints.files import DETECTOR, detector_weights, differing_flags, flag_text, has_masks
from enact_common.data.categories import LabelMap
from enact_common.utils.errors import UserError
from enact_common.variants import VARIANTS

logger = logging.getLogger("enact")

# The classification head's part of a name: its rows mean classes.
CLASS_HEAD = "class_embed"

# Counts batches that a norm has seen; norms that do not train have none.
COUNTER = "num_batches_tracked"

# What scores tokens for ENACT: no plain model has it.
SCORES = "W_prob."

# Tensors of one kind that are named in a message.
SHOWN = 3


@dataclass
class Fit:
    """What of a checkpoint goes into a model.

    Attributes:
        weights: by the model's names; what it has beside them stays as it is.
        skipped: names in the checkpoint that are not taken, each with the reason.
        fresh: names in the model that the checkpoint has nothing for.
        converted: attention layers whose plain weights became ENACT's.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)


def check_pretrained(checkpoint: dict[str, Any], variant: str, args: argparse.Namespace) -> None:
    """Refuse a checkpoint that no training of this variant and backbone can begin from.

    Args:
        checkpoint: of `load_checkpoint`.
        variant: this run's.
        args: this run's arguments.

    Raises:
        UserError: it is of another variant or has another backbone.
    """
    source, theirs = args.pretrained, known_variant(checkpoint, f"--pretrained {args.pretrained}")
    if theirs != variant:
        raise UserError(
            f"--pretrained {source}: is a checkpoint of the variant {theirs}, this is {variant}; run "
            f"{VARIANTS[theirs][0]}/main.py, or pass one of {variant}"
        )
    backbone = backbone_of(detector_weights(checkpoint["model"]))
    if backbone != args.backbone:
        way_out = f"pass --backbone {backbone}" if backbone else "pass a whole checkpoint"
        raise UserError(
            f"--pretrained {source}: its backbone is {backbone or 'none that is known here'}, this run's is "
            f"{args.backbone}; {way_out}"
        )
    stages = stages_of(checkpoint["model"])
    if stages != args.backbone_stages:
        raise UserError(
            f"--pretrained {source}: its backbone has {stages} stages, this run's {args.backbone_stages}; pass "
            f"--backbone_stages {stages}, or a whole checkpoint"
        )


def load_pretrained(
    model: nn.Module, checkpoint: dict[str, Any], variant: str, args: argparse.Namespace, label_map: LabelMap
) -> None:
    """Give a model the weights of a checkpoint that fit it, and log what did not.

    Plain multi-head attention that the model has ENACT for is converted (`clustered_weights`): as long as each cluster
    is one token, the layer computes what it did. Anchor DETR's row-column attention is another function with ENACT than
    without; its weights are taken as they are, as a start.

    Args:
        model: as it was built; changed in place.
        checkpoint: of `load_checkpoint`: ours, an original repository's, or of ENACT's authors.
        variant: the model's.
        args: this run's arguments.
        label_map: the model's labels. Unless the checkpoint's are the same, its classification head is left out.

    Raises:
        UserError: as `check_pretrained` does; or parts of the backbone are missing.
    """
    check_pretrained(checkpoint, variant, args)
    source = args.pretrained
    weights = averaged_weights(checkpoint, source)
    if args.masks and not has_masks(weights):
        weights = {DETECTOR + name: tensor for name, tensor in weights.items()}
    elif has_masks(weights) and not args.masks:
        weights = {name.removeprefix(DETECTOR): tensor for name, tensor in weights.items()}
    same_labels = labels_of(checkpoint, variant).names == label_map.names
    fit = fit_weights(weights, model.state_dict(), args.nheads, same_labels, args.enact_scale_logits)
    missing = [name for name in fit.fresh if name.removeprefix(DETECTOR).startswith("backbone.")]
    if missing:
        raise UserError(f"--pretrained {source}: {len(missing)} backbone tensors are missing, {missing[0]} first")
    model.load_state_dict(fit.weights, strict=False)
    logger.info("%s", describe(fit, source))
    to_enact = args.encoder_attention == "enact" and not any(SCORES in name for name in weights)
    carried = any("encoder" in name and name.endswith(f"self_attn.{PACKED[0]}") for name in fit.weights)
    if to_enact and carried:
        logger.info(
            "note: row-column attention over ENACT's clusters is another function than the plain one: the encoder "
            "attention's weights are carried over slice by slice as a start, to be trained on"
        )
    if fit.converted and variant == "detr" and args.pre_norm:
        logger.info("note: DETR's encoder layers are post-norm with ENACT, also with --pre_norm: another function")
    if to_enact and not args.enact_mask_padding:
        logger.info("note: plain attention leaves padding out; --enact_mask_padding does so with ENACT")
    others = [
        flag_text(flag, checkpoint["args"][flag])
        for flag in differing_flags(checkpoint["args"], args)
        if flag not in ("encoder_attention", "num_classes")
    ]
    if others:
        logger.info("note: %s was made with other flags than this run's: %s", source, ", ".join(others))


def fit_weights(
    weights: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    nheads: int,
    same_labels: bool,
    scale_logits: bool = False,
) -> Fit:
    """Sort a checkpoint's tensors into those that go into a model and those that do not.

    Args:
        weights: the checkpoint's state dict.
        own: the model's.
        nheads: attention heads.
        same_labels: the labels mean the same; otherwise the classification head is skipped.
        scale_logits: as in the model's `EnactSelfAttention`.
    """
    fit = Fit()
    available = dict(weights)
    for name in own:
        prefix = name.removesuffix("W_q.weight")
        if prefix == name or name in weights or prefix + PACKED[0] not in weights:
            continue
        # Row-column attention packs five projections, and another width's do not fit: both are skipped as they are.
        height, width = own[name].shape
        if weights[prefix + PACKED[0]].shape == (3 * height, width):
            plain = {part: available.pop(prefix + part) for part in PACKED if prefix + part in available}
            available |= {
                prefix + part: tensor for part, tensor in clustered_weights(plain, nheads, scale_logits).items()
            }
            fit.converted.append(prefix.rstrip("."))
    for name, tensor in available.items():
        if name not in own:
            if not name.endswith(COUNTER):
                fit.skipped[name] = "the model has none"
        elif CLASS_HEAD in name and not same_labels:
            fit.skipped[name] = "of other classes"
        elif tensor.shape != own[name].shape:
            fit.skipped[name] = f"{shape_text(tensor)} there, {shape_text(own[name])} here"
        else:
            fit.weights[name] = tensor
    fit.fresh = [name for name in own if name not in fit.weights and not name.endswith(COUNTER)]
    return fit


def shape_text(tensor: Tensor) -> str:
    """A shape as 91 x 256."""
    return " x ".join(map(str, tensor.shape)) or "a number"


def describe(fit: Fit, source: str) -> str:
    """What was taken, converted and skipped, a line a reason."""
    lines = [f"--pretrained {source}: {len(fit.weights)} tensors taken"]
    if fit.converted:
        layers = f"{len(fit.converted)} attention layers" if len(fit.converted) > 1 else "1 attention layer"
        lines.append(f"  converted to ENACT: {layers}, {shortened(fit.converted)}")
    by_reason: dict[str, list[str]] = {}
    for name, reason in fit.skipped.items():
        by_reason.setdefault(reason, []).append(name)
    lines += [f"  skipped, {reason}: {shortened(names)}" for reason, names in by_reason.items()]
    if fit.fresh:
        lines.append(f"  left as initialised: {shortened(fit.fresh)}")
    return "\n".join(lines)


def shortened(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
