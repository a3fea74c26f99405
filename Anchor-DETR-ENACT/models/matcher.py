"""Anchor DETR's matching: the same costs as Conditional DETR's."""

from enact_common.models.matcher import HungarianMatcher
from enact_common.models.matcher import build_focal_matcher as build_matcher

__all__ = ["HungarianMatcher", "build_matcher"]
