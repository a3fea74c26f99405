"""Box formats and overlaps that the detectors need beside `torchvision.ops`.

Formats: `cxcywh` is (centre x, centre y, width, height), `xyxy` is (left, top, right, bottom). Units are the
caller's: pixels, or fractions of the image's width and height.
"""

import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou, masks_to_boxes

__all__ = [
    "box_cxcywh_to_xyxy",
    "box_xyxy_to_cxcywh",
    "boxes_at_points",
    "generalized_box_iou",
    "masks_to_boxes",
    "paired_box_giou",
]


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) cxcywh to (..., 4) xyxy."""
    return box_convert(boxes, "cxcywh", "xyxy")


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) xyxy to (..., 4) cxcywh."""
    return box_convert(boxes, "xyxy", "cxcywh")


def paired_box_giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalized IoU (Rezatofighi et al., CVPR 2019) of boxes paired by broadcasting.

    `torchvision.ops` has it for all pairs of two lists, and as a loss that indexes by a mask, which makes the host
    wait for the GPU. Here leading axes broadcast and nothing waits.

    Args:
        boxes1, boxes2: (..., 4) xyxy with positive width and height; leading axes broadcast.

    Returns:
        (...), in (-1, 1].
    """
    top_left = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    bottom_right = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    area1 = (boxes1[..., 2:] - boxes1[..., :2]).prod(dim=-1)
    area2 = (boxes2[..., 2:] - boxes2[..., :2]).prod(dim=-1)
    union = area1 + area2 - intersection

    hull_top_left = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    hull_bottom_right = torch.maximum(boxes1[..., 2:], boxes2[..., 2:])
    hull = (hull_bottom_right - hull_top_left).prod(dim=-1)
    return intersection / union - (hull - union) / hull


def boxes_at_points(points: Tensor, offsets: Tensor) -> Tensor:
    """Boxes whose centres are predicted relative to reference points (Meng et al., ICCV 2021, section 3.1).

    Args:
        points: (..., 2), (x, y) in [0, 1]; broadcasts against the offsets' leading axes.
        offsets: (..., 4): of the centre from the point, before the sigmoid; width and height before the sigmoid.

    Returns:
        float32 (..., 4) cxcywh in [0, 1].
    """
    offsets = offsets.float()
    centre = offsets[..., :2] + points.float().logit(eps=1e-5)
    return torch.cat((centre, offsets[..., 2:]), dim=-1).sigmoid()
