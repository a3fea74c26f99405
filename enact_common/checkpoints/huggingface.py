"""DETR and Conditional DETR of Hugging Face's transformers: tensor names both ways, configurations, folders.

Tensor names differ between transformers 4 (and all published files) and the modules of transformers 5. Both are read;
the names of transformers 4 are written, which both read.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from enact_common.data.categories import LabelMap, coco_names
from enact_common.models.backbone import SHALLOW_BACKBONES, STAGES
from enact_common.models.normalization import IMAGENET_MEAN, IMAGENET_STD
from enact_common.utils.errors import UserError
from enact_common.utils.files import read_json

logger = logging.getLogger("enact")

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
# Files that hold a folder's weights, in search order.
SAFETENSORS = "model.safetensors"
WEIGHT_FILES = (SAFETENSORS, "pytorch_model.bin")

# A key that this project adds to the configurations it writes: the data set's category id of each label.
CATEGORY_IDS = "enact_category_ids"

# Hugging Face's model type: the variant.
MODEL_TYPES = {"detr": "detr", "conditional_detr": "conditional"}

# Both detectors have these tensors; a segmentation model has them under "detr.".
SIGNATURE = ("class_labels_classifier.weight", "model.query_position_embeddings.weight")
SEGMENTATION = "detr."
UNKNOWN_NAMES = re.compile(r"LABEL_\d+")

# Names in transformers 5: names in transformers 4.
MODERN = {
    r"model\.backbone\.model\.": "model.backbone.conv_encoder.model.",
    r"model\.position_embedding\.": "model.backbone.position_embedding.",
    r"\.o_proj\.": ".out_proj.",
    r"\.mlp\.fc": ".fc",
    r"\.self_attn\.([qk])_(content|pos)_proj\.": r".sa_\1\2_proj.",
    r"\.encoder_attn\.([qk])_(content|pos)_proj\.": r".ca_\1\2_proj.",
    r"\.encoder_attn\.q_pos_sine_proj\.": ".ca_qpos_sine_proj.",
    r"^bbox_attention\.([qk])_proj\.": r"bbox_attention.\1_linear.",
    r"^mask_head\.conv([12])\.conv\.": r"mask_head.lay\1.",
    r"^mask_head\.conv([12])\.norm\.": r"mask_head.gn\1.",
    r"^mask_head\.output_conv\.": "mask_head.out_lay.",
    **{
        rf"^mask_head\.fpn_stages\.{stage}\.{modern}\.": f"mask_head.{name}."
        for stage in range(3)
        for modern, name in (
            ("fpn_adapter", f"adapter{stage + 1}"), (r"refine\.conv", f"lay{stage + 3}"),
            (r"refine\.norm", f"gn{stage + 3}"),
        )
    },
}  # fmt: skip
# Only Conditional DETR's decoder: DETR's has the same names in both releases.
MODERN_CONDITIONAL = {
    r"(decoder\.layers\.\d+)\.self_attn\.v_proj\.": r"\1.sa_v_proj.",
    r"(decoder\.layers\.\d+)\.encoder_attn\.v_proj\.": r"\1.ca_v_proj.",
}

# The first part of our tensors' names: of Hugging Face's.
PARTS = {
    "query_embed.": "model.query_position_embeddings.",
    "input_proj.": "model.input_projection.",
    "class_embed.": "class_labels_classifier.",
    "bbox_embed.": "bbox_predictor.",
    "transformer.decoder.norm.": "model.decoder.layernorm.",
    "backbone.0.body.": "model.backbone.conv_encoder.model.",
    "backbone.1.row_embed.": "model.backbone.position_embedding.row_embeddings.",
    "backbone.1.col_embed.": "model.backbone.position_embedding.column_embeddings.",
    "transformer.": "model.",
}
# The last part, in a layer of the encoder or decoder.
IN_LAYERS = {"linear1.": "fc1.", "linear2.": "fc2.", "norm1.": "self_attn_layer_norm."}
IN_ENCODER = IN_LAYERS | {"norm2.": "final_layer_norm."}
IN_DECODER = IN_LAYERS | {"norm2.": "encoder_attn_layer_norm.", "norm3.": "final_layer_norm."}
MEMORY_ATTENTION = {"detr": "multihead_attn.", "conditional": "cross_attn."}
LAYER = re.compile(r"((?:transformer|model)\.(encoder|decoder)\.layers\.\d+\.)(.*)")

# A ResNet's modules in torchvision and timm: in transformers.
RESNET = {"conv1": "embedder.embedder.convolution", "bn1": "embedder.embedder.normalization"} | {
    f"layer{stage + 1}.{block}.{ours}": f"encoder.stages.{stage}.layers.{block}.{theirs}"
    for stage in range(4)
    for block in range(max(max(stages) for stages in STAGES.values()))
    for ours, theirs in {
        "downsample.0": "shortcut.convolution",
        "downsample.1": "shortcut.normalization",
        **{f"conv{i + 1}": f"layer.{i}.convolution" for i in range(3)},
        **{f"bn{i + 1}": f"layer.{i}.normalization" for i in range(3)},
    }.items()
}
FROM_RESNET = {theirs: ours for ours, theirs in RESNET.items()}

# An attention's three projections in Hugging Face's names, which PyTorch packs into one.
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
UNPACKED = re.compile(r"(.*)\.q_proj\.(weight|bias)")


def is_hugging_face(names: Mapping[str, Any]) -> bool:
    """Whether a state dict has the names of Hugging Face's DETR or Conditional DETR."""
    return any(all(prefix + name in names for name in SIGNATURE) for prefix in ("", SEGMENTATION))


def variant_of_names(names: Mapping[str, Any]) -> str:
    """Tell Hugging Face's Conditional DETR ("conditional") from its DETR ("detr") by the tensors' names."""
    return "conditional" if any("decoder.ref_point_head." in name for name in names) else "detr"


def from_hugging_face(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Convert a state dict of Hugging Face's DETR or Conditional DETR, with or without a mask head, to our names.

    It has the names of transformers 4 or 5, and a ResNet of timm or transformers.

    Raises:
        UserError: a tensor has no counterpart, for example in a model with another backbone.
    """
    variant = variant_of_names(weights)
    patterns = {re.compile(modern): name for modern, name in MODERN.items()}
    if variant == "conditional":
        patterns |= {re.compile(modern): name for modern, name in MODERN_CONDITIONAL.items()}
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        # Frozen norms ignore the batch counter.
        if name.endswith("num_batches_tracked"):
            continue
        for modern, published in patterns.items():
            name = modern.sub(published, name)
        named[name] = tensor
    for name in [name for name in named if UNPACKED.fullmatch(name)]:
        attention, kind = UNPACKED.fullmatch(name).groups()
        parts = [f"{attention}.{part}.{kind}" for part in PROJECTIONS]
        if all(part in named for part in parts):
            named[f"{attention}.in_proj_{kind}"] = torch.cat([named.pop(part) for part in parts])
    own: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in named.items():
        ours = own_name(name, variant)
        if ours is None:
            unknown.append(name)
        else:
            own[ours] = tensor
    if unknown:
        raise UserError(
            f"{source}: {len(unknown)} tensors of this Hugging Face model have no counterpart, {unknown[0]} first; "
            "pass a DETR or Conditional DETR with a ResNet of Hugging Face's or timm's"
        )
    return own


def own_name(name: str, variant: str) -> str | None:
    """Return our name of a tensor of transformers 4; None if there is none."""
    if name.startswith(SEGMENTATION):
        ours = own_name(name.removeprefix(SEGMENTATION), variant)
        return None if ours is None else SEGMENTATION + ours
    if name.startswith(("mask_head.", "bbox_attention.")):
        return name
    layer = LAYER.fullmatch(name)
    if layer:
        inner = {theirs: ours for ours, theirs in inner_names(layer[2], variant).items()}
        name = layer[1] + replaced_start(layer[3], inner)
    body = PARTS["backbone.0.body."]
    if name.startswith(body):
        inside = name.removeprefix(body).removeprefix("_backbone.")
        module, _, tensor = inside.rpartition(".")
        module = FROM_RESNET.get(module, module)
        return f"backbone.0.body.{module}.{tensor}" if module in RESNET else None
    ours = replaced_start(name, {theirs: ours for ours, theirs in PARTS.items()})
    return None if ours == name or ".layernorm." in ours else ours


def inner_names(part: str, variant: str) -> dict[str, str]:
    """Return {our name: Hugging Face's} of the modules in a layer of `part`, "encoder" or "decoder"."""
    if part == "encoder":
        return IN_ENCODER
    return IN_DECODER | {MEMORY_ATTENTION[variant]: "encoder_attn."}


def replaced_start(name: str, starts: Mapping[str, str]) -> str:
    """Replace the first of `starts` (from: to) with which a name starts; return other names unchanged."""
    for start, other in starts.items():
        if name.startswith(start):
            return other + name.removeprefix(start)
    return name


def to_hugging_face(weights: Mapping[str, Tensor], variant: str, timm_backbone: bool) -> dict[str, Tensor]:
    """Convert the state dict of a plain "detr" or "conditional" without a mask head to the names of transformers 4.

    With `timm_backbone`, the backbone is named as timm does instead of as transformers does.
    """
    theirs: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith("num_batches_tracked"):
            continue
        layer = LAYER.fullmatch(name)
        if layer:
            name = layer[1] + replaced_start(layer[3], inner_names(layer[2], variant))
        if name.startswith("backbone.0.body.") and not timm_backbone:
            module, _, last = name.removeprefix("backbone.0.body.").rpartition(".")
            name = f"backbone.0.body.{RESNET[module]}.{last}"
        name = replaced_start(name, PARTS)
        if "in_proj_" in name:
            attention, kind = name.split(".in_proj_")
            for part, projection in zip(PROJECTIONS, tensor.chunk(3), strict=True):
                theirs[f"{attention}.{part}.{kind}"] = projection
        else:
            theirs[name] = tensor
    return theirs


# ---------------------------------------------------------------------------------------------------- configurations


def weights_file(folder: Path) -> Path:
    """Return the file with the weights of a folder of Hugging Face's or of `save_pretrained`.

    Raises:
        UserError: there is none.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    if any(folder.glob("*.index.json")):
        raise UserError(
            f"{folder}: its weights are split into several files; save them as one: "
            "model.save_pretrained(FOLDER, max_shard_size='10GB')"
        )
    raise UserError(
        f"{folder}: has a {CONFIG}, but no weights ({' or '.join(WEIGHT_FILES)}); fetch the whole folder: a clone "
        "without Git LFS lacks them"
    )


def facts_of_config(config: Mapping[str, Any], folder: Path, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a Hugging Face model's configuration says that its tensors, by our names, do not show.

    The folder may have a `preprocessor_config.json`.

    Returns:
        `args`, flags by name, and `label_map` if the configuration names the classes of a model without masks; a
        panoptic model's names come from COCO.

    Raises:
        UserError: a setting that our models do not have.
    """
    for key in ("backbone_config", "backbone_kwargs", "id2label"):
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{folder / CONFIG}: {key} is not an object, but {config[key]!r}; fetch the file anew")
    heads, channels = config.get("encoder_attention_heads", 8), config.get("encoder_ffn_dim", 2048)
    for key, default, expected in (
        ("decoder_attention_heads", 8, heads),
        ("decoder_ffn_dim", 2048, channels),
        ("activation_function", "relu", "relu"),
    ):
        found = config.get(key, default)
        if found != expected:
            raise UserError(f"{folder / CONFIG}: {key} is {found}, but our models of this kind only have {expected}")
    backbone = config.get("backbone_config") or {}
    strides = (config.get("backbone_kwargs") or {}).get("output_stride"), backbone.get("output_stride")
    args: dict[str, Any] = {
        "encoder_attention": "mhsa",
        "nheads": heads,
        "dilation": bool(config.get("dilation")) or 16 in strides,
        "position_embedding": config.get("position_embedding_type", "sine"),
        "pre_norm": False,
    }
    preprocessor = read_json(folder / PREPROCESSOR) or {}
    size = preprocessor.get("size")
    if isinstance(size, dict) and {"shortest_edge", "longest_edge"} <= size.keys():
        args |= {"eval_size": size["shortest_edge"], "max_size": size["longest_edge"]}
    elif isinstance(size, int):
        args |= {"eval_size": size, "max_size": preprocessor.get("max_size") or 1333}
    for key, expected in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        if preprocessor.get("do_normalize", True) and tuple(preprocessor.get(key) or expected) != expected:
            logger.warning(
                "%s: %s is %s; our models normalise with %s, so expect other detections",
                folder / PREPROCESSOR, key, preprocessor[key], expected,
            )  # fmt: skip
    label_map = None if any(name.startswith("mask_head.") for name in weights) else label_map_of(config, weights)
    return {"args": args} | ({} if label_map is None else {"label_map": label_map})


def label_map_of(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return a label map (`LabelMap.to_dict`) from the configuration's names of the classes.

    Category ids are the labels, unless `config_of` wrote the data set's. None if the names are placeholders, do not fit
    the number of logits, or are COCO's: then our own rule applies.
    """
    id2label, ids = config.get("id2label") or {}, config.get(CATEGORY_IDS)
    count = len(weights["class_embed.bias"]) - (variant_of_names(weights) == "detr")
    names = [str(id2label.get(str(i), "")) for i in range(len(id2label))]
    if len(names) != count or any(not name or UNKNOWN_NAMES.fullmatch(name) for name in names):
        return None
    if isinstance(ids, list) and len(ids) == count:
        return {"category_ids": ids, "names": names}
    coco = coco_names()
    # Some of Hugging Face's lists name the ids that COCO does not use.
    if len(names) == len(coco) and all(c in ("N/A", name) for c, name in zip(coco, names, strict=True)):
        return None
    return {"category_ids": [None if name == "N/A" else i for i, name in enumerate(names)], "names": names}


def config_of(args: Any, variant: str, label_map: LabelMap, timm_backbone: bool) -> dict[str, Any]:
    """Return the `config.json` of a plain "detr" or "conditional"; a dilated backbone must be timm's."""
    model_type = next(kind for kind, name in MODEL_TYPES.items() if name == variant)
    stages = args.backbone_stages
    backbone: dict[str, Any] = {"use_timm_backbone": timm_backbone, "use_pretrained_backbone": False}
    if timm_backbone:
        backbone |= {"backbone": args.backbone, "backbone_config": None}
    else:
        shallow = args.backbone in SHALLOW_BACKBONES
        channels = [(64 if shallow else 256) << stage for stage in range(stages)]
        backbone |= {
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet", "num_channels": 3, "embedding_size": 64, "hidden_sizes": channels,
                "depths": list(STAGES[args.backbone][:stages]), "layer_type": "basic" if shallow else "bottleneck",
                "hidden_act": "relu", "out_features": [f"stage{stages}"],
            },
        }  # fmt: skip
    return {
        "architectures": [f"{'Detr' if variant == 'detr' else 'ConditionalDetr'}ForObjectDetection"],
        "model_type": model_type,
        **backbone,
        "dilation": bool(args.dilation) and timm_backbone,
        "num_channels": 3,
        "d_model": args.hidden_dim,
        "num_queries": args.num_queries,
        "position_embedding_type": "sine",
        "activation_function": "relu",
        **{f"{part}_attention_heads": args.nheads for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": args.dim_feedforward for part in ("encoder", "decoder")},
        "encoder_layers": args.enc_layers,
        "decoder_layers": args.dec_layers,
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), args.dropout),
        "is_encoder_decoder": True,
        "id2label": {str(i): name for i, name in enumerate(label_map.names)},
        "label2id": {name: i for i, name in enumerate(label_map.names)},
        CATEGORY_IDS: list(label_map.category_ids),
        "torch_dtype": "float32",
    }


def preprocessor_of(args: Any, variant: str) -> dict[str, Any]:
    """Return the `preprocessor_config.json` with which Hugging Face prepares images as our evaluation does."""
    return {
        "image_processor_type": f"{'Detr' if variant == 'detr' else 'ConditionalDetr'}ImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {"shortest_edge": args.eval_size, "longest_edge": args.max_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "do_pad": True,
    }
