"""DETR's matching: minus the softmax probability of the object's class, L1 distance and generalized IoU."""

from enact_common.matcher import HungarianMatcher

__all__ = ["HungarianMatcher", "build_matcher"]


def build_matcher(args) -> HungarianMatcher:
    """The matcher with the weights of `--set_cost_class`, `--set_cost_bbox` and `--set_cost_giou`."""
    return HungarianMatcher(args.set_cost_class, args.set_cost_bbox, args.set_cost_giou)
