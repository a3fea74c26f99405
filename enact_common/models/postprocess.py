"""Post-processing of a model's outputs to boxes in pixels, for evaluation."""

import torch
from torch import Tensor, nn

from enact_common.boxes import box_cxcywh_to_xyxy


def boxes_in_pixels(boxes: Tensor, target_sizes: Tensor) -> Tensor:
    """Convert boxes (batch, n, 4) from cxcywh in [0, 1] to xyxy pixels; target_sizes (batch, 2) are (height, width)."""
    if target_sizes.shape != (len(boxes), 2):
        raise ValueError(f"target_sizes must be ({len(boxes)}, 2), got {tuple(target_sizes.shape)}")
    height, width = target_sizes.to(boxes).unbind(dim=1)
    scale = torch.stack((width, height, width, height), dim=1).unsqueeze(1)  # (batch, 1, 4)
    return box_cxcywh_to_xyxy(boxes) * scale


class PostProcess(nn.Module):
    """Returns each query's best object class, its probability, and its box in pixels (DETR)."""

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """Decode a batch.

        Args:
            outputs: `pred_logits` (batch, Q, classes + 1), "no object" last; `pred_boxes` (batch, Q, 4) cxcywh in
                [0, 1].
            target_sizes: int (batch, 2), (height, width) in pixels to scale boxes to; for evaluation the image's size
                before any resizing.

        Returns:
            for each image, with n detections, here Q: `scores` (n,) in [0, 1], `labels` int64 (n,), `boxes` (n, 4)
            xyxy in pixels, and `queries` int64 (n,), each detection's query.

        Raises:
            ValueError: target_sizes is not (batch, 2).
        """
        batch = self.select(outputs)
        batch["boxes"] = boxes_in_pixels(batch["boxes"], target_sizes)
        return [dict(zip(batch, image, strict=True)) for image in zip(*batch.values(), strict=True)]

    def select(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the detections as batched tensors (batch, n, ...), with boxes still as the model predicts them."""
        scores, labels = outputs["pred_logits"].float().softmax(dim=-1)[..., :-1].max(dim=-1)  # (batch, Q) each
        queries = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
        return {"scores": scores, "labels": labels, "boxes": outputs["pred_boxes"].float(), "queries": queries}


class TopKPostProcess(PostProcess):
    """Returns the likeliest pairs of query and class, for independent classes (Conditional and Anchor DETR).

    A query can be detected several times, with different labels. `pred_logits` are (batch, Q, classes), before the
    sigmoid; each image has n = min(100, Q classes) detections, in descending order of their scores.
    """

    # COCO's evaluation uses as many detections of an image.
    COUNT = 100

    def select(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        boxes = outputs["pred_boxes"].float()  # (batch, Q, 4)
        probability = outputs["pred_logits"].float().sigmoid()
        num_classes = probability.shape[-1]
        pairs = probability.flatten(1)  # (batch, Q classes)
        scores, index = pairs.topk(min(self.COUNT, pairs.shape[1]), dim=1)  # (batch, n) each
        queries = index // num_classes  # (batch, n)
        query_boxes = boxes.gather(1, queries.unsqueeze(-1).expand(-1, -1, 4))  # (batch, n, 4)
        return {"scores": scores, "labels": index % num_classes, "boxes": query_boxes, "queries": queries}
