"""Anchor DETR's backbone: the shared ResNet, alone: positions are encoded in the transformer."""

from enact_common.models.backbone import Backbone, BackboneBase, build_resnet

__all__ = ["Backbone", "BackboneBase", "build_backbone"]


def build_backbone(args) -> Backbone:
    """The backbone that the arguments ask for, with all stages' maps where `--num_feature_levels` needs them."""
    return build_resnet(args, return_interm_layers=args.num_feature_levels > 1)
