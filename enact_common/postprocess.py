"""From a model's outputs to boxes in pixels, in the form that evaluation wants."""

import torch
from torch import Tensor, nn

from enact_common.boxes import box_cxcywh_to_xyxy


class PostProcess(nn.Module):
    """Each query's best class that is an object, its probability, and its box in pixels (DETR)."""

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """Decode a batch.

        Args:
            outputs: `pred_logits` (batch, Q, classes + 1), the last being no object; `pred_boxes` (batch, Q, 4)
                cxcywh in [0, 1].
            target_sizes: int (batch, 2), the (height, width) in pixels that boxes shall refer to: for evaluation
                the image's size before any resizing.

        Returns:
            for each image `scores` (Q,) in [0, 1], `labels` int64 (Q,), `boxes` (Q, 4) xyxy in pixels; in the order
            of the queries.

        Raises:
            ValueError: target_sizes is not (batch, 2).
        """
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        if target_sizes.shape != (len(logits), 2):
            raise ValueError(f"target_sizes must be ({len(logits)}, 2), got {tuple(target_sizes.shape)}")
        scores, labels = logits.softmax(dim=-1)[..., :-1].max(dim=-1)  # (batch, Q) each
        height, width = target_sizes.to(boxes).unbind(dim=1)
        scale = torch.stack((width, height, width, height), dim=1).unsqueeze(1)  # (batch, 1, 4)
        boxes = box_cxcywh_to_xyxy(boxes) * scale
        return [
            {"scores": score, "labels": label, "boxes": box}
            for score, label, box in zip(scores, labels, boxes, strict=True)
        ]
