"""The variant, flags, labels and sizes of a checkpoint, as it states them or as its tensors show them."""

import argparse
import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from enact_common.checkpoints.files import detector_weights, has_masks
from enact_common.cli.flags import CLUSTERING_FLAGS, COCO, MODEL_FLAGS, PANOPTIC
from enact_common.data.categories import LabelMap, coco_names
from enact_common.data.panoptic import NUM_CLASSES, coco_panoptic_names, panoptic_label_map
from enact_common.models.backbone import ALL_STAGES, SHALLOW_BACKBONES, STAGES
from enact_common.utils.errors import UserError
from enact_common.utils.file_kinds import describe_names
from enact_common.variants import VARIANTS, load_variant

logger = logging.getLogger("enact")

# A parameter that one variant alone has.
SIGNATURES = {
    "anchor": "transformer.pattern.weight",
    "conditional": "transformer.decoder.layers.0.sa_qcontent_proj.weight",
    "detr": "transformer.decoder.layers.0.multihead_attn.in_proj_weight",
}

# Flags of the model that its tensors do not show.
UNSEEN = ("dilation", "nheads")

# A tensor of an encoder or decoder layer, and which one.
LAYER = re.compile(r"transformer\.((?:en|de)coder(?:\.layers|_layers|_layers_level))\.(\d+)\.")

# Flags beside the model's own that decide what a checkpoint's detector sees.
IMAGE_FLAGS = ("eval_size", "max_size")


def variant_of(checkpoint: dict[str, Any]) -> str | None:
    """The variant that a checkpoint is of, by its own word or by the names of its tensors; None for none."""
    if checkpoint.get("variant") in VARIANTS:
        return checkpoint["variant"]
    weights = detector_weights(checkpoint["model"])
    return next((variant for variant, name in SIGNATURES.items() if name in weights), None)


def known_variant(checkpoint: dict[str, Any], source: str) -> str:
    """The variant that a checkpoint is of.

    Raises:
        UserError: it is of none; the message says whose model it is, where the tensors' names show it.
    """
    variant = variant_of(checkpoint)
    if variant is None:
        kind = describe_names(checkpoint["model"])
        named = f"it is {kind}" if kind else f"its tensors are named {', '.join(list(checkpoint['model'])[:3])}, ..."
        raise UserError(
            f"{source}: is a checkpoint of none of the variants ({', '.join(VARIANTS)}): {named}. Pass one of this "
            "project, or of DETR, Conditional DETR or Anchor DETR"
        )
    return variant


def averaged_weights(checkpoint: dict[str, Any], source: str) -> dict[str, Tensor]:
    """A checkpoint's averaged weights, which the log then says, or else its only ones."""
    if not checkpoint.get("model_ema"):
        return checkpoint["model"]
    logger.info("%s: its averaged weights (--ema) are taken", source)
    return checkpoint["model_ema"]


def arguments_of(
    checkpoint: dict[str, Any], variant: str, flags: Mapping[str, Any] | None = None
) -> tuple[argparse.Namespace, LabelMap]:
    """The arguments that build a checkpoint's model, and what its labels mean.

    What the checkpoint's own arguments do not say is read off its tensors. What these do not show (`UNSEEN`) is the
    variant's default, which a warning says.

    Args:
        checkpoint: of `load_checkpoint`.
        variant: a key of `VARIANTS`.
        flags: values of the model's flags that are known otherwise.

    Raises:
        UserError: it was made with a value that a flag of ours does not have.
    """
    weights, saved = detector_weights(checkpoint["model"]), checkpoint["args"]
    parser = load_variant(variant).main.get_args_parser()
    values = vars(parser.parse_args([]))
    choices = {action.dest: action.choices for action in parser._actions if action.choices}
    clustered = any(name.endswith("W_prob.weight") for name in weights)
    values["encoder_attention"] = "enact" if clustered else "mhsa"
    values["masks"] = has_masks(checkpoint["model"])
    values["backbone"] = backbone_of(weights) or values["backbone"]
    for flag, value in sizes_of(weights).items():
        values[flag] = value
    values["backbone_norm"] = "batch" if any(name.endswith("num_batches_tracked") for name in weights) else "frozen"
    for flag in (*MODEL_FLAGS, *CLUSTERING_FLAGS, *IMAGE_FLAGS):
        if saved.get(flag) is not None and flag in values:
            if saved[flag] not in choices.get(flag, (saved[flag],)):
                known = ", ".join(map(str, choices[flag]))
                raise UserError(f"was made with --{flag} {saved[flag]}; the variant {variant} has {known}")
            values[flag] = saved[flag]
    values["dilation"] &= values["backbone"] not in SHALLOW_BACKBONES
    for flag, value in (flags or {}).items():
        if flag not in (*MODEL_FLAGS, *CLUSTERING_FLAGS, *IMAGE_FLAGS) or flag not in values:
            raise UserError(f"no flag {flag} of the variant {variant}'s models")
        values[flag] = value
    unseen = {flag: values[flag] for flag in UNSEEN if flag not in (*saved, *(flags or ()))}
    if unseen:
        logger.warning(
            "the checkpoint does not say with which flags its model was made; beside what its tensors show, taken are: "
            "%s", ", ".join(f"{flag} {value}" for flag, value in unseen.items()),
        )  # fmt: skip
    # Nothing is fetched, and nothing trains.
    values.update(backbone_weights="none", aux_loss=False)
    label_map = labels_of(checkpoint, variant)
    values["num_classes"] = label_map.num_classes
    # The published panoptic models do not say that they are.
    silent = PANOPTIC if "label_map" not in checkpoint and values["num_classes"] == NUM_CLASSES else COCO
    values["dataset_file"] = PANOPTIC if values["masks"] and saved.get("dataset_file", silent) == PANOPTIC else COCO
    return argparse.Namespace(**values), label_map


def labels_of(checkpoint: dict[str, Any], variant: str) -> LabelMap:
    """What a checkpoint's labels mean; where it does not say: COCO's classes, or those of its panoptic data, if there
    are as many, else numbers.

    Args:
        checkpoint: of `load_checkpoint`.
        variant: a key of `VARIANTS`.
    """
    if "label_map" in checkpoint:
        return LabelMap.from_dict(checkpoint["label_map"])
    names = coco_names()
    heads = (t for name, t in checkpoint["model"].items() if name.endswith(("class_embed.bias", "class_embed.0.bias")))
    head = next(heads, None)
    # DETR's last logit is no object.
    count = len(names) if head is None else len(head) - (variant == "detr")
    if count == len(names):
        ids = tuple(None if name == "N/A" else i for i, name in enumerate(names))
        return LabelMap(ids, names)
    if count == NUM_CLASSES:
        return panoptic_label_map([{"id": i, "name": name} for i, name in coco_panoptic_names().items()])
    return LabelMap(tuple(range(count)), tuple(f"class {i}" for i in range(count)))


def sizes_of(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The model's flags that show in the names and shapes of a state dict of any variant."""
    found: dict[str, Any] = {}
    for flag, endings, axis in (
        ("hidden_dim", ("class_embed.weight", "class_embed.0.weight"), 1),
        ("dim_feedforward", ("linear1.weight",), 0),
        ("num_queries", ("query_embed.weight",), 0),
        ("num_query_position", ("transformer.position.weight",), 0),
        ("num_query_pattern", ("transformer.pattern.weight",), 0),
    ):
        tensor = next((tensor for name, tensor in weights.items() if name.endswith(endings)), None)
        if tensor is not None:
            found[flag] = tensor.shape[axis]
    found["backbone_stages"] = stages_of(weights) or len(ALL_STAGES)
    layers = {(match[1], match[2]) for match in map(LAYER.match, weights) if match}
    for flag, part in (("enc_layers", "encoder"), ("dec_layers", "decoder")):
        found[flag] = sum(name.startswith(part) for name, _ in layers)
    if "transformer.pattern.weight" in weights:
        tokens = any("encoder_layers.0.self_attn.W_q" in name for name in weights)
        packed = weights.get("transformer.encoder_layers.0.self_attn.in_proj_weight")
        tokens |= packed is not None and packed.shape[0] == 3 * packed.shape[1]
        found |= {
            "attention_type": "nn.MultiheadAttention" if tokens else "RCDA",
            "num_feature_levels": 3 if "transformer.level_embed.weight" in weights else 1,
            "spatial_prior": "learned" if "transformer.position.weight" in weights else "grid",
        }
    else:
        found |= {
            "pre_norm": "transformer.encoder.norm.weight" in weights,
            "position_embedding": "learned" if "backbone.1.row_embed.weight" in weights else "sine",
        }
    return found


def stages_of(weights: dict[str, Tensor]) -> int:
    """How many of a ResNet's stages a state dict has."""
    return sum(any(f"{name}." in key for key in weights) for name in ALL_STAGES)


def backbone_of(weights: dict[str, Tensor]) -> str | None:
    """The name of the ResNet whose blocks, up to some stage, a state dict has; None where it has none that we know."""
    first = [name for name in weights if name.endswith("conv1.weight")]
    blocks = [count for name in ALL_STAGES if (count := sum(f"{name}." in key for key in first))]
    shallow = not any("layer1.0.conv3.weight" in name for name in weights)
    for name, stages in STAGES.items():
        if blocks and list(stages[: len(blocks)]) == blocks and (name in SHALLOW_BACKBONES) == shallow:
            return name
    return None
