"""The base class of the detectors: everything around their transformers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enact_common.models.layers import MLP
from enact_common.models.normalization import PixelNormalization
from enact_common.models.scripting import Scriptable
from enact_common.nested_tensor import NestedTensor, as_nested_tensor

# Labels of the published models: COCO's category ids 1 to 90, and the unused 0.
COCO_CLASSES = 91


def num_classes_of(args) -> int:
    """Return the value of `--num_classes`; by default the published models' `COCO_CLASSES`."""
    return COCO_CLASSES if args.num_classes is None else args.num_classes


def detector_outputs(logits: Tensor, boxes: Tensor, aux_loss: bool) -> dict:
    """Put logits (layers, batch, Q, classes) and boxes (layers, batch, Q, 4) into the form that criteria take.

    `aux_loss` keeps the predictions of earlier layers.
    """
    layers = [{"pred_logits": c, "pred_boxes": b} for c, b in zip(logits, boxes, strict=True)]
    outputs = layers.pop()
    if aux_loss:
        outputs["aux_outputs"] = layers
    return outputs


@dataclass
class Intermediates:
    """A detector's intermediate tensors of a batch, for heads that use them.

    Attributes:
        features: the backbone's feature maps, from fine to coarse.
        src, memory: (batch, d, h, w), the transformer's input, projected from the coarsest map, and the encoder's
            output.
        decoded: the decoder's output.
    """

    features: list[NestedTensor]
    src: Tensor
    memory: Tensor
    decoded: Tensor


class Detector(Scriptable):
    """Base class of detectors that predict a fixed number of objects in parallel; subclasses define `predict`.

    Args:
        backbone: returns feature maps and their position encodings.
        num_logits: class logits per query.
        num_queries: objects that can be detected in one image.
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
        """Detect objects.

        Args:
            samples: a padded batch; or a list of images (3, h, w); or a tensor (batch, 3, H, W). RGB: uint8, 0 to 255;
                or floating point, normalised by ImageNet's mean and standard deviation.

        Returns:
            `pred_logits` (batch, Q, num_logits), before softmax or sigmoid; `pred_boxes` (batch, Q, 4): centre x,
            centre y, width, height as fractions of the image's width and height without padding, in [0, 1]; with
            aux_loss also `aux_outputs`, a list with the same keys for each earlier decoder layer.
        """
        return self.detect(samples)[0]

    def detect(self, samples: NestedTensor | list[Tensor] | Tensor) -> tuple[dict, Intermediates]:
        """Return the outputs of `forward`, and the tensors that they were computed from."""
        features, pos = self.backbone(self.normalize(as_nested_tensor(samples)))
        src, mask = features[-1].decompose()
        # Under autocast, the residual stream and the positions keep the weights' precision: bf16 would round
        # neighbouring positions to the same value.
        src = self.input_proj(src).to(self.input_proj.weight.dtype)
        decoded, memory = self.transformer(src, mask, self.query_embed.weight, pos[-1].to(src.dtype))
        # bf16 would shift boxes by pixels.
        with torch.autocast(src.device.type, enabled=False):
            outputs = detector_outputs(*self.predict(decoded), self.aux_loss)
        return outputs, Intermediates(features, src, memory, decoded)

    def predict(self, decoded) -> tuple[Tensor, Tensor]:
        """Map the decoder's output to logits (layers, batch, Q, num_logits) and boxes (layers, batch, Q, 4)."""
        raise NotImplementedError
