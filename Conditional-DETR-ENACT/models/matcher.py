"""Conditional DETR's matching: the focal cost of the object's class, L1 distance and generalized IoU."""

from enact_common.models.matcher import HungarianMatcher
from enact_common.models.matcher import build_focal_matcher as build_matcher

__all__ = ["HungarianMatcher", "build_matcher"]
