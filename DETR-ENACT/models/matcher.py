"""DETR's matching: minus the softmax probability of the object's class, L1 distance and generalized IoU."""

from enact_common.models.matcher import HungarianMatcher, build_matcher

__all__ = ["HungarianMatcher", "build_matcher"]
