"""The variant, flags, labels and sizes of a checkpoint, from its metadata or its tensors."""

import argparse
import logging
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from enact_common.attention.rivals import RIVALS
from enact_common.checkpoints.files import detector_weights, differing_flags, flag_text, has_masks
from enact_common.cli.flags import CLUSTERING_FLAGS, COCO, MODEL_FLAGS, PANOPTIC
from enact_common.data.categories import LabelMap, coco_names
from enact_common.data.panoptic import NUM_CLASSES, coco_panoptic_names, panoptic_label_map
from enact_common.models.backbone import ALL_STAGES, SHALLOW_BACKBONES, STAGES
from enact_common.utils.errors import UserError
from enact_common.utils.file_kinds import describe_names
from enact_common.variants import VARIANTS, load_variant

logger = logging.getLogger("enact")

# A parameter that only this variant has.
SIGNATURES = {
    "anchor": "transformer.pattern.weight",
    "conditional": "transformer.decoder.layers.0.sa_qcontent_proj.weight",
    "detr": "transformer.decoder.layers.0.multihead_attn.in_proj_weight",
}

# Model flags that the tensors do not show.
UNRECORDED = ("dilation", "nheads")

# The module list and index of an encoder or decoder layer in a tensor's name.
LAYER = re.compile(r"transformer\.((?:en|de)coder(?:\.layers|_layers|_layers_level))\.(\d+)\.")

# Flags that set the size of the model's input.
IMAGE_FLAGS = ("eval_size", "max_size")


def variant_of(checkpoint: dict[str, Any]) -> str | None:
    """The variant of a checkpoint, from its metadata or its tensors' names; None if unknown."""
    if checkpoint.get("variant") in VARIANTS:
        return checkpoint["variant"]
    weights = detector_weights(checkpoint["model"])
    return next((variant for variant, name in SIGNATURES.items() if name in weights), None)


def known_variant(checkpoint: dict[str, Any], source: str) -> str:
    """The variant of a checkpoint.

    Raises:
        UserError: the variant is unknown. The message names the model's kind if the tensors' names show it.
    """
    variant = variant_of(checkpoint)
    if variant is None:
        kind = describe_names(checkpoint["model"])
        reason = f"it is {kind}" if kind else f"its tensors are named {', '.join(list(checkpoint['model'])[:3])}, ..."
        raise UserError(
            f"{source}: fits none of the variants ({', '.join(VARIANTS)}): {reason}. Pass a checkpoint of this "
            "project, DETR, Conditional DETR or Anchor DETR"
        )
    return variant


def averaged_weights(checkpoint: dict[str, Any], source: str) -> dict[str, Tensor]:
    """A checkpoint's EMA weights, with a line in the log, or else its model weights."""
    if not checkpoint.get("model_ema"):
        return checkpoint["model"]
    logger.info("%s: using the EMA weights (--ema)", source)
    return checkpoint["model_ema"]


def arguments_of(
    checkpoint: dict[str, Any], variant: str, flags: Mapping[str, Any] | None = None
) -> tuple[argparse.Namespace, LabelMap]:
    """The arguments that build a checkpoint's model, and its label map.

    Arguments missing from the checkpoint are inferred from its tensors. Flags that the tensors do not show
    (`UNRECORDED`) get the variant's defaults, with a warning.

    Args:
        checkpoint: from `load_checkpoint`.
        variant: a key of `VARIANTS`.
        flags: values of the model's flags that override the checkpoint's.

    Raises:
        UserError: the checkpoint has a flag value that this project does not support, or `flags` has an unknown flag.
    """
    weights, saved = detector_weights(checkpoint["model"]), checkpoint["args"]
    parser = load_variant(variant).main.get_args_parser()
    values = vars(parser.parse_args([]))
    choices = {action.dest: action.choices for action in parser._actions if action.choices}
    values["encoder_attention"] = attention_of(weights)
    values["masks"] = has_masks(checkpoint["model"])
    values["backbone"] = backbone_of(weights) or values["backbone"]
    values |= sizes_of(weights)
    values["backbone_norm"] = "batch" if any(name.endswith("num_batches_tracked") for name in weights) else "frozen"
    for flag in (*MODEL_FLAGS, *CLUSTERING_FLAGS, *IMAGE_FLAGS):
        if saved.get(flag) is not None and flag in values:
            if saved[flag] not in choices.get(flag, (saved[flag],)):
                known = ", ".join(map(str, choices[flag]))
                raise UserError(f"was trained with --{flag} {saved[flag]}; the variant {variant} supports {known}")
            values[flag] = saved[flag]
    values["dilation"] &= values["backbone"] not in SHALLOW_BACKBONES
    for flag, value in (flags or {}).items():
        if flag not in (*MODEL_FLAGS, *CLUSTERING_FLAGS, *IMAGE_FLAGS) or flag not in values:
            raise UserError(f"no flag {flag} for models of the variant {variant}")
        values[flag] = value
    if values["encoder_attention"] == "mhsa" and any("self_attn.W_q." in name for name in weights):
        raise UserError(
            f"does not store its encoder attention, which is one of {', '.join(RIVALS)}: pass encoder_attention=NAME "
            "to load_detector, or a checkpoint of this project with its arguments"
        )
    defaults = {flag: values[flag] for flag in UNRECORDED if flag not in (*saved, *(flags or ()))}
    if defaults:
        logger.warning(
            "the checkpoint does not store all model flags, and its tensors do not show these; using the defaults: %s",
            ", ".join(f"{flag} {value}" for flag, value in defaults.items()),
        )  # fmt: skip
    # Inference needs no pretrained backbone and no auxiliary losses.
    values.update(backbone_weights="none", aux_loss=False)
    label_map = labels_of(checkpoint, variant)
    values["num_classes"] = label_map.num_classes
    # The published panoptic checkpoints do not store `dataset_file`.
    default = PANOPTIC if "label_map" not in checkpoint and values["num_classes"] == NUM_CLASSES else COCO
    values["dataset_file"] = PANOPTIC if values["masks"] and saved.get("dataset_file", default) == PANOPTIC else COCO
    return argparse.Namespace(**values), label_map


@cache
def default_arguments(variant: str) -> argparse.Namespace:
    """Return a variant's default arguments. They are shared between calls: do not change them."""
    return load_variant(variant).main.get_args_parser().parse_args([])


def model_words(args: argparse.Namespace, variant: str) -> list[str]:
    """The command-line words that build a model of a variant: its flags that differ from the variant's defaults.

    The number of labels is left out: the checkpoint or the annotations say it. `DIR` stands for the panoptic folder.
    """
    differing = differing_flags(vars(default_arguments(variant)), args)
    words = [flag_text(flag, getattr(args, flag)) for flag in differing if flag != "num_classes"]
    if args.dataset_file == PANOPTIC:
        words += [f"--dataset_file {PANOPTIC}", "--coco_panoptic_path DIR"]
    return words


def attention_of(weights: Mapping[str, Tensor]) -> str:
    """Return the encoder attention that tensor names show: ENACT or plain. Names do not tell the rivals apart."""
    return "enact" if any(name.endswith("W_prob.weight") for name in weights) else "mhsa"


def labels_of(checkpoint: dict[str, Any], variant: str) -> LabelMap:
    """The stored label map; else the one of COCO or COCO panoptic if the number of classes matches; else numbers."""
    if "label_map" in checkpoint:
        return LabelMap.from_dict(checkpoint["label_map"])
    names = coco_names()
    heads = (t for name, t in checkpoint["model"].items() if name.endswith(("class_embed.bias", "class_embed.0.bias")))
    head = next(heads, None)
    # DETR's last logit is the "no object" class.
    count = len(names) if head is None else len(head) - (variant == "detr")
    if count == len(names):
        ids = tuple(None if name == "N/A" else i for i, name in enumerate(names))
        return LabelMap(ids, names)
    if count == NUM_CLASSES:
        return panoptic_label_map([{"id": i, "name": name} for i, name in coco_panoptic_names().items()])
    return LabelMap(tuple(range(count)), tuple(f"class {i}" for i in range(count)))


def sizes_of(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The model flags that the names and shapes of a state dict show, for any variant."""
    flags: dict[str, Any] = {}
    for flag, endings, axis in (
        ("hidden_dim", ("class_embed.weight", "class_embed.0.weight"), 1),
        ("dim_feedforward", ("linear1.weight",), 0),
        ("num_queries", ("query_embed.weight",), 0),
        ("num_query_position", ("transformer.position.weight",), 0),
        ("num_query_pattern", ("transformer.pattern.weight",), 0),
    ):
        tensor = next((tensor for name, tensor in weights.items() if name.endswith(endings)), None)
        if tensor is not None:
            flags[flag] = tensor.shape[axis]
    flags["backbone_stages"] = stages_of(weights) or len(ALL_STAGES)
    layers = {(match[1], match[2]) for match in map(LAYER.match, weights) if match}
    for flag, part in (("enc_layers", "encoder"), ("dec_layers", "decoder")):
        flags[flag] = sum(name.startswith(part) for name, _ in layers)
    if "transformer.pattern.weight" in weights:
        tokens = any("encoder_layers.0.self_attn.W_q" in name for name in weights)
        packed = weights.get("transformer.encoder_layers.0.self_attn.in_proj_weight")
        tokens |= packed is not None and packed.shape[0] == 3 * packed.shape[1]
        flags |= {
            "attention_type": "nn.MultiheadAttention" if tokens else "RCDA",
            "num_feature_levels": 3 if "transformer.level_embed.weight" in weights else 1,
            "spatial_prior": "learned" if "transformer.position.weight" in weights else "grid",
        }
    else:
        flags |= {
            "pre_norm": "transformer.encoder.norm.weight" in weights,
            "position_embedding": "learned" if "backbone.1.row_embed.weight" in weights else "sine",
        }
    return flags


def stages_of(weights: dict[str, Tensor]) -> int:
    """The number of ResNet stages in a state dict."""
    return sum(any(f"{name}." in key for key in weights) for name in ALL_STAGES)


def backbone_of(weights: dict[str, Tensor]) -> str | None:
    """The name of the ResNet whose first stages are in a state dict; None for an unknown backbone."""
    first = [name for name in weights if name.endswith("conv1.weight")]
    blocks = [count for name in ALL_STAGES if (count := sum(f"{name}." in key for key in first))]
    shallow = not any("layer1.0.conv3.weight" in name for name in weights)
    for name, stages in STAGES.items():
        if blocks and list(stages[: len(blocks)]) == blocks and (name in SHALLOW_BACKBONES) == shallow:
            return name
    return None
