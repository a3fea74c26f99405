"""Prototypes of queries that are found by hashing.

Zheng et al., "End-to-End Object Detection with Adaptive Clustering Transformer", BMVC 2021 (arXiv:2011.09315,
section 3), as a layer: locality-sensitive hashing groups the queries, and only prototypes attend to the keys.
"""

import torch
from torch import Tensor

from .base import RivalSelfAttention, average_by_index, features_of, take_tokens

# The most hash bits: 65,536 prototypes.
MOST_BITS = 16


class AdaptiveClusteringSelfAttention(RivalSelfAttention):
    """At most M prototypes of the queries attend to all N keys; every query gets its prototype's result.

    A query's hash is the side of each of floor(log2 M) fixed random hyperplanes through the mean query. Queries with
    the same hash share a prototype, their average. How many hashes occur depends on the image.

    The budget is of prototypes, so it counts queries instead of keys. A budget of N is not exact, since queries with
    the same hash still share a prototype. If there are as many queries as keys, padded queries make no prototypes.

    Modifications:
        - signs of projections instead of quantised ones, so that the number of hashes has a limit;
        - one clustering for all heads, and no distillation.
    """

    title = "prototypes of queries by hashing"
    exact_at_full_budget = False

    def __init__(self, embed_dim: int, *args, **kwargs):
        super().__init__(embed_dim, *args, **kwargs)
        generator = torch.Generator().manual_seed(0)
        planes = torch.randn(embed_dim, MOST_BITS, generator=generator, device="cpu")
        # A constant: it moves with the module but stays out of checkpoints.
        self.register_buffer("planes", planes, persistent=False)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, present: Tensor, map_size: tuple[int, int] | None
    ) -> Tensor:
        """As in the base class."""
        counted = present if query.shape[1] == key.shape[1] else present.new_ones(query.shape[:2])
        with torch.autocast(query.device.type, enabled=False):
            hashes = self.hashes(query, counted)
            (prototypes,), _ = average_by_index((query,), hashes, counted, self.budget(query.shape[1]))
        bias = torch.zeros_like(present, dtype=torch.float32).masked_fill(~present, -torch.inf)
        attended = self.softmax_attention(self.W_q(prototypes), self.W_k(key), self.W_v(value), bias)  # (batch, M, d)
        return take_tokens(attended, hashes)

    def hashes(self, query: Tensor, counted: Tensor) -> Tensor:
        """Return each query's prototype: int64 (batch, L), below the largest power of two within the image's budget.

        Args:
            query: (batch, L, d).
            counted: bool (batch, L), False where padded.
        """
        powers = 2 ** torch.arange(MOST_BITS, device=query.device)
        # All used bits set gives 2 powers - 1, which must be below the budget.
        used = 2 * powers <= self.image_budgets(counted).unsqueeze(-1)  # (batch, bits)
        # After these lines: exported programs cannot be loaded if autocast is switched off just before gradients are.
        features = features_of(self.W_q, query)
        mean = (features * counted.unsqueeze(-1)).sum(dim=1) / counted.sum(dim=1, keepdim=True)  # (batch, d)
        bits = ((features - mean.unsqueeze(1)) @ self.planes.float() > 0) & used.unsqueeze(1)  # (batch, L, bits)
        return (bits * powers).sum(dim=-1)
