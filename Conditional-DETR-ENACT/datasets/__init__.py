"""Conditional DETR's data: COCO-format annotations with DETR's augmentation."""

from enact_common.data.build import build_dataset

__all__ = ["build_dataset"]
