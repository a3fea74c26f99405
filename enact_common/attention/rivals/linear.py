"""Linear attention.

Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", ICML 2020
(arXiv:2006.16236, section 3.2), not causal.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clustering import at_least_float32
from .base import RivalSelfAttention

# Keeps the division finite if all features have underflowed.
LEAST_TOTAL = 1e-12


class LinearSelfAttention(RivalSelfAttention):
    """A query weighs a key by `phi(q) phi(k)` with phi = elu + 1, so all queries share the sums over keys.

    It has no number of keys to choose, hence no `token_budget`, and no attention weights to drop, so `dropout` has no
    effect.
    """

    title = "linear attention, elu + 1"
    takes_budget = False
    exact_at_full_budget = False

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, present: Tensor, map_size: tuple[int, int] | None
    ) -> Tensor:
        """As in the base class."""
        projected = self.W_q(query), self.W_k(key), self.W_v(value)
        dtype = projected[2].dtype
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (self.split_heads(tensor.to(at_least_float32(dtype))) for tensor in projected)
            q = F.elu(q) + 1
            k = (F.elu(k) + 1) * present[:, None, :, None]  # (batch, heads, N, head_dim)
            total = q @ k.sum(dim=2).unsqueeze(-1)  # (batch, heads, L, 1)
            attended = q @ (k.transpose(-1, -2) @ v) / total.clamp(min=LEAST_TOTAL)
        return attended.transpose(1, 2).flatten(2).to(dtype)  # (batch, heads, L, head_dim) -> (batch, L, d)
