"""Position encodings of feature maps (Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020) and
of points in the image (Meng et al., "Conditional DETR for Fast Training Convergence", ICCV 2021)."""

import math
from typing import Final

import torch
from torch import Tensor, nn

from enact_common.attention.clustering import at_least_float32
from enact_common.nested_tensor import NestedTensor


def sine_encoding(position: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Encode a position by sines (even channels) and cosines (odd ones) of falling frequency (Vaswani et al., 2017).

    Args:
        position: (...), radians at the highest frequency.
        channels: even.
        temperature: ratio of the longest to the shortest wavelength.

    Returns:
        (..., channels), in [-1, 1].
    """
    channel = torch.arange(channels, dtype=torch.float32, device=position.device)
    frequency = temperature ** (-2 * (channel // 2) / channels)
    angle = position.unsqueeze(-1) * frequency  # (..., channels)
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2)


def encode_points(points: Tensor, channels: int) -> Tensor:
    """Encode points (..., 2), (x, y) as fractions of the image's sides: (..., channels), y's encoding before x's.

    The result is float32 or wider.
    """
    points = points.to(at_least_float32(points.dtype))  # bf16 cannot tell neighbouring cells apart
    encoding = sine_encoding(points.flip(-1) * (2 * math.pi), channels // 2)  # (..., 2, channels / 2)
    return encoding.flatten(-2)


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of the cell's row and column (Vaswani et al., 2017, in two dimensions).

    Args:
        num_pos_feats: channels per axis.
        temperature: ratio of the longest to the shortest wavelength.
        normalize: scale positions so that the cells without padding span (0, scale].
        scale: radians; only used with normalize.
    """

    def __init__(
        self,
        num_pos_feats: int = 64,
        temperature: float = 10000.0,
        normalize: bool = False,
        scale: float = 2 * math.pi,
    ):
        super().__init__()
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.normalize = normalize
        self.scale = scale

    def forward(self, features: NestedTensor) -> Tensor:
        """Encode features (batch, channels, h, w) with a mask: float32 (batch, 2 num_pos_feats, h, w), in [-1, 1].

        The first half of the channels encodes the row, the second half the column. In each half, even channels are
        sines and odd ones cosines.
        """
        present = ~features.mask  # (batch, h, w)
        axes = []
        for axis in (1, 2):
            # Sum booleans: GPUs have no deterministic cumulative sum of floats.
            position = present.cumsum(axis).float()  # (batch, h, w)
            if self.normalize:
                last = position.narrow(axis, position.shape[axis] - 1, 1)
                position = position / (last + 1e-6) * self.scale
            axes.append(sine_encoding(position, self.num_pos_feats, self.temperature))
        return torch.cat(axes, dim=-1).permute(0, 3, 1, 2)  # (batch, 2 num_pos_feats, h, w)


class PositionEmbeddingLearned(nn.Module):
    """A learned vector of `num_pos_feats` channels for each row and column of the feature map."""

    # Rows and columns, as in the released weights.
    MAX_CELLS: Final = 50

    def __init__(self, num_pos_feats: int = 256):
        super().__init__()
        self.row_embed = nn.Embedding(self.MAX_CELLS, num_pos_feats)
        self.col_embed = nn.Embedding(self.MAX_CELLS, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, features: NestedTensor) -> Tensor:
        """Encode features (batch, channels, h, w): (batch, 2 num_pos_feats, h, w), columns first, then rows.

        Raises:
            ValueError: the map is larger than 50 x 50.
        """
        batch, _, h, w = features.tensors.shape
        if max(h, w) > self.MAX_CELLS:
            raise ValueError(
                f"learned position embeddings have {self.MAX_CELLS} rows and columns, the feature map is {h} x {w}: "
                "use --position_embedding sine, smaller images (--max_size), or no --dilation"
            )
        columns = self.col_embed.weight[:w].expand(h, w, -1)
        rows = self.row_embed.weight[:h].unsqueeze(1).expand(h, w, -1)
        embedding = torch.cat((columns, rows), dim=-1).permute(2, 0, 1)  # (2 num_pos_feats, h, w)
        return embedding.expand(batch, -1, -1, -1)


def build_position_encoding(args) -> nn.Module:
    """Build the position encoding from `--position_embedding` and `--hidden_dim`."""
    num_pos_feats = args.hidden_dim // 2
    if args.position_embedding == "learned":
        return PositionEmbeddingLearned(num_pos_feats)
    return PositionEmbeddingSine(num_pos_feats, normalize=True)
