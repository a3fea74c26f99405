"""Masks of the objects that DETR finds (Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020,
section 4.4 and appendix A.6): post-processing of the mask head's outputs.

Each query's attention to the encoder's memory is a coarse map of its object. A convolutional head upsamples it to a
mask at a quarter of the image's size with the backbone's finer maps (a feature pyramid: Lin et al., CVPR 2017). Nothing
here depends on ENACT's clustering.
"""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F

# Masks at the image's full size at a time.
FULL_SIZE_CHUNK = 8


def full_size_masks(
    logits: Tensor, padded: tuple[int, int], size: tuple[int, int], original: tuple[int, int]
) -> Iterator[Tensor]:
    """Yield the masks of one image at its original size, bool (..., height, width), up to `FULL_SIZE_CHUNK` at a time.

    As in the original, masks are resized to the model's input size, thresholded, and then sampled.

    Args:
        logits: (n, h', w'), covering the padded batch.
        padded, size, original: (height, width) of the padded batch, of the image within it, and of the resulting masks.
    """
    rows, columns = nearest_indices(size, original, logits.device)
    for part in resized_parts(logits, padded, rows, columns):
        yield part > 0


def resized_parts(logits: Tensor, padded: tuple[int, int], rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Yield logits (n, h', w'), up to `FULL_SIZE_CHUNK` at a time, resized to the padded batch, at rows and columns."""
    for part in logits.split(FULL_SIZE_CHUNK) if len(logits) else ():
        resized = F.interpolate(part.unsqueeze(1).float(), size=padded, mode="bilinear").squeeze(1)
        yield resized[:, rows][:, :, columns]


def nearest_indices(
    size: tuple[int, int], target: tuple[int, int], device: torch.device, centred: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the rows int64 (height,) and columns (width,) that nearest-neighbour sampling takes.

    Only these need thresholding. `size` and `target` are (height, width) of the input and of the result; `centred`
    compares the centres of pixels instead of their upper left corners.
    """
    return tuple(
        ((torch.arange(new, device=device) + centred * 0.5) * (old / new)).long().clamp(max=old - 1)
        for old, new in zip(size, target, strict=True)
    )


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Encode masks bool (n, height, width) as COCO's run-length codes: dicts of `size` and `counts`, a string."""
    # pycocotools takes (height, width, n) in column-major order.
    columns = np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    return [{"size": list(code["size"]), "counts": code["counts"].decode()} for code in coco_mask.encode(columns)]


class PostProcessSegm(nn.Module):
    """Adds each query's mask to the results of `PostProcess`."""

    @torch.no_grad()
    def forward(
        self, results: list[dict], outputs: dict[str, Tensor], sizes: Tensor, original_sizes: Tensor
    ) -> list[dict]:
        """Resize a batch's masks to the size of the original images, image by image.

        Args:
            results: each image's detections, with `queries`.
            outputs: `pred_masks` (batch, Q, h', w'), before the sigmoid.
            sizes: int (batch, 2), (height, width) of each image at the model's input. The batch is padded to the
                largest height and width.
            original_sizes: int (batch, 2), (height, width) of the resulting masks.

        Returns:
            the results with `segmentations`: the detections' masks as COCO's run-length codes, in the same order.
        """
        padded = tuple(sizes.amax(dim=0).tolist())
        images = zip(results, outputs["pred_masks"], sizes.tolist(), original_sizes.tolist(), strict=True)
        return [
            {
                **result,
                "segmentations": [
                    code
                    for masks in full_size_masks(logits[result["queries"]], padded, tuple(size), tuple(original))
                    for code in encode_masks(masks)
                ],
            }
            for result, logits, size, original in images
        ]


class PostProcessPanoptic(nn.Module):
    """Combines the masks of all confident queries, so that each pixel has one segment.

    Each pixel goes to the query whose mask is likeliest there. Queries of the same stuff class are one segment.
    Segments that are too small are dropped, and their pixels go to the next query.

    Modifications:
        - an image is first cut out of its padded batch; the original stretches masks over the whole batch, which is
          equal for a batch of one;
        - queries of the same stuff class stay together when small segments are dropped; the original keeps only the
          first of them and gives the pixels of the others to the next query;
        - an image without confident queries has no segments; the original returns one of class 1.

    Args:
        things: the labels of countable objects; all other labels are stuff.
        threshold: the lowest accepted probability of a query's class, in [0, 1].
    """

    # Segments of at most this many pixels are dropped.
    SMALL = 4
    # The threshold of the published evaluation.
    THRESHOLD = 0.85

    def __init__(self, things: Collection[int], threshold: float = THRESHOLD):
        super().__init__()
        self.things = frozenset(things)
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self, outputs: dict[str, Tensor], sizes: Tensor, original_sizes: Tensor | None = None
    ) -> list[dict[str, Any]]:
        """Decode a batch, image by image.

        Args:
            outputs: `pred_logits` (batch, Q, classes + 1), "no object" last; `pred_masks` (batch, Q, h', w').
            sizes: as in `PostProcessSegm`.
            original_sizes: as in `PostProcessSegm`; None for `sizes`.

        Returns:
            for each image `id_map`, int64 (height, width) on the CPU, each pixel's segment, 0 for none; and `segments`,
            dicts of `id`, from 1; `category_id`, the label; `isthing`; `area` in pixels; and `score`, the highest of
            its queries, in [0, 1].
        """
        original_sizes = sizes if original_sizes is None else original_sizes
        padded = tuple(sizes.amax(dim=0).tolist())
        scores, labels = outputs["pred_logits"].float().softmax(dim=-1).max(dim=-1)  # (batch, Q) each
        confident = (scores > self.threshold) & (labels < outputs["pred_logits"].shape[-1] - 1)
        images = zip(
            scores, labels, confident, outputs["pred_masks"], sizes.tolist(), original_sizes.tolist(), strict=True
        )
        return [
            self.lay_out(score[keep], label[keep], masks[keep], padded, tuple(size), tuple(original))
            for score, label, keep, masks, size, original in images
        ]

    def lay_out(
        self,
        scores: Tensor,
        labels: Tensor,
        logits: Tensor,
        padded: tuple[int, int],
        size: tuple[int, int],
        original: tuple[int, int],
    ) -> dict[str, Any]:
        """Return an image's `id_map` and `segments`, from scores (n,), labels (n,) and masks (n, h', w') of queries."""
        names = labels.tolist()
        # The segment of each query, identified by its first query.
        group = torch.tensor([i if label in self.things else names.index(label) for i, label in enumerate(names)])
        group = group.to(logits.device, torch.int64)
        remaining = torch.arange(len(names), device=logits.device)
        while True:
            place = likeliest(logits[remaining], padded, size, original)
            owner = group[remaining][place] if len(remaining) else place  # (height, width)
            area = torch.bincount(owner.flatten(), minlength=len(names) or 1)
            small = (area > 0) & (area <= self.SMALL)
            if not len(remaining) or not small.any():
                break
            remaining = remaining[~small[group[remaining]]]
        if not len(remaining):
            return {"id_map": torch.zeros(original, dtype=torch.int64), "segments": []}
        present = area.nonzero().flatten()
        number = torch.zeros_like(area)
        number[present] = torch.arange(1, len(present) + 1, device=area.device)
        best = torch.zeros(len(names), device=scores.device).scatter_reduce(0, group, scores, "amax")
        values = zip(present.tolist(), area[present].tolist(), best[present].tolist(), strict=True)
        segments = [
            {"id": i, "category_id": label, "isthing": label in self.things, "area": pixels, "score": score}
            for i, (label, pixels, score) in enumerate(((names[first], *rest) for first, *rest in values), start=1)
        ]
        return {"id_map": number[owner].cpu(), "segments": segments}


def likeliest(logits: Tensor, padded: tuple[int, int], size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Return the likeliest mask at each pixel of an image at its original size, int64 (height, width); 0 without masks.

    Arguments are those of `full_size_masks`. On ties, the first mask is returned.
    """
    rows, columns = nearest_indices(size, original, logits.device, centred=True)
    place = torch.zeros(original, dtype=torch.int64, device=logits.device)
    highest = torch.full(original, -torch.inf, device=logits.device)
    for number, part in enumerate(resized_parts(logits, padded, rows, columns)):
        value, index = part.max(dim=0)
        place = torch.where(value > highest, index + number * FULL_SIZE_CHUNK, place)
        highest = torch.maximum(highest, value)
    return place
