"""Anchor DETR (Wang et al., "Anchor DETR: Query Design for Transformer-Based Object Detection", AAAI 2022)."""

import math

import torch
from torch import Tensor, nn

from enact_common.models.criterion import FocalClassLoss, SetCriterion, build_weights
from enact_common.models.detector import detector_outputs, num_classes_of
from enact_common.models.normalization import PixelNormalization
from enact_common.models.postprocess import TopKPostProcess
from enact_common.models.scripting import Scriptable
from enact_common.nested_tensor import NestedTensor, as_nested_tensor

from .backbone import build_backbone
from .matcher import build_matcher
from .transformer import build_transformer

# Groups of the group norm after each map's projection; fewer if the channels are not divisible.
GROUPS = 32


class AnchorDETR(Scriptable):
    """Detects objects near anchor points, several at each point (one per pattern).

    Args:
        backbone: returns feature maps.
        transformer: maps feature maps of one size to logits and boxes.
        num_feature_levels: how many of the backbone's last maps to use. Three maps have the same size only with a
            dilated backbone, where just the first of them has a smaller stride (which its projection doubles).
        aux_loss: return the predictions of all decoder layers.
    """

    def __init__(self, backbone: nn.Module, transformer: nn.Module, num_feature_levels: int, aux_loss: bool):
        super().__init__()
        self.num_queries = transformer.num_queries
        self.transformer = transformer
        # A ResNet's channels double at each stage.
        channels = [backbone.num_channels >> level for level in reversed(range(num_feature_levels))]
        self.input_proj = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, transformer.d_model, kernel_size=3, stride=2, padding=1)
                if level < num_feature_levels - 2
                else nn.Conv2d(width, transformer.d_model, kernel_size=1),
                nn.GroupNorm(math.gcd(GROUPS, transformer.d_model), transformer.d_model),
            )
            for level, width in enumerate(channels)
        )
        for convolution, _ in self.input_proj:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        self.normalize = PixelNormalization()
        self.backbone = backbone
        self.aux_loss = aux_loss

    def forward(self, samples: NestedTensor | list[Tensor] | Tensor) -> dict:
        """Detect objects, with the arguments and results of `Detector.forward` and Q = patterns * points queries.

        Images are uint8, 0 to 255, or floating point and normalised.
        """
        images = self.normalize(as_nested_tensor(samples))
        features = list(self.backbone(images).values())[-len(self.input_proj) :]
        maps = [
            project(level.tensors).permute(0, 2, 3, 1)  # (batch, d, h, w) -> (batch, h, w, d)
            for project, level in zip(self.input_proj, features, strict=True)
        ]
        # Under autocast, the residual stream keeps the weights' precision.
        srcs = torch.stack(maps, dim=1).to(self.input_proj[0][0].weight.dtype)  # (batch, levels, h, w, d)
        logits, boxes = self.transformer(srcs, features[-1].mask)
        return detector_outputs(logits, boxes, self.aux_loss)


def build(args) -> tuple[AnchorDETR, SetCriterion, dict[str, nn.Module]]:
    """Return (model, criterion, postprocessors), built from the arguments."""
    num_classes = num_classes_of(args)
    transformer = build_transformer(args, num_classes)
    model = AnchorDETR(build_backbone(args), transformer, args.num_feature_levels, args.aux_loss)
    weights = build_weights(args, args.cls_loss_coef)
    if args.aux_loss:
        # The original also lists weights for an encoder's losses, which it never computes.
        weights |= {f"{name}_enc": weights[name] for name in ("loss_ce", "loss_bbox", "loss_giou")}
    class_loss = FocalClassLoss(args.focal_alpha)
    criterion = SetCriterion(num_classes, build_matcher(args), weights, class_loss, losses=("labels", "boxes"))
    return model, criterion, {"bbox": TopKPostProcess()}
