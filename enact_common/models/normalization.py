"""Normalisation of uint8 pixels to the backbones' input, on the model's device."""

import torch
from torch import nn

from enact_common.nested_tensor import NestedTensor

# RGB statistics of ImageNet, as fractions of full brightness.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PixelNormalization(nn.Module):
    """Normalises uint8 pixels by ImageNet's mean and standard deviation.

    Models do this themselves: uint8 is a quarter of the bytes to transfer, and saves work on the CPU.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self):
        super().__init__()
        # Not persistent: the published checkpoints have no such tensors.
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: NestedTensor) -> NestedTensor:
        """Normalise uint8 images (batch, 3, H, W), RGB, 0 to 255; floating-point images only change dtype.

        Returns the batch in the model's dtype (float32, unless the model was cast). Padding of uint8 images is exactly
        0.

        Raises:
            TypeError: the images have another integer dtype.
        """
        pixels, mask = images.decompose()
        dtype = self.mean.dtype
        if pixels.is_floating_point():
            return NestedTensor(pixels.to(dtype), mask)
        if pixels.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, 0 to 255, or floating point and normalised, got {pixels.dtype}")
        # Multiply by 1 / 255 instead of dividing by 255, to round as torchvision does.
        wide_dtype = torch.promote_types(dtype, torch.float32)
        normalized = pixels.to(wide_dtype, memory_format=torch.channels_last)
        normalized = normalized.mul_(1 / 255).sub_(self.mean).div_(self.std)
        return NestedTensor(normalized.masked_fill_(mask.unsqueeze(1), 0).to(dtype), mask)
