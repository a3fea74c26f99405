"""A padded batch of images of different sizes, with its padding mask.

`torch.jit.script` compiles this code when a user's model contains it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


# TorchScript cannot read the methods that `dataclass` generates, so none are generated.
@dataclass(init=False, repr=False, eq=False)
class NestedTensor:
    """A padded batch of images.

    Attributes:
        tensors: (batch, channels, H, W), zero where padded.
        mask: bool (batch, H, W), True where padded.
    """

    tensors: Tensor
    mask: Tensor

    def __init__(self, tensors: Tensor, mask: Tensor):
        self.tensors = tensors
        self.mask = mask

    def to(self, device: torch.device, non_blocking: bool = False) -> "NestedTensor":
        """Return the batch on another device."""
        tensors = self.tensors.to(device, non_blocking=non_blocking)
        return NestedTensor(tensors, self.mask.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "NestedTensor":
        """Return the batch in page-locked memory; `DataLoader(pin_memory=True)` calls this."""
        return NestedTensor(self.tensors.pin_memory(), self.mask.pin_memory())

    def decompose(self) -> tuple[Tensor, Tensor]:
        """Return (tensors, mask)."""
        return self.tensors, self.mask


def nested_tensor_from_tensor_list(images: list[Tensor]) -> NestedTensor:
    """Pad images at the right and bottom to the largest height and the largest width of the batch.

    Args:
        images: each (channels, h, w), of the same dtype and channels; or a tensor (batch, channels, h, w).

    Returns:
        NestedTensor with tensors (batch, channels, H, W). A tensor as input is used without a copy.

    Raises:
        ValueError: there are no images, or an image is not (channels, h, w) with the first one's channels.
    """
    if len(images) == 0:
        raise ValueError("a batch needs at least one image")
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise ValueError(f"expected a tensor (batch, channels, height, width), got {list(images.shape)}")
        return NestedTensor(images, torch.zeros_like(images[:, 0], dtype=torch.bool))
    height, width = 0, 0
    for image in images:
        if image.ndim != 3 or image.shape[0] != images[0].shape[0]:
            shapes = [list(image.shape) for image in images]
            raise ValueError(f"expected images (channels, height, width) with equal channels, got {shapes}")
        height, width = max(height, image.shape[1]), max(width, image.shape[2])
    tensors = images[0].new_zeros([len(images), images[0].shape[0], height, width])
    mask = torch.ones([len(images), height, width], dtype=torch.bool, device=images[0].device)
    for i, image in enumerate(images):
        tensors[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = False
    return NestedTensor(tensors, mask)


def as_nested_tensor(samples: NestedTensor | list[Tensor] | Tensor) -> NestedTensor:
    """Return a NestedTensor unchanged; pad images, a list of (channels, h, w) or a tensor (batch, channels, H, W)."""
    return samples if isinstance(samples, NestedTensor) else nested_tensor_from_tensor_list(samples)
