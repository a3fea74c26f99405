"""Conditional DETR's backbone: the shared ResNet."""

from enact_common.models.backbone import Backbone, BackboneBase, Joiner, build_backbone

__all__ = ["Backbone", "BackboneBase", "Joiner", "build_backbone"]
