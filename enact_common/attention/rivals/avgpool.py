"""Average pooling of keys and values over the cells of a grid.

The pooling of keys and values in Wang et al., "Pyramid Vision Transformer", ICCV 2021 (arXiv:2102.12122, section 3.3,
with a strided convolution) and PVTv2 (arXiv:2106.13797, section 3.2, with average pooling), as a layer of its own.
"""

import torch
from torch import Tensor

from .base import Reduced, RivalSelfAttention, average_by_index


class AveragePoolSelfAttention(RivalSelfAttention):
    """Keys and values are averages over the cells of a grid with at most M cells, as square as the map allows.

    Each image has a grid of its own over its unpadded part, so padding changes nothing.
    """

    title = "average pooling of the map"
    needs_map_size = True

    def reduce(self, key: Tensor, value: Tensor, present: Tensor, map_size: tuple[int, int] | None) -> Reduced:
        """As in the base class."""
        maps = present.unflatten(1, map_size)  # (batch, h, w)
        height = maps.any(dim=2).sum(dim=1)  # (batch,)
        width = maps.any(dim=1).sum(dim=1)
        rows, columns = grid_shape(height, width, self.image_budgets(present))
        y = torch.arange(map_size[0], device=key.device) * rows.unsqueeze(1) // height.unsqueeze(1)  # (batch, h)
        x = torch.arange(map_size[1], device=key.device) * columns.unsqueeze(1) // width.unsqueeze(1)  # (batch, w)
        cell = y.unsqueeze(2) * columns[:, None, None] + x.unsqueeze(1)  # (batch, h, w)
        cell = cell.flatten(1).where(present, 0)  # (batch, N)
        (key, value), sizes = average_by_index((key, value), cell, present, self.budget(key.shape[1]))
        return key, value, sizes.new_zeros(sizes.shape).masked_fill(sizes == 0, -torch.inf)


def grid_shape(height: Tensor, width: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns (batch,) of grids of at most `budget` cells for maps of height and width (batch,)."""
    rows = (budget * height / width).sqrt().round().long()
    rows = rows.clamp(min=1).minimum(budget).minimum(height)
    columns = (budget // rows).minimum(width)
    # A narrow map leaves columns out, which more rows can make up for.
    return (budget // columns).minimum(height).maximum(rows), columns
