"""DETR (Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020)."""

from torch import Tensor, nn

from enact_common.cli.flags import PANOPTIC
from enact_common.data.categories import coco_names
from enact_common.models.criterion import SetCriterion, SoftmaxClassLoss, build_weights
from enact_common.models.detector import Detector, num_classes_of
from enact_common.models.mask_head import DETRsegm
from enact_common.models.mask_losses import MaskCriterion
from enact_common.models.postprocess import PostProcess
from enact_common.models.segmentation import PostProcessPanoptic, PostProcessSegm

from .backbone import build_backbone
from .matcher import build_matcher
from .transformer import build_transformer


class DETR(Detector):
    """Detects a fixed number of objects in parallel.

    Args:
        num_classes: labels; one more logit is for "no object".
        backbone, transformer, num_queries, aux_loss: as in `Detector`.
    """

    def __init__(
        self, backbone: nn.Module, transformer: nn.Module, num_classes: int, num_queries: int, aux_loss: bool = False
    ):
        super().__init__(backbone, transformer, num_classes + 1, num_queries, aux_loss)

    def predict(self, decoded: Tensor) -> tuple[Tensor, Tensor]:
        """Map decoded queries (layers, batch, Q, d) to logits (..., num_classes + 1) and boxes (..., 4) cxcywh."""
        return self.class_embed(decoded), self.bbox_embed(decoded).float().sigmoid()


def build(args) -> tuple[DETR | DETRsegm, SetCriterion, dict[str, nn.Module]]:
    """Return (model, criterion, postprocessors), built from the arguments; with a mask head if `--masks`."""
    num_classes = num_classes_of(args)
    transformer = build_transformer(args)
    model = DETR(build_backbone(args), transformer, num_classes, args.num_queries, args.aux_loss)
    class_loss = SoftmaxClassLoss(num_classes, args.eos_coef)
    postprocessors: dict[str, nn.Module] = {"bbox": PostProcess()}
    if not args.masks:
        criterion = SetCriterion(num_classes, build_matcher(args), build_weights(args, class_weight=1), class_loss)
        return model, criterion, postprocessors
    model = DETRsegm(model, args.nheads, frozen=bool(args.frozen_weights))
    weights = build_weights(args, class_weight=1, loss_mask=args.mask_loss_coef, loss_dice=args.dice_loss_coef)
    criterion = MaskCriterion(num_classes, build_matcher(args), weights, class_loss)
    if args.dataset_file == PANOPTIC:
        # COCO's things; for other data sets, the run sets the things that the annotations name.
        things = range(len(coco_names()))
        postprocessors["panoptic"] = PostProcessPanoptic(things, args.panoptic_threshold)
    else:
        postprocessors["segm"] = PostProcessSegm()
    return model, criterion, postprocessors
