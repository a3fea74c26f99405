"""Detection of small objects in large images: in overlapping slices of the image and in the whole image, merged.

A detector resizes each image to its evaluation size, which makes small objects too small. A slice is enlarged instead.
"""

import math
from itertools import product

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_area

from enact_common.inference.detector import Detections, LoadedDetector
from enact_common.utils.errors import UserError

# The fraction of a slice's side that it shares with the next one. Objects up to this size are whole in some slice.
OVERLAP = 0.2

# Least side of a slice, pixels.
LEAST_SIDE = 32

# If two boxes of one class have a higher IoU, only the likelier is kept.
MERGE_IOU = 0.5

# A box is cut off if it ends this close to a slice's border inside the image, as a fraction of the slice's side.
CUT_MARGIN = 0.01


def check_sliceable(detector: LoadedDetector, side: int) -> None:
    """Refuse tiny slices, and detectors with masks: a mask of a slice cannot be merged with that of another one."""
    if side < LEAST_SIDE:
        raise UserError(
            f"--slice {side}: slices so small show no whole object and are countless; pass at least {LEAST_SIDE}"
        )
    if getattr(detector.args, "masks", False):
        raise UserError("--slice merges boxes, not masks, and this checkpoint has a mask head; leave --slice out")


def slice_starts(length: int, side: int) -> list[int]:
    """Return where slices of `side` pixels start so that they cover `length` pixels evenly, at least overlapping by
    `OVERLAP`; only 0 if one slice is enough."""
    if length <= side:
        return [0]
    shared = round(side * OVERLAP)
    count = max(math.ceil((length - shared) / (side - shared)), 2)
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def detect_in_slices(detector: LoadedDetector, pixels: Tensor, side: int, threshold: float | None = None) -> Detections:
    """Detect objects in an image, uint8 (3, height, width), and in its slices, one by one, and merge the results.

    One by one, because with ENACT's default settings a slice's result would depend on the other slices of its batch.

    Args:
        detector: without masks, see `check_sliceable`.
        pixels: the image.
        side: height and width of a slice in pixels; a shorter image side is covered by one slice.
        threshold: least score; None for the detector's threshold.

    Returns:
        the merged detections. `queries` are those of the slice, or of the whole image, that a detection comes from.
    """
    height, width = pixels.shape[-2:]
    whole = detector.detect(pixels, threshold)
    if max(height, width) <= side:
        return whole
    parts, cut = [whole], [torch.zeros(len(whole), dtype=torch.bool)]
    for top, left in product(slice_starts(height, side), slice_starts(width, side)):
        bottom, right = min(top + side, height), min(left + side, width)
        found = detector.detect(pixels[:, top:bottom, left:right].contiguous(), threshold)
        found.boxes = found.boxes + torch.tensor([left, top, left, top])
        parts.append(found)
        # How far each side of a box is from the slice's border; a border of the image cuts nothing.
        borders = torch.tensor([left, top, right, bottom])
        inside = borders != torch.tensor([0, 0, width, height])
        cut.append((((found.boxes - borders).abs() <= CUT_MARGIN * side) & inside).any(dim=1))
    boxes, scores, labels, queries = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("boxes", "scores", "labels", "queries")
    )
    names, ids = ([value for part in parts for value in getattr(part, name)] for name in ("names", "category_ids"))
    kept = merged(boxes, scores, labels, torch.cat(cut))
    chosen = kept.tolist()
    return Detections(
        boxes[kept], scores[kept], labels[kept], [names[i] for i in chosen], [ids[i] for i in chosen], queries[kept]
    )


def merged(boxes: Tensor, scores: Tensor, labels: Tensor, cut: Tensor) -> Tensor:
    """Return the indices of the boxes (n, 4) xyxy to keep, by falling score: non-maximum suppression within each class.

    A box that a slice's border cuts off (`cut`, bool (n,)) is dropped if most of it lies in a whole box of its class.
    """
    candidates = torch.arange(len(boxes))
    if cut.any():
        whole = candidates[~cut]
        whole = whole[batched_nms(boxes[whole], scores[whole], labels[whole], MERGE_IOU)]
        part = candidates[cut]
        low = torch.maximum(boxes[part, None, :2], boxes[whole, :2])
        high = torch.minimum(boxes[part, None, 2:], boxes[whole, 2:])
        shared = (high - low).clamp(min=0).prod(dim=-1)  # (parts, whole)
        inside = shared > MERGE_IOU * box_area(boxes[part])[:, None]
        part = part[~(inside & (labels[part, None] == labels[whole])).any(dim=1)]
        candidates = torch.cat([whole, part])
    return candidates[batched_nms(boxes[candidates], scores[candidates], labels[candidates], MERGE_IOU)]
