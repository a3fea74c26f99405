"""Flag names and groups that checkpoints and checks refer to."""

import argparse
from typing import Any

# The learning rates of the published trainings.
ENACT_LR = 5e-5
PLAIN_LR = 1e-4

# Kinds of data sets: boxes (and instance masks with `--masks`), and panoptic segments.
COCO, PANOPTIC = "coco", "coco_panoptic"

# The value of `--batch_size` that measures what fits.
AUTO_BATCH = "auto"

# The trackers of `--log`: the package of each, and the extra that installs it.
TRACKERS = {"tensorboard": ("tensorboard", "logging"), "wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow")}

# Argument groups to which variants add flags.
MODEL = "model"
LOSSES = "matching and losses"

# Flags that decide which tensors a model has and what they mean: a checkpoint fits only a run that agrees on them.
MODEL_FLAGS = (
    "encoder_attention", "smoothing_sigma", "backbone", "backbone_stages", "dilation", "backbone_norm",
    "position_embedding", "enc_layers", "dec_layers", "dim_feedforward", "hidden_dim", "nheads", "num_queries",
    "pre_norm", "num_classes", "num_feature_levels", "num_query_position", "num_query_pattern", "spatial_prior",
    "attention_type", "separate_images", "masks", "enact_scale_logits",
)  # fmt: skip

# Members of `MODEL_FLAGS` that only ENACT uses.
ENACT_FLAGS = ("smoothing_sigma", "enact_scale_logits")

# Flags of ENACT and its rivals that work with any weights. Flags that are not given are taken from the checkpoint.
CLUSTERING_FLAGS = (
    "enact_clusters", "enact_order", "enact_per_image", "enact_mask_padding", "enact_max_clusters", "enact_temperature",
    "enact_kernels", "token_budget",
)  # fmt: skip

# Booleans with a `--no-` form, because a variant may switch them on by default.
NEGATABLE_FLAGS = ("dilation",)


def with_flags(args: argparse.Namespace, **values: Any) -> argparse.Namespace:
    """Return a copy of parsed arguments with these values replaced; the original is never changed."""
    return argparse.Namespace(**{**vars(args), **values})
