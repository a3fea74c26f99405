"""Masks of the objects that DETR finds (Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020,
section 4.4 and appendix A.6): the mask head, its losses, and what becomes of its outputs.

Each query's attention to the encoder's memory is a coarse picture of where its object is. A convolutional head makes a
mask of it on a quarter of the image's size, step by step with the backbone's finer maps (a feature pyramid: Lin et al.,
CVPR 2017). The clustering of ENACT is the encoder's own: nothing here depends on it.
"""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F

# Masks that are held at the image's size at a time.
FULL_SIZE_CHUNK = 8


def full_size_masks(
    logits: Tensor, padded: tuple[int, int], size: tuple[int, int], original: tuple[int, int]
) -> Iterator[Tensor]:
    """The masks of one image at the size that it was stored in, a few at a time.

    As in the original, masks are first brought to the size that the model saw, decided there, and then sampled.

    Args:
        logits: (n, h', w'), of the padded batch's extent.
        padded: (height, width) of the padded batch.
        size: (height, width) of the image in it.
        original: (height, width) that the masks shall have.

    Yields:
        bool, up to `FULL_SIZE_CHUNK` masks (..., height, width).
    """
    rows, columns = sampled(size, original, logits.device)
    for part in logits.split(FULL_SIZE_CHUNK):
        if len(part):
            seen = F.interpolate(part.unsqueeze(1).float(), size=padded, mode="bilinear").squeeze(1)
            yield seen[:, rows][:, :, columns] > 0


def sampled(
    size: tuple[int, int], wanted: tuple[int, int], device: torch.device, centred: bool = False
) -> tuple[Tensor, Tensor]:
    """The rows and columns that nearest-neighbour sampling takes: no more of a mask has to be decided.

    Args:
        size: (height, width) of what is sampled.
        wanted: (height, width) of the result.
        device: of the indices.
        centred: compare the middles of pixels, rather than their upper left corners.

    Returns:
        int64 (height,) and (width,).
    """
    return tuple(
        ((torch.arange(new, device=device) + centred * 0.5) * (old / new)).long().clamp(max=old - 1)
        for old, new in zip(size, wanted, strict=True)
    )


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Masks bool (n, height, width) as COCO's run-length codes: dicts of `size` and `counts`, a text."""
    # pycocotools wants (height, width, n), the columns' pixels side by side.
    columns = np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    return [{"size": list(code["size"]), "counts": code["counts"].decode()} for code in coco_mask.encode(columns)]


class PostProcessSegm(nn.Module):
    """Adds each query's mask to what `PostProcess` found."""

    @torch.no_grad()
    def forward(
        self, results: list[dict], outputs: dict[str, Tensor], sizes: Tensor, original_sizes: Tensor
    ) -> list[dict]:
        """Bring a batch's masks to the size of the original images, image by image.

        Args:
            results: of each image, `queries` among others.
            outputs: `pred_masks` (batch, Q, h', w'), before the sigmoid.
            sizes: int (batch, 2), (height, width) of each image as the model saw it. The batch is padded to the largest
                of each.
            original_sizes: int (batch, 2), (height, width) that the masks shall have.

        Returns:
            the results with `segmentations` each: the detections' masks as COCO's run-length codes, in their order.
        """
        padded = tuple(sizes.amax(dim=0).tolist())
        found = zip(results, outputs["pred_masks"], sizes.tolist(), original_sizes.tolist(), strict=True)
        return [
            {
                **result,
                "segmentations": [
                    code
                    for masks in full_size_masks(logits[result["queries"]], padded, tuple(size), tuple(original))
                    for code in encode_masks(masks)
                ],
            }
            for result, logits, size, original in found
        ]


class PostProcessPanoptic(nn.Module):
    """Lays the masks of all queries that are sure of a class over the image, so that each pixel has one segment.

    Each pixel goes to the query whose mask is likeliest there. Queries of the same stuff are one segment; segments that
    are too small are left out, and their pixels go to the next.

    Modifications:
        - an image is cut out of its padded batch before anything else; the original stretches its masks over the whole
          batch, which is the same for a batch of one;
        - where small segments are left out, queries of the same stuff stay together; the original takes the first of
          them alone, and hands the pixels of the others to whichever query is next;
        - where nothing is found, there is no segment, in place of one of class 1.

    Args:
        things: the labels of what can be counted; all others are stuff.
        threshold: least probability of a query's class, in [0, 1].
    """

    # Segments need more pixels than this.
    SMALL = 4
    # The least probability of the published evaluation.
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
            outputs: `pred_logits` (batch, Q, classes + 1), the last being no object; `pred_masks` (batch, Q, h', w').
            sizes: as for `PostProcessSegm`.
            original_sizes: likewise; None for `sizes`.

        Returns:
            for each image `id_map`, int64 (height, width) on the CPU, each pixel's segment, 0 for none; and `segments`,
            dicts of `id`, from 1; `category_id`, the label; `isthing`; `area` in pixels; and `score`, the likeliest
            query's, in [0, 1].
        """
        original_sizes = sizes if original_sizes is None else original_sizes
        padded = tuple(sizes.amax(dim=0).tolist())
        scores, labels = outputs["pred_logits"].float().softmax(dim=-1).max(dim=-1)  # (batch, Q) each
        sure = (scores > self.threshold) & (labels < outputs["pred_logits"].shape[-1] - 1)
        images = zip(scores, labels, sure, outputs["pred_masks"], sizes.tolist(), original_sizes.tolist(), strict=True)
        return [
            self.lay_out(score[kept], label[kept], masks[kept], padded, tuple(size), tuple(original))
            for score, label, kept, masks, size, original in images
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
        """One image's `id_map` and `segments`, from n queries' scores (n,), labels (n,) and masks (n, h', w')."""
        names = labels.tolist()
        # The segment of each query, named by its first query.
        group = torch.tensor([i if label in self.things else names.index(label) for i, label in enumerate(names)])
        group = group.to(logits.device, torch.int64)
        kept = torch.arange(len(names), device=logits.device)
        while True:
            place = likeliest(logits[kept], padded, size, original)
            owner = group[kept][place] if len(kept) else place  # (height, width)
            area = torch.bincount(owner.flatten(), minlength=len(names) or 1)
            small = (area > 0) & (area <= self.SMALL)
            if not len(kept) or not small.any():
                break
            kept = kept[~small[group[kept]]]
        if not len(kept):
            return {"id_map": torch.zeros(original, dtype=torch.int64), "segments": []}
        present = area.nonzero().flatten()
        number = torch.zeros_like(area)
        number[present] = torch.arange(1, len(present) + 1, device=area.device)
        best = torch.zeros(len(names), device=scores.device).scatter_reduce(0, group, scores, "amax")
        segments = [
            {
                "id": i,
                "category_id": names[first],
                "isthing": names[first] in self.things,
                "area": pixels,
                "score": score,
            }
            for i, (first, pixels, score) in enumerate(
                zip(present.tolist(), area[present].tolist(), best[present].tolist(), strict=True), start=1
            )
        ]
        return {"id_map": number[owner].cpu(), "segments": segments}


def likeliest(logits: Tensor, padded: tuple[int, int], size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Which mask is likeliest at each pixel of an image as it was stored, the first where several are.

    Args:
        logits: (n, h', w'), of the padded batch's extent.
        padded, size, original: as for `full_size_masks`.

    Returns:
        int64 (height, width), 0 where there is no mask.
    """
    rows, columns = sampled(size, original, logits.device, centred=True)
    place = torch.zeros(original, dtype=torch.int64, device=logits.device)
    highest = torch.full(original, -torch.inf, device=logits.device)
    for number, part in enumerate(logits.split(FULL_SIZE_CHUNK) if len(logits) else ()):
        seen = F.interpolate(part.unsqueeze(1).float(), size=padded, mode="bilinear").squeeze(1)
        value, index = seen[:, rows][:, :, columns].max(dim=0)
        place = torch.where(value > highest, index + number * FULL_SIZE_CHUNK, place)
        highest = torch.maximum(highest, value)
    return place
