"""Positions of cells and queries, and their encodings (Wang et al., "Anchor DETR", AAAI 2022, section 3.2)."""

import math

import torch
from torch import Tensor

from enact_common.attention.clustering import at_least_float32
from enact_common.models.position_encoding import encode_points, sine_encoding

__all__ = ["cell_centres", "encode_coordinates", "encode_points", "grid_cells"]


def encode_coordinates(coordinates: Tensor, channels: int) -> Tensor:
    """Encode coordinates (...) in [0, 1] along one side of the image: (..., channels), in [-1, 1], at least float32."""
    return sine_encoding(coordinates.to(at_least_float32(coordinates.dtype)) * (2 * math.pi), channels)


def cell_centres(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The centres of a map's columns and rows, as fractions of the image at the map's top left.

    Args:
        mask: bool (batch, H, W), True where padded. The unpadded part is a rectangle.

    Returns:
        x (batch, W) and y (batch, H), float32: in (0, 1) inside the image, near 1 in its padding.
    """
    centres = []
    for line in (~mask[:, 0, :], ~mask[:, :, 0]):
        count = line.cumsum(1).float()
        centres.append((count - 0.5) / count[:, -1:])
    x, y = centres
    return x, y


def grid_cells(count: int) -> Tensor:
    """The cells of a square grid of about count cells: int64 (n * n, 2), (x, y) in 0..n - 1, n = round(sqrt(count))."""
    cells = torch.arange(round(math.sqrt(count)))
    return torch.cartesian_prod(cells, cells)  # (n n, 2)
