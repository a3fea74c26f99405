"""Fine-tuning (`--pretrained`): start from the weights of another training that fit."""

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from enact_common.attention.clustering import EQUAL
from enact_common.attention.conversion import PACKED, clustered_weights
from enact_common.checkpoints.contents import averaged_weights, backbone_of, known_variant, labels_of, stages_of
from enact_common.checkpoints.files import DETECTOR, detector_weights, differing_flags, flag_text, has_masks
from enact_common.cli.flags import ENACT_FLAGS
from enact_common.data.categories import LabelMap
from enact_common.models.layers import scales_logits
from enact_common.utils.errors import UserError
from enact_common.variants import VARIANTS

logger = logging.getLogger("enact")

# Part of the classification head's tensor names. The head depends on the classes.
CLASS_HEAD = "class_embed"

# The batch counter of a trained norm. Frozen norms have none.
COUNTER = "num_batches_tracked"

# ENACT's token scores, which no plain model has.
SCORES = "W_prob."

# At most this many tensors are named per reason in a message.
MAX_NAMES = 3


@dataclass
class Fit:
    """The tensors of a checkpoint, sorted by whether they fit a model.

    Attributes:
        weights: the tensors to load, by the model's names.
        skipped: the checkpoint's tensors that are not loaded, each with the reason.
        fresh, converted: the model's tensors that keep their initial values, and attention layers that were plain.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)


def check_pretrained(checkpoint: dict[str, Any], variant: str, args: argparse.Namespace) -> None:
    """Refuse a checkpoint of another variant or backbone than this run's.

    Raises:
        UserError: the variant, the backbone or its number of stages differs.
    """
    source, theirs = args.pretrained, known_variant(checkpoint, f"--pretrained {args.pretrained}")
    if theirs != variant:
        raise UserError(
            f"--pretrained {source}: is a checkpoint of the variant {theirs}, but this run trains {variant}; run "
            f"{VARIANTS[theirs][0]}/main.py, or pass a checkpoint of {variant}"
        )
    backbone, stages = backbone_of(detector_weights(checkpoint["model"])), stages_of(checkpoint["model"])
    saved = {**checkpoint["args"], "backbone": backbone, "backbone_stages": stages}
    # A fine-tuning may choose its encoder attention and its classes.
    flags = [f for f in differing_flags(saved, args) if f not in (*ENACT_FLAGS, "encoder_attention", "num_classes")]
    their_flags = " ".join(flag_text(flag, saved[flag]) for flag in flags)
    if backbone != args.backbone:
        raise UserError(
            f"--pretrained {source}: its backbone is {backbone or 'unknown or missing'}, this run's is "
            f"{args.backbone}; pass {their_flags if backbone else 'a whole checkpoint'}"
        )
    if stages != args.backbone_stages:
        raise UserError(
            f"--pretrained {source}: its backbone has {stages} stages, this run's has {args.backbone_stages}; pass "
            f"{their_flags}, or a whole checkpoint"
        )


def load_pretrained(
    model: nn.Module, checkpoint: dict[str, Any], variant: str, args: argparse.Namespace, label_map: LabelMap
) -> None:
    """Load the weights of a checkpoint that fit the newly built model, and log the skipped tensors.

    Plain multi-head attention is converted where the model has ENACT or a rival (`clustered_weights`): while each
    cluster is one token, the output of ENACT's layer is unchanged. Anchor DETR's row-column attention computes another
    function with ENACT; its weights are loaded unchanged as a start. If the checkpoint's labels differ from
    `label_map`, its classification head is skipped.

    Raises:
        UserError: see `check_pretrained`; or backbone tensors are missing.
    """
    check_pretrained(checkpoint, variant, args)
    source = args.pretrained
    weights = averaged_weights(checkpoint, source)
    if args.masks and not has_masks(weights):
        weights = {DETECTOR + name: tensor for name, tensor in weights.items()}
    elif has_masks(weights) and not args.masks:
        weights = {name.removeprefix(DETECTOR): tensor for name, tensor in weights.items()}
    same_labels = labels_of(checkpoint, variant).names == label_map.names
    fit = fit_weights(weights, model.state_dict(), args.nheads, same_labels, scales_logits(args))
    missing = [name for name in fit.fresh if name.removeprefix(DETECTOR).startswith("backbone.")]
    if missing:
        raise UserError(
            f"--pretrained {source}: {len(missing)} backbone tensors are missing, such as {missing[0]}; pass a whole "
            "checkpoint"
        )
    model.load_state_dict(fit.weights, strict=False)
    logger.info("%s", describe(fit, source, args.encoder_attention))
    becomes_enact = args.encoder_attention == "enact" and not any(SCORES in name for name in weights)
    has_packed_weights = any("encoder" in name and name.endswith(f"self_attn.{PACKED[0]}") for name in fit.weights)
    if becomes_enact and has_packed_weights:
        logger.info(
            "note: row-column attention over ENACT's clusters is another function than plain row-column attention; the "
            "encoder attention's weights are copied slice by slice as a start and need further training"
        )
    if fit.converted and variant == "detr" and args.pre_norm and args.encoder_attention == "enact":
        logger.info(
            "note: with ENACT, DETR's encoder layers are post-norm even with --pre_norm: the converted layers compute "
            "another function"
        )
    if becomes_enact and not args.enact_mask_padding and args.enact_clusters != EQUAL:
        logger.info("note: plain attention ignores padding; ENACT needs --enact_mask_padding for that")
    others = [
        flag_text(flag, checkpoint["args"][flag])
        for flag in differing_flags(checkpoint["args"], args)
        if flag not in ("encoder_attention", "num_classes")
    ]
    if others:
        logger.info("note: %s was trained with other flags than this run's: %s", source, ", ".join(others))


def fit_weights(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], nheads: int, same_labels: bool, scale_logits: bool
) -> Fit:
    """Sort a checkpoint's tensors into those that fit a model and those that do not.

    Args:
        weights, own: the state dicts of the checkpoint and of the model.
        nheads: number of attention heads.
        same_labels: whether the labels match. If not, the classification head is skipped.
        scale_logits: whether the model's encoder attention scales its logits.
    """
    fit = Fit()
    available = dict(weights)
    for name in own:
        prefix = name.removesuffix("W_q.weight")
        if prefix == name or name in weights or prefix + PACKED[0] not in weights:
            continue
        # Only multi-head attention of the same width can be converted: row-column attention packs five projections.
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
                fit.skipped[name] = "not in the model"
        elif CLASS_HEAD in name and not same_labels:
            fit.skipped[name] = "other classes"
        elif tensor.shape != own[name].shape:
            fit.skipped[name] = f"{shape_text(tensor)} in the checkpoint, {shape_text(own[name])} in the model"
        else:
            fit.weights[name] = tensor
    fit.fresh = [name for name in own if name not in fit.weights and not name.endswith(COUNTER)]
    return fit


def shape_text(tensor: Tensor) -> str:
    """A tensor's shape as text, like 91 x 256."""
    return " x ".join(map(str, tensor.shape)) or "a scalar"


def describe(fit: Fit, source: str, attention: str) -> str:
    """Report the loaded, converted and skipped tensors, with one line per reason."""
    lines = [f"--pretrained {source}: {len(fit.weights)} tensors loaded"]
    if fit.converted:
        layers = f"{len(fit.converted)} attention layers" if len(fit.converted) > 1 else "1 attention layer"
        lines.append(
            f"  converted to {'ENACT' if attention == 'enact' else attention}: {layers}, {shortened(fit.converted)}"
        )
    by_reason: dict[str, list[str]] = {}
    for name, reason in fit.skipped.items():
        by_reason.setdefault(reason, []).append(name)
    lines += [f"  skipped, {reason}: {shortened(names)}" for reason, names in by_reason.items()]
    if fit.fresh:
        lines.append(f"  left as initialised: {shortened(fit.fresh)}")
    return "\n".join(lines)


def shortened(names: list[str]) -> str:
    """The first few names, and the number of further ones."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
