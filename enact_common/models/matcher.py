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

# What a cost that is not finite counts as: more than any other.
LARGE_COST = 1e6


def softmax_class_cost(logits: Tensor) -> Tensor:
    """Logits (..., classes) to the cost of each class: minus its probability, in [-1, 0]."""
    return -logits.softmax(dim=-1)


def focal_class_cost(logits: Tensor) -> Tensor:
    """Logits (..., classes) to the cost of each class: its focal loss as present, less that as absent.

    Source: Zhu et al., "Deformable DETR", ICLR 2021, from which Conditional and Anchor DETR took it; alpha is 0.25
    and gamma 2, whatever the loss has.
    """
    alpha, gamma, floor = 0.25, 2, 1e-8
    p = logits.sigmoid()
    present = alpha * (1 - p) ** gamma * -(p + floor).log()
    absent = (1 - alpha) * p**gamma * -(1 - p + floor).log()
    return present - absent


@dataclass
class Matches:
    """The matching of a batch, for several decoder layers at once.

    P is the number of matched pairs of one layer: min(queries, objects) of each image, summed over the images. It
    is the same in every layer, and so is the image that a pair belongs to.

    Attributes:
        image: int64 (P,), index into the batch, ascending.
        query: int64 (layers, P), the query of each pair.
        target: int64 (layers, P), its object, as index into the batch's objects laid end to end.
    """

    image: Tensor
    query: Tensor
    target: Tensor


class HungarianMatcher(nn.Module):
    """Assigns to each object one query of its image, so that the summed cost is least.

    Queries that are left over are no object. Where an image has more objects than queries, the objects that cost
    most are left over.

    Args:
        cost_class: weight of the class cost.
        cost_bbox: weight of the L1 distance of the boxes (cxcywh, fractions of the image).
        cost_giou: weight of minus their generalized IoU.
        class_cost: logits (..., classes) to the cost of each class.

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
            raise ValueError("at least one matching cost must not be 0 (--set_cost_class, _bbox, _giou)")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.class_cost = class_cost

    def forward(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Match one layer's predictions.

        Args:
            outputs: `pred_logits` (batch, Q, classes), `pred_boxes` (batch, Q, 4) cxcywh in [0, 1].
            targets: for each image `labels` int64 (n,) and `boxes` (n, 4) cxcywh in [0, 1].

        Returns:
            for each image the indices of queries and of objects, int64 (min(Q, n),) each, on the CPU.
        """
        assigned = self.assign(outputs["pred_logits"].unsqueeze(0), outputs["pred_boxes"].unsqueeze(0), targets)
        return [tuple(torch.as_tensor(side, dtype=torch.int64) for side in pair) for pair in assigned[0]]

    def match_layers(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Matches:
        """Match the predictions of all decoder layers with one transfer from the device and one to it.

        Args:
            logits: (layers, batch, Q, classes).
            boxes: (layers, batch, Q, 4) cxcywh in [0, 1].
            targets: as in `forward`.
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
        """For each layer, for each image: matched queries and objects as integer arrays (min(Q, n),)."""
        cost = self.costs(logits, boxes, targets).cpu().numpy()  # (objects of the batch, layers, Q)
        finite = np.isfinite(cost)
        if not finite.all():
            # It must not end the program here: the loss check reports it with its cause.
            warn_of_costs()
            cost = np.where(finite, cost, LARGE_COST)
        splits = np.cumsum([len(target["labels"]) for target in targets])[:-1]
        images = np.split(cost, splits)
        return [[linear_sum_assignment(image[:, layer].T) for image in images] for layer in range(cost.shape[1])]

    @torch.no_grad()
    def costs(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """The cost of every query of an object's own image: float32 (objects of the batch, layers, Q)."""
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
    """Say that costs were not finite: once in a process, as the next batches would only repeat it."""
    logger.warning(
        "matching: costs are not finite and count as %g; where the loss is not finite either, training stops and names "
        "the tensor at fault", LARGE_COST,
    )  # fmt: skip


def build_matcher(args, class_cost: Callable[[Tensor], Tensor] = softmax_class_cost) -> HungarianMatcher:
    """The matcher with the weights of `--set_cost_class`, `--set_cost_bbox` and `--set_cost_giou`."""
    return HungarianMatcher(args.set_cost_class, args.set_cost_bbox, args.set_cost_giou, class_cost)


def build_focal_matcher(args) -> HungarianMatcher:
    """The matcher of the models with a focal loss."""
    return build_matcher(args, focal_class_cost)
