"""Conditional DETR (Meng et al., "Conditional DETR for Fast Training Convergence", ICCV 2021)."""

from torch import Tensor, nn

from enact_common.boxes import boxes_at_points
from enact_common.models.criterion import FocalClassLoss, SetCriterion, build_weights
from enact_common.models.detector import Detector, num_classes_of
from enact_common.models.layers import PRIOR_LOGIT
from enact_common.models.postprocess import TopKPostProcess

from .backbone import build_backbone
from .matcher import build_matcher
from .transformer import build_transformer


class ConditionalDETR(Detector):
    """Detects a fixed number of objects in parallel, each near a reference point of its query.

    Args:
        transformer: returns the decoded queries and their reference points.
        num_classes: labels, one logit each; "no object" is a low probability of all labels.
        backbone, num_queries, aux_loss: as in `Detector`.
    """

    def __init__(
        self, backbone: nn.Module, transformer: nn.Module, num_classes: int, num_queries: int, aux_loss: bool = False
    ):
        super().__init__(backbone, transformer, num_classes, num_queries, aux_loss)
        nn.init.constant_(self.class_embed.bias, PRIOR_LOGIT)
        # Initially, boxes are centred at the reference points.
        nn.init.zeros_(self.bbox_embed.layers[-1].weight)
        nn.init.zeros_(self.bbox_embed.layers[-1].bias)

    def predict(self, decoded: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Map queries (layers, batch, Q, d) and points (batch, Q, 2) to logits (..., num_classes), boxes (..., 4)."""
        queries, points = decoded
        return self.class_embed(queries), boxes_at_points(points, self.bbox_embed(queries))


def build(args) -> tuple[ConditionalDETR, SetCriterion, dict[str, nn.Module]]:
    """Return (model, criterion, postprocessors), built from the arguments."""
    num_classes = num_classes_of(args)
    backbone, transformer = build_backbone(args), build_transformer(args)
    model = ConditionalDETR(backbone, transformer, num_classes, args.num_queries, args.aux_loss)
    weights = build_weights(args, args.cls_loss_coef)
    criterion = SetCriterion(num_classes, build_matcher(args), weights, FocalClassLoss(args.focal_alpha))
    return model, criterion, {"bbox": TopKPostProcess()}
