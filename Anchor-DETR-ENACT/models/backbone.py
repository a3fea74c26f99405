"""Anchor DETR's backbone: the shared ResNet, without position encodings, which the transformer computes."""

from enact_common.models.backbone import Backbone, BackboneBase, build_resnet

__all__ = ["Backbone", "BackboneBase", "build_backbone"]


def build_backbone(args) -> Backbone:
    """Build the backbone from the arguments, with the maps of all stages if `--num_feature_levels` needs them."""
    return build_resnet(args, return_interm_layers=args.num_feature_levels > 1)
