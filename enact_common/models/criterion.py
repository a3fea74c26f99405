"""The set prediction loss (Carion et al., ECCV 2020, section 3.1), for all decoder layers in one pass.

The classification loss is passed in: `SoftmaxClassLoss` (DETR) or `FocalClassLoss` (Conditional and Anchor DETR).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from enact_common.boxes import box_cxcywh_to_xyxy, paired_box_giou
from enact_common.models.matcher import HungarianMatcher, Matches
from enact_common.utils.distributed import all_reduce_mean


def build_weights(args, class_weight: float, **others: float) -> dict[str, float]:
    """Return the weight of each loss in the total, by name, including earlier decoder layers with `aux_loss`.

    `class_weight` is the weight of the classification loss, `others` are the weights of a model's additional losses.
    """
    weights = {"loss_ce": class_weight, "loss_bbox": args.bbox_loss_coef, "loss_giou": args.giou_loss_coef}
    weights |= others
    aux_layers = range(args.dec_layers - 1 if args.aux_loss else 0)
    return weights | {f"{name}_{i}": weight for i in aux_layers for name, weight in weights.items()}


class SoftmaxClassLoss(nn.Module):
    """Cross-entropy over the classes and a last class for "no object" (DETR).

    Args:
        num_classes: labels.
        eos_coef: weight of "no object"; every other class has weight 1.
    """

    def __init__(self, num_classes: int, eos_coef: float):
        super().__init__()
        class_weight = torch.ones(num_classes + 1)
        class_weight[-1] = eos_coef
        self.register_buffer("class_weight", class_weight, persistent=False)

    def forward(self, logits: Tensor, classes: Tensor, objects: Tensor) -> Tensor:
        """Return the weighted mean over each layer's queries: (layers,).

        Args:
            logits: (layers, batch, Q, num_classes + 1).
            classes: int64 (layers, batch, Q), num_classes for no object.
            objects: (), objects in the batch; ignored here.
        """
        loss = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), self.class_weight, reduction="none")
        return loss.view_as(classes).sum(dim=(1, 2)) / self.class_weight[classes].sum(dim=(1, 2))

    def predicts_object(self, logits: Tensor) -> Tensor:
        """Whether a query's likeliest class is an object: (layers, batch, Q, classes) to bool (layers, batch, Q)."""
        return logits.argmax(dim=-1) != logits.shape[-1] - 1


class FocalClassLoss(nn.Module):
    """The focal loss of independent classes (Lin et al., ICCV 2017): "no object" is a low probability of every class.

    Modifications:
        - `cardinality_error`, which is only logged, counts queries with a class of probability above 0.5. The originals
          use DETR's rule, which counts every query whose likeliest class is not the last one.

    Args:
        alpha: weight of classes that are present; absent classes have weight 1 - alpha.
    """

    GAMMA = 2.0

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def forward(self, logits: Tensor, classes: Tensor, objects: Tensor) -> Tensor:
        """The sum over each layer's queries and classes, divided by the number of objects: (layers,).

        Args:
            logits: (layers, batch, Q, num_classes).
            classes: int64 (layers, batch, Q), num_classes for no object.
            objects: (), objects in the batch, at least 1.
        """
        present = logits.new_zeros(*logits.shape[:3], logits.shape[3] + 1)
        present.scatter_(-1, classes.unsqueeze(-1), 1)  # (layers, batch, Q, num_classes + 1)
        loss = sigmoid_focal_loss(logits, present[..., :-1], self.alpha, self.GAMMA, reduction="none")
        return loss.sum(dim=(1, 2, 3)) / objects

    def predicts_object(self, logits: Tensor) -> Tensor:
        """Whether a query has a class above 0.5: (layers, batch, Q, classes) to bool (layers, batch, Q)."""
        return logits.amax(dim=-1) > 0


class SetCriterion(nn.Module):
    """Matches predictions to objects, then supervises the class of every query and the box of each matched one.

    Args:
        weight_dict: weight of each loss in the total, by name. Losses without a weight are only logged.
        class_loss: maps (logits, classes, objects) to the classification loss of each layer.
        losses: any of "labels", "boxes", "cardinality".
    """

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weight_dict: dict[str, float],
        class_loss: SoftmaxClassLoss | FocalClassLoss,
        losses: tuple[str, ...] = ("labels", "boxes", "cardinality"),
    ):
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.class_loss = class_loss
        self.losses = losses

    def forward(self, outputs: dict, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Compute all losses, unweighted.

        Args:
            outputs: `pred_logits` (batch, Q, logits), `pred_boxes` (batch, Q, 4) cxcywh in [0, 1], and optionally
                `aux_outputs`, a list with the same keys for each earlier decoder layer.
            targets: for each image `labels` int64 (n,) in 0..num_classes - 1, `boxes` (n, 4) cxcywh in [0, 1].

        Returns:
            scalars by name, as selected by `losses`: `loss_ce, loss_bbox, loss_giou`, and, without gradient,
            `class_error` (percent) and `cardinality_error` (objects). Losses of earlier layers have the layer's number
            as suffix (`loss_ce_0`); `class_error` is only of the last layer.
        """
        layers = [*outputs.get("aux_outputs", []), outputs]
        logits = torch.stack([layer["pred_logits"] for layer in layers]).float()  # (layers, batch, Q, logits)
        boxes = torch.stack([layer["pred_boxes"] for layer in layers]).float()  # (layers, batch, Q, 4)
        with torch.autocast(logits.device.type, enabled=False):
            matches = self.matcher.match_layers(logits, boxes, targets)
            objects = self.count_objects(targets, boxes.device)
            per_layer = {}
            for loss in self.losses:
                per_layer |= getattr(self, f"loss_{loss}")(logits, boxes, targets, matches, objects)
            last_layer = self.last_layer_losses(outputs, targets, matches, objects)

        # One unbind for all layers, so that their backward pass is one kernel.
        scalars = {name: values.unbind() for name, values in per_layer.items()}
        result = {name: values[-1] for name, values in scalars.items()}
        for i in range(len(layers) - 1):
            result |= {f"{name}_{i}": values[i] for name, values in scalars.items() if name != "class_error"}
        return result | last_layer

    def last_layer_losses(
        self, outputs: dict, targets: list[dict[str, Tensor]], matches: Matches, objects: Tensor
    ) -> dict[str, Tensor]:
        """Return a subclass's additional losses of the last decoder layer: scalars by name, none here."""
        return {}

    def count_objects(self, targets: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Return the number of objects that losses are divided by: float32 (), at least 1.

        In training it is the mean over all processes, so that their mean gradient is that of one large batch. In
        evaluation it is this batch's number: an all-reduce would hang if processes had different numbers of batches.
        """
        count = sum(len(target["labels"]) for target in targets)
        objects = all_reduce_mean(count, device) if self.training else torch.full((), float(count), device=device)
        return objects.clamp(min=1)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses, which training minimises."""
        weighted = [name for name in losses if name in self.weight_dict]
        weights = torch.tensor([float(self.weight_dict[name]) for name in weighted])
        values = torch.stack([losses[name] for name in weighted])
        return values @ weights.to(values.device, non_blocking=True)

    def loss_labels(self, logits, boxes, targets, matches: Matches, objects) -> dict[str, Tensor]:
        """The classification loss of all queries, and the last layer's class error on matched queries."""
        layer = torch.arange(len(logits), device=logits.device).unsqueeze(1)  # (layers, 1)
        labels = torch.cat([target["labels"] for target in targets])[matches.target]  # (layers, P)
        classes = logits.new_full(logits.shape[:3], self.num_classes, dtype=torch.int64)  # (layers, batch, Q)
        classes[layer, matches.image, matches.query] = labels
        loss = self.class_loss(logits, classes, objects)  # (layers,)

        # A batch without objects has an error of 100 percent, as in the original.
        predicted = logits[-1, matches.image, matches.query[-1]].argmax(dim=-1)  # (P,)
        hits = (predicted == labels[-1]).sum() / max(labels.shape[1], 1)
        return {"loss_ce": loss, "class_error": (100 - 100 * hits).unsqueeze(0)}

    def loss_boxes(self, logits, boxes, targets, matches: Matches, objects) -> dict[str, Tensor]:
        """L1 distance (cxcywh) and 1 - generalized IoU of matched boxes, divided by the number of objects."""
        layer = torch.arange(len(boxes), device=boxes.device).unsqueeze(1)  # (layers, 1)
        predicted = boxes[layer, matches.image, matches.query]  # (layers, P, 4)
        target_boxes = torch.cat([target["boxes"] for target in targets])[matches.target]  # (layers, P, 4)
        distance = (predicted - target_boxes).abs().sum(dim=(1, 2))
        giou = paired_box_giou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(target_boxes))  # (layers, P)
        return {"loss_bbox": distance / objects, "loss_giou": (1 - giou).sum(dim=1) / objects}

    @torch.no_grad()
    def loss_cardinality(self, logits, boxes, targets, matches: Matches, objects) -> dict[str, Tensor]:
        """The mean difference between the number of predicted and actual objects of an image, for the log."""
        counts = torch.tensor([len(target["labels"]) for target in targets])
        counts = counts.to(logits.device, non_blocking=True)  # (batch,)
        predicted = self.class_loss.predicts_object(logits).sum(dim=-1)  # (layers, batch)
        return {"cardinality_error": (predicted - counts).abs().float().mean(dim=1)}
