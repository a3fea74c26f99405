"""From pixels as they are stored, uint8, to what the backbones were trained on: normalised on the model's device."""

import torch
from torch import nn

from enact_common.nested_tensor import NestedTensor

# Of the images that torchvision's backbones were trained on, red, green and blue, in parts of full brightness.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PixelNormalization(nn.Module):
    """Normalise stored pixels by ImageNet's mean and standard deviation.

    Models do this themselves, so that loaders hand over a quarter of the bytes, and no CPU works on floats.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self):
        super().__init__()
        # Not persistent: the published checkpoints have no such tensors.
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: NestedTensor) -> NestedTensor:
        """Normalise what is not normalised yet.

        Args:
            images: (batch, 3, H, W), red, green, blue: uint8, 0 to 255; or floating point, which is taken as
                normalised.

        Returns:
            the batch in the model's dtype (float32, unless the model was cast); uint8 images become exactly 0 where
            padded.

        Raises:
            TypeError: the images are of another integer type.
        """
        pixels, mask = images.decompose()
        dtype = self.mean.dtype
        if pixels.is_floating_point():
            return NestedTensor(pixels.to(dtype), mask)
        if pixels.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, 0 to 255, or floating point and normalised, got {pixels.dtype}")
        # Multiplied by 1 / 255, not divided by 255: the order and rounding of torchvision's own steps.
        precise = torch.promote_types(dtype, torch.float32)
        normalized = pixels.to(precise, memory_format=torch.channels_last)
        normalized = normalized.mul_(1 / 255).sub_(self.mean).div_(self.std)
        return NestedTensor(normalized.masked_fill_(mask.unsqueeze(1), 0).to(dtype), mask)
