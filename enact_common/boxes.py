"""Box formats and overlaps that `torchvision.ops` lacks.

Formats: `cxcywh` is (centre x, centre y, width, height), `xyxy` is (left, top, right, bottom). Units are the
caller's: pixels, or fractions of the image's width and height.
"""

import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou, masks_to_boxes

__all__ = [
    "box_cxcywh_to_xyxy", "box_xyxy_to_cxcywh", "boxes_at_points", "boxes_of_masks", "generalized_box_iou",
    "masks_to_boxes", "paired_box_giou",
]  # fmt: skip


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes (..., 4) from cxcywh to xyxy."""
    return box_convert(boxes, "cxcywh", "xyxy")


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes (..., 4) from xyxy to cxcywh."""
    return box_convert(boxes, "xyxy", "cxcywh")


def paired_box_giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalized IoU (Rezatofighi et al., CVPR 2019) of paired boxes.

    `torchvision.ops` computes it for all pairs of two lists, or as a loss that indexes by a mask, which makes the host
    wait for the GPU. This function does neither.

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
        offsets: (..., 4), before the sigmoid: the centre's offset from the point, then width and height.

    Returns:
        float32 (..., 4) cxcywh in [0, 1].
    """
    offsets = offsets.float()
    centre = offsets[..., :2] + points.float().logit(eps=1e-5)
    return torch.cat((centre, offsets[..., 2:]), dim=-1).sigmoid()


def boxes_of_masks(masks: Tensor) -> Tensor:
    """The smallest box around each mask's pixels, as COCO defines it: a single pixel has a 1 x 1 box.

    `torchvision.ops.masks_to_boxes` ends at the last pixel's index instead of its far edge, so its boxes are a pixel
    too small, and thin masks have no area.

    Args:
        masks: bool (n, height, width).

    Returns:
        float32 (n, 4) xyxy in pixels; zeros for empty masks.
    """
    sides = []
    for across in (1, 2):  # reduce the rows, then the columns
        line = masks.any(dim=across)  # (n, width), then (n, height)
        length = line.shape[1]
        place = torch.arange(length, device=masks.device)
        first = torch.where(line, place, length).amin(dim=1)
        end = torch.where(line, place + 1, 0).amax(dim=1)
        sides += [torch.minimum(first, end), end]
    left, right, top, bottom = sides
    return torch.stack((left, top, right, bottom), dim=1).float()
