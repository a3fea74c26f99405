"""Anchor DETR's matching: the same costs as Conditional DETR's."""

from enact_common.matcher import HungarianMatcher, build_focal_matcher

__all__ = ["HungarianMatcher", "build_matcher"]

build_matcher = build_focal_matcher
