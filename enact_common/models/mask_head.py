"""DETR's mask head (Carion et al., "End-to-End Object Detection with Transformers", section 4.4): a mask per query."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enact_common.attention.tracing import is_tracing
from enact_common.models.detector import Detector
from enact_common.models.scripting import Scriptable
from enact_common.nested_tensor import NestedTensor
from enact_common.utils.acceleration import Recomputed, recompute_in_backward

# Queries whose masks are computed at a time. This bounds the memory: about 40 MB per query at 800 x 1333 pixels.
HEAD_CHUNK = 16

# Groups of a group norm; fewer if the channels are not divisible by it.
GROUPS = 8


class AttentionMaps(nn.Module):
    """Multi-head attention without values: how much each query attends to each cell.

    One softmax spans all heads and cells of a query, so the map of a single head can be near zero everywhere.

    Args:
        d_model: channels d of queries and memory.
        nhead: heads.
    """

    def __init__(self, d_model: int, nhead: int):
        super().__init__()
        self.nhead = nhead
        self.q_linear = nn.Linear(d_model, d_model)
        self.k_linear = nn.Linear(d_model, d_model)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Return the attention weights float32 (batch, Q, heads, h, w), in [0, 1]; those of a query add up to 1.

        Args:
            queries: (batch, Q, d).
            memory: (batch, d, h, w).
            mask: bool (batch, h, w), True where padded; padded cells get weight 0.
        """
        # (batch, Q, heads, head_dim) and (batch, h w, heads, head_dim)
        q = self.q_linear(queries).unflatten(-1, (self.nhead, -1))
        k = self.k_linear(memory.flatten(2).transpose(1, 2)).unflatten(-1, (self.nhead, -1))
        logits = torch.einsum("bqne,btne->bqnt", q * q.shape[-1] ** -0.5, k).float()
        logits = logits.masked_fill(mask.flatten(1)[:, None, None], -torch.inf)
        return logits.flatten(2).softmax(dim=-1).view(*logits.shape[:3], *mask.shape[1:])


class MaskHead(Recomputed):
    """Convolutions from a query's attention maps to its mask, upsampled step by step with the backbone's maps.

    Modifications:
        - convolution is linear, so the first one is computed once per image, not per query, for the channels that come
          from the image: 256 of 264;
        - group norms have fewer than eight groups if the channels are not divisible by eight, as in small models.

    Args:
        d_model: channels d of the map that went into the transformer.
        nhead: attention maps per query.
        fpn_channels: channels of the backbone's maps that are added, from coarse to fine.
    """

    def __init__(self, d_model: int, nhead: int, fpn_channels: Sequence[int]):
        super().__init__()
        widths = [d_model + nhead, *(max(d_model // part, 1) for part in (2, 4, 8, 16))]
        inputs = [widths[0], *widths[:-1]]
        for number, (n, m) in enumerate(zip(inputs, widths, strict=True), start=1):
            setattr(self, f"lay{number}", nn.Conv2d(n, m, 3, padding=1))
            setattr(self, f"gn{number}", nn.GroupNorm(math.gcd(GROUPS, m), m))
        self.out_lay = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for number, (channels, m) in enumerate(zip(fpn_channels, widths[1:], strict=False), start=1):
            setattr(self, f"adapter{number}", nn.Conv2d(channels, m, 1))
        self.d_model = d_model
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def share(self, src: Tensor, fpns: Sequence[Tensor]) -> list[Tensor]:
        """Compute what all queries of an image share: the first layer's part for src (batch, d, h, w), and the
        adapted maps, from coarse to fine."""
        first = F.conv2d(src, self.lay1.weight[:, : self.d_model], self.lay1.bias, padding=1)
        adapters = (self.adapter1, self.adapter2, self.adapter3)
        return [first, *(adapter(map_) for adapter, map_ in zip(adapters, fpns, strict=True))]

    def forward(self, maps: Tensor, image: Tensor, first: Tensor, *adapted: Tensor) -> Tensor:
        """Return the masks of n queries: logits (n, h', w'), at the finest map's size.

        Args:
            maps: (n, heads, h, w), the queries' attention maps.
            image: int64 (n,), each query's index into the batch.
            first, adapted: the result of `share`.
        """
        # Attention maps are float32 even if the model was cast to another dtype.
        x = first[image] + F.conv2d(maps.to(first.dtype), self.lay1.weight[:, self.d_model :], padding=1)
        x = F.relu_(self.gn1(x))
        x = F.relu_(self.gn2(self.lay2(x)))
        stages = ((self.lay3, self.gn3), (self.lay4, self.gn4), (self.lay5, self.gn5))
        for (conv, norm), map_ in zip(stages, adapted, strict=True):
            x = F.interpolate(x, size=map_.shape[-2:]) + map_[image]
            x = F.relu_(norm(conv(x)))
        return self.out_lay(x).squeeze(1)


@dataclass
class QueryMasks:
    """The masks of a batch's queries, computed on demand: training needs only those of matched queries.

    Attributes:
        maps: (batch, Q, heads, h, w), attention maps.
        shared: the result of `MaskHead.share`.
        autocast: the model's autocast dtype; None without autocast.
    """

    head: MaskHead
    maps: Tensor
    shared: list[Tensor]
    autocast: torch.dtype | None

    def select(self, image: Tensor, query: Tensor) -> Tensor:
        """Return logits of the masks at image, query (both int64 (n,)): float32 (n, h', w').

        For more than `HEAD_CHUNK` queries, the head is recomputed chunk by chunk in the backward pass.
        """
        chunks = list(zip(image.split(HEAD_CHUNK), query.split(HEAD_CHUNK), strict=True))
        run: Callable = self.head
        if len(chunks) > 1 and torch.is_grad_enabled() and not self.head.recompute:
            run = recompute_in_backward(self.head)
        with torch.autocast(self.maps.device.type, self.autocast, enabled=self.autocast is not None):
            masks = [run(self.maps[i, q], i, *self.shared) for i, q in chunks]
        return torch.cat(masks).float()

    def all(self) -> Tensor:
        """Return the logits of all queries' masks: float32 (batch, Q, h', w')."""
        batch, queries = self.maps.shape[:2]
        if is_tracing():
            # Split by queries, so that the number of steps does not depend on the batch.
            parts = [self.of_batch(maps) for maps in self.maps.split(HEAD_CHUNK, dim=1)]
            return torch.cat(parts, dim=1)
        ranges = (torch.arange(n, device=self.maps.device) for n in (batch, queries))
        image, query = torch.cartesian_prod(*ranges).unbind(dim=1)
        return self.select(image, query).unflatten(0, (batch, queries))

    def of_batch(self, maps: Tensor) -> Tensor:
        """Return logits float32 (batch, n, h', w') for maps (batch, n, heads, h, w) of n queries of each image."""
        batch, count = maps.shape[:2]
        image = torch.arange(batch, device=maps.device).unsqueeze(1).expand(batch, count).flatten()
        return self.head(maps.flatten(0, 1), image, *self.shared).unflatten(0, (batch, count)).float()


class DETRsegm(Scriptable):
    """A DETR with a mask head.

    Modifications:
        - in training, only the masks of matched queries are computed, when the criterion asks for them;
        - a frozen detector stays in evaluation mode, so that the head trains on the same inputs as at inference.

    Args:
        detr: the detector; its backbone returns the maps of all four stages.
        nhead: heads of the attention that the masks are made from.
    """

    def __init__(self, detr: Detector, nhead: int, frozen: bool = False):
        super().__init__()
        self.detr = detr
        self.frozen = frozen
        if frozen:
            self.detr.requires_grad_(False)
        d_model, channels = detr.transformer.d_model, detr.backbone.num_channels
        self.bbox_attention = AttentionMaps(d_model, nhead)
        self.mask_head = MaskHead(d_model, nhead, [channels // 2, channels // 4, channels // 8])

    @property
    def num_queries(self) -> int:
        """Objects that can be detected in one image."""
        return self.detr.num_queries

    @property
    def transformer(self) -> nn.Module:
        """The detector's transformer."""
        return self.detr.transformer

    def train(self, mode: bool = True) -> "DETRsegm":
        super().train(mode)
        if self.frozen:
            self.detr.eval()
        return self

    def forward(self, samples: NestedTensor | list[Tensor] | Tensor) -> dict:
        """Detect objects and their masks.

        Args:
            samples: as in `Detector`.

        Returns:
            the detector's outputs and a mask per query, which covers the padded batch at about a quarter of its height
            and width (h', w'). In evaluation mode `pred_masks`, float32 (batch, Q, h', w'), before the sigmoid. In
            training `query_masks`, a `QueryMasks`, which computes masks on demand.
        """
        outputs, intermediates = self.detr.detect(samples)
        *finer, last = intermediates.features
        maps = self.bbox_attention(intermediates.decoded[-1], intermediates.memory, last.mask)
        shared = self.mask_head.share(intermediates.src, [map_.tensors for map_ in reversed(finer)])
        device = maps.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        masks = QueryMasks(self.mask_head, maps, shared, autocast)
        return outputs | ({"query_masks": masks} if self.training else {"pred_masks": masks.all()})
