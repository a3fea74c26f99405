"""Images of different sizes in one padded batch, with a mask of what is padding.

`torch.jit.script` compiles what is here when it finds it in a user's model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


# TorchScript cannot read the methods that `dataclass` writes: none are asked for.
@dataclass(init=False, repr=False, eq=False)
class NestedTensor:
    """A padded batch.

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
        """The same batch on another device."""
        tensors = self.tensors.to(device, non_blocking=non_blocking)
        return NestedTensor(tensors, self.mask.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "NestedTensor":
        """The same batch in page-locked memory; `DataLoader(pin_memory=True)` calls this."""
        return NestedTensor(self.tensors.pin_memory(), self.mask.pin_memory())

    def decompose(self) -> tuple[Tensor, Tensor]:
        """(tensors, mask)."""
        return self.tensors, self.mask


def nested_tensor_from_tensor_list(images: list[Tensor]) -> NestedTensor:
    """Pad images at the right and bottom to the largest height and the largest width among them.

    Args:
        images: each (channels, h, w), one dtype and one number of channels; or one tensor (batch, channels, h, w).

    Returns:
        NestedTensor of (batch, channels, H, W). That of one tensor is the tensor itself, not a copy.

    Raises:
        ValueError: there is no image, or one is not (channels, h, w) like the first.
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
            raise ValueError(f"expected images (channels, height, width) of one number of channels, got {shapes}")
        height, width = max(height, image.shape[1]), max(width, image.shape[2])
    tensors = images[0].new_zeros([len(images), images[0].shape[0], height, width])
    mask = torch.ones([len(images), height, width], dtype=torch.bool, device=images[0].device)
    for i, image in enumerate(images):
        tensors[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = False
    return NestedTensor(tensors, mask)


def as_nested_tensor(samples: NestedTensor | list[Tensor] | Tensor) -> NestedTensor:
    """A padded batch as it is; images as a list of (channels, h, w) or a tensor (batch, channels, H, W) padded."""
    return samples if isinstance(samples, NestedTensor) else nested_tensor_from_tensor_list(samples)
