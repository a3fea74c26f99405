"""The bipartite matching between predictions and ground truth (Carion et al., ECCV 2020, equation 1)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from enact_common.boxes import box_cxcywh_to_xyxy, paired_box_giou

logger = logging.getLogger("enact")

# Replaces costs that are not finite; larger than any real cost.
LARGE_COST = 1e6


def softmax_class_cost(logits: Tensor) -> Tensor:
    """Return the cost of each class for logits (..., classes): minus its probability, in [-1, 0]."""
    return -logits.softmax(dim=-1)


def focal_class_cost(logits: Tensor) -> Tensor:
    """Return the cost of each class for logits (..., classes): its focal loss if present, minus that if absent.

    Source: Zhu et al., "Deformable DETR", ICLR 2021, as used by Conditional and Anchor DETR. Alpha is 0.25 and gamma 2,
    independent of the loss's settings.
    """
    alpha, gamma, floor = 0.25, 2, 1e-8
    p = logits.sigmoid()
    present = alpha * (1 - p) ** gamma * -(p + floor).log()
    absent = (1 - alpha) * p**gamma * -(1 - p + floor).log()
    return present - absent


@dataclass
class Matches:
    """The matching of a batch, for several decoder layers.

    P is the number of matched pairs per layer: min(queries, objects) of each image, summed over the images. P and the
    image of each pair are equal in all layers.

    Attributes:
        image: int64 (P,), each pair's index into the batch, ascending.
        query: int64 (layers, P), each pair's query.
        target: int64 (layers, P), each pair's object: its index into the concatenated objects of the batch.
    """

    image: Tensor
    query: Tensor
    target: Tensor


class HungarianMatcher(nn.Module):
    """Assigns one query to each object of an image, at the least total cost.

    Remaining queries are "no object". If an image has more objects than queries, the costliest objects stay unmatched.

    Args:
        cost_class: weight of the class cost.
        cost_bbox: weight of the L1 distance of the boxes (cxcywh, fractions of the image).
        cost_giou: weight of minus their generalized IoU.
        class_cost: maps logits (..., classes) to the cost of each class.

    Raises:
        ValueError: all weights are 0.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        class_cost: Callable[[Tensor], Tensor] = softmax_class_cost,
    ):
        super().__init__()
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("all matching costs are 0: set one of --set_cost_class, --set_cost_bbox, --set_cost_giou")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.class_cost = class_cost

    def forward(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Match the predictions of one layer.

        Args:
            outputs: `pred_logits` (batch, Q, classes), `pred_boxes` (batch, Q, 4) cxcywh in [0, 1].
            targets: for each image `labels` int64 (n,) and `boxes` (n, 4) cxcywh in [0, 1].

        Returns:
            for each image the matched queries and objects, int64 (min(Q, n),) each, on the CPU.
        """
        assigned = self.assign(outputs["pred_logits"].unsqueeze(0), outputs["pred_boxes"].unsqueeze(0), targets)
        return [tuple(torch.as_tensor(side, dtype=torch.int64) for side in pair) for pair in assigned[0]]

    def match_layers(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Matches:
        """Match the predictions of all decoder layers, with one transfer from the device and one back.

        Logits are (layers, batch, Q, classes), boxes (layers, batch, Q, 4) cxcywh in [0, 1], targets as in `forward`.
        """
        assigned = self.assign(logits, boxes, targets)
        offsets = np.cumsum([0] + [len(target["labels"]) for target in targets])
        image = np.concatenate([np.full(len(query), i) for i, (query, _) in enumerate(assigned[0])])
        query = np.stack([np.concatenate([query for query, _ in layer]) for layer in assigned])
        target = np.stack(
            [np.concatenate([objects + offsets[i] for i, (_, objects) in enumerate(layer)]) for layer in assigned]
        )
        packed = torch.from_numpy(np.concatenate((image[None], query, target)).astype(np.int64))
        packed = packed.to(logits.device, non_blocking=True)  # (1 + 2 layers, P)
        return Matches(packed[0], *packed[1:].chunk(2))

    def assign(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> list[list[tuple]]:
        """Return, for each layer and image, matched queries and objects: integer arrays (min(Q, n),)."""
        cost = self.costs(logits, boxes, targets).cpu().numpy()  # (objects of the batch, layers, Q)
        finite = np.isfinite(cost)
        if not finite.all():
            # Continue: the loss check reports the error together with its cause.
            warn_of_costs()
            cost = np.where(finite, cost, LARGE_COST)
        splits = np.cumsum([len(target["labels"]) for target in targets])[:-1]
        images = np.split(cost, splits)
        return [[linear_sum_assignment(image[:, layer].T) for image in images] for layer in range(cost.shape[1])]

    @torch.no_grad()
    def costs(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """Return the cost of each object for every query of its image: float32 (objects of the batch, layers, Q)."""
        counts = torch.tensor([len(target["labels"]) for target in targets])
        image = torch.repeat_interleave(torch.arange(len(targets)), counts)
        image = image.to(logits.device, non_blocking=True)  # (objects,)
        labels = torch.cat([target["labels"] for target in targets])  # (objects,)
        target_boxes = torch.cat([target["boxes"] for target in targets])[:, None, None]  # (objects, 1, 1, 4)

        with torch.autocast(logits.device.type, enabled=False):
            class_cost = self.class_cost(logits.float())[:, image, :, labels]  # (objects, layers, Q)
            candidates = boxes.float()[:, image].transpose(0, 1)  # (objects, layers, Q, 4)
            distance = (candidates - target_boxes).abs().sum(dim=-1)
            giou = paired_box_giou(box_cxcywh_to_xyxy(candidates), box_cxcywh_to_xyxy(target_boxes))
            return self.cost_class * class_cost + self.cost_bbox * distance - self.cost_giou * giou


@cache
def warn_of_costs() -> None:
    """Warn that costs were not finite, once per process."""
    logger.warning(
        "matching: costs are not finite and are replaced by %g; if the loss is not finite either, training stops and "
        "names the faulty tensor", LARGE_COST,
    )  # fmt: skip


def build_matcher(args, class_cost: Callable[[Tensor], Tensor] = softmax_class_cost) -> HungarianMatcher:
    """Build the matcher from `--set_cost_class`, `--set_cost_bbox` and `--set_cost_giou`."""
    return HungarianMatcher(args.set_cost_class, args.set_cost_bbox, args.set_cost_giou, class_cost)


def build_focal_matcher(args) -> HungarianMatcher:
    """Build the matcher for models with a focal loss."""
    return build_matcher(args, focal_class_cost)
