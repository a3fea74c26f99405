"""What the detectors have in common around their transformers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enact_common.models.layers import MLP
from enact_common.models.normalization import PixelNormalization
from enact_common.models.scripting import Scriptable
from enact_common.nested_tensor import NestedTensor, as_nested_tensor

# Labels of the published models: COCO's category ids, 1 to 90, and the unused 0.
COCO_CLASSES = 91


def num_classes_of(args) -> int:
    """The number of labels that `--num_classes` asks for; without it, the published models' `COCO_CLASSES`."""
    return COCO_CLASSES if args.num_classes is None else args.num_classes


def detector_outputs(logits: Tensor, boxes: Tensor, aux_loss: bool) -> dict:
    """The predictions of all decoder layers in the form that criteria and post-processing take.

    Args:
        logits: (layers, batch, Q, classes).
        boxes: (layers, batch, Q, 4).
        aux_loss: keep the earlier layers.
    """
    layers = [{"pred_logits": c, "pred_boxes": b} for c, b in zip(logits, boxes, strict=True)]
    outputs = layers.pop()
    if aux_loss:
        outputs["aux_outputs"] = layers
    return outputs


@dataclass
class Intermediates:
    """What a detector made of a batch on the way to its predictions, for heads that look at it.

    Attributes:
        features: the backbone's maps, from fine to coarse.
        src: (batch, d, h, w), the last of them as it went into the transformer.
        memory: (batch, d, h, w), what the encoder made of it.
        decoded: what the decoder returned.
    """

    features: list[NestedTensor]
    src: Tensor
    memory: Tensor
    decoded: Tensor


class Detector(Scriptable):
    """Finds a fixed number of objects in parallel: a base class, to which a model adds how its heads predict.

    Args:
        backbone: gives feature maps and their position encodings.
        transformer: encodes the last map and decodes the queries.
        num_logits: of each query.
        num_queries: objects that can be found in one image.
        aux_loss: return the predictions of all decoder layers.
    """

    def __init__(
        self, backbone: nn.Module, transformer: nn.Module, num_logits: int, num_queries: int, aux_loss: bool = False
    ):
        super().__init__()
        hidden_dim = transformer.d_model
        self.num_queries = num_queries
        self.transformer = transformer
        self.class_embed = nn.Linear(hidden_dim, num_logits)
        self.bbox_embed = MLP(hidden_dim, hidden_dim, 4, 3)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.input_proj = nn.Conv2d(backbone.num_channels, hidden_dim, kernel_size=1)
        self.normalize = PixelNormalization()
        self.backbone = backbone
        self.aux_loss = aux_loss

    def forward(self, samples: NestedTensor | list[Tensor] | Tensor) -> dict:
        """Detect.

        Args:
            samples: a padded batch; or images, each (3, h, w), or a tensor (batch, 3, H, W). Red, green, blue: uint8,
                0 to 255; or floating point, normalised by ImageNet's mean and standard deviation.

        Returns:
            `pred_logits` (batch, Q, num_logits), before softmax or sigmoid; `pred_boxes` (batch, Q, 4): centre x,
            centre y, width, height as fractions of the image's width and height, in [0, 1] (padding counts as
            outside); with aux_loss `aux_outputs`, a list of the same for each earlier decoder layer.
        """
        return self.detect(samples)[0]

    def detect(self, samples: NestedTensor | list[Tensor] | Tensor) -> tuple[dict, Intermediates]:
        """Detect, and show what was seen: the outputs of `forward`, and what they come from."""
        features, pos = self.backbone(self.normalize(as_nested_tensor(samples)))
        src, mask = features[-1].decompose()
        # Under autocast, the stream that layers add to stays in the weights' precision, and so do positions: rounded to
        # bf16, neighbouring cells' could not be told apart.
        src = self.input_proj(src).to(self.input_proj.weight.dtype)
        decoded, memory = self.transformer(src, mask, self.query_embed.weight, pos[-1].to(src.dtype))
        # bf16 would round boxes by pixels.
        with torch.autocast(src.device.type, enabled=False):
            outputs = detector_outputs(*self.predict(decoded), self.aux_loss)
        return outputs, Intermediates(features, src, memory, decoded)

    def predict(self, decoded) -> tuple[Tensor, Tensor]:
        """From what the decoder returned to logits (layers, batch, Q, num_logits) and boxes (layers, batch, Q, 4)."""
        raise NotImplementedError
