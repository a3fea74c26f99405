"""DETR (Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020)."""

from torch import Tensor, nn

from enact_common.criterion import SetCriterion
from enact_common.layers import MLP
from enact_common.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from enact_common.postprocess import PostProcess

from .backbone import build_backbone
from .matcher import build_matcher
from .transformer import build_transformer


class DETR(nn.Module):
    """Detects a fixed number of objects in parallel.

    Args:
        backbone: gives feature maps and their position encodings.
        transformer: encodes the last map and decodes the queries.
        num_classes: labels; one more logit stands for no object.
        num_queries: objects that can be found in one image.
        aux_loss: return the predictions of all decoder layers.
    """

    def __init__(
        self, backbone: nn.Module, transformer: nn.Module, num_classes: int, num_queries: int, aux_loss: bool = False
    ):
        super().__init__()
        hidden_dim = transformer.d_model
        self.num_queries = num_queries
        self.transformer = transformer
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.bbox_embed = MLP(hidden_dim, hidden_dim, 4, 3)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.input_proj = nn.Conv2d(backbone.num_channels, hidden_dim, kernel_size=1)
        self.backbone = backbone
        self.aux_loss = aux_loss

    def forward(self, samples: NestedTensor | list[Tensor] | Tensor) -> dict:
        """Detect.

        Args:
            samples: a padded batch; or images, each (3, h, w), or a tensor (batch, 3, H, W), normalised by
                ImageNet's mean and standard deviation.

        Returns:
            `pred_logits` (batch, Q, num_classes + 1), before the softmax; `pred_boxes` (batch, Q, 4): centre x,
            centre y, width, height as fractions of the image's width and height, in [0, 1] (padding counts as
            outside); with aux_loss `aux_outputs`, a list of the same for each earlier decoder layer.
        """
        if not isinstance(samples, NestedTensor):
            samples = nested_tensor_from_tensor_list(samples)
        features, pos = self.backbone(samples)
        src, mask = features[-1].decompose()
        hs, _ = self.transformer(self.input_proj(src), mask, self.query_embed.weight, pos[-1])

        logits = self.class_embed(hs)  # (layers, batch, Q, num_classes + 1)
        boxes = self.bbox_embed(hs).sigmoid()  # (layers, batch, Q, 4)
        layers = [{"pred_logits": c, "pred_boxes": b} for c, b in zip(logits, boxes, strict=True)]
        outputs = layers.pop()
        if self.aux_loss:
            outputs["aux_outputs"] = layers
        return outputs


def build(args) -> tuple[DETR, SetCriterion, dict[str, nn.Module]]:
    """(model, criterion, postprocessors) that the arguments ask for; `args.num_classes` of None means COCO's 91."""
    num_classes = 91 if args.num_classes is None else args.num_classes
    model = DETR(
        build_backbone(args),
        build_transformer(args),
        num_classes=num_classes,
        num_queries=args.num_queries,
        aux_loss=args.aux_loss,
    )
    weights = {"loss_ce": 1, "loss_bbox": args.bbox_loss_coef, "loss_giou": args.giou_loss_coef}
    if args.aux_loss:
        layers = range(args.dec_layers - 1)
        weights |= {f"{name}_{i}": weight for i in layers for name, weight in weights.items()}
    criterion = SetCriterion(num_classes, build_matcher(args), weights, eos_coef=args.eos_coef)
    return model, criterion, {"bbox": PostProcess()}
