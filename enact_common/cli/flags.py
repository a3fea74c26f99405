"""Names of flags, and groups of flags, that checkpoints and checks refer to."""

import argparse
from typing import Any

# The learning rates of the published trainings.
ENACT_LR = 5e-5
PLAIN_LR = 1e-4

# Kinds of data sets: boxes, with `--masks` instance masks too; things and stuff.
COCO, PANOPTIC = "coco", "coco_panoptic"

# The groups of flags that variants add to.
MODEL = "model"
LOSSES = "matching and losses"

# Flags that decide which tensors a model has and what they mean: a checkpoint fits only a run that agrees on them.
MODEL_FLAGS = (
    "encoder_attention", "smoothing_sigma", "backbone", "backbone_stages", "dilation", "backbone_norm",
    "position_embedding", "enc_layers", "dec_layers", "dim_feedforward", "hidden_dim", "nheads", "num_queries",
    "pre_norm", "num_classes", "num_feature_levels", "num_query_position", "num_query_pattern", "spatial_prior",
    "attention_type", "separate_images", "masks", "enact_scale_logits",
)  # fmt: skip

# Those of `MODEL_FLAGS` that mean nothing to plain attention.
ENACT_FLAGS = ("smoothing_sigma", "enact_scale_logits")

# Flags of ENACT that any weights work with. One that is not given is taken from the checkpoint.
CLUSTERING_FLAGS = (
    "enact_clusters", "enact_order", "enact_per_image", "enact_mask_padding", "enact_max_clusters", "enact_temperature",
)  # fmt: skip

# Booleans that can also be switched off, `--no-dilation`: a variant may have them on by default.
NEGATABLE_FLAGS = ("dilation",)


def with_flags(args: argparse.Namespace, **values: Any) -> argparse.Namespace:
    """A copy of parsed arguments with some of them resolved; nothing writes into arguments after parsing."""
    return argparse.Namespace(**{**vars(args), **values})
