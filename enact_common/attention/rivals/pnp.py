"""Polling and pooling of keys and values.

In the spirit of Wang et al., "PnP-DETR: Towards Efficient Visual Analysis with Transformers", ICCV 2021
(arXiv:2109.07036, section 3.2): a poll sampler takes the tokens with the highest scores, and a pool sampler averages
the others into a few tokens with learned weights.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clustering import at_least_float32, weigh_channels
from .base import Reduced, RivalSelfAttention, take_tokens
from .topk import highest, straight_through

# The most pooled tokens, as in the paper; each has its own learned weights.
MOST_POOLED = 60

# At least three quarters of a small budget are polled.
POOLED_SHARE = 4


class PollPoolSelfAttention(RivalSelfAttention):
    """Most of the M keys and values are polled by score; the rest are averages of all tokens that were not polled.

    A quarter of M, rounded up, and at most 60, are pooled. An image of at most M tokens has all of them polled.

    Modifications:
        - only keys and values are sampled, so the layer keeps all queries and the model all tokens;
        - scores and pooling weights are linear in the key, and each layer has its own;
        - the scores learn by a straight-through bias on the logits, instead of by scaling the polled tokens.
    """

    title = "poll and pool"
    learns_scores = True

    def __init__(self, embed_dim: int, *args, **kwargs):
        super().__init__(embed_dim, *args, **kwargs)
        # Biases would change all logits alike, so they would get no gradient.
        self.W_score = nn.Linear(embed_dim, 1, bias=False)
        self.start_scores()
        self.W_pool = nn.Linear(embed_dim, MOST_POOLED, bias=False)

    def reduce(self, key: Tensor, value: Tensor, present: Tensor, map_size: tuple[int, int] | None) -> Reduced:
        """As in the base class."""
        most = self.budget(key.shape[1])
        counts = self.image_budgets(present).unsqueeze(1)  # (batch, 1)
        num_pooled = (-(-counts // POOLED_SHARE)).clamp(max=MOST_POOLED)
        num_pooled = num_pooled.masked_fill(present.sum(dim=1, keepdim=True) <= counts, 0)
        num_polled = counts - num_pooled

        index, score = highest(weigh_channels(key, self.W_score.weight[0]), present, most)
        slot = torch.arange(most, device=key.device)
        is_polled = slot < num_polled  # (batch, M)
        left = present.scatter(1, index, present.gather(1, index) & ~is_polled)  # (batch, N)
        weights = self.pooling_weights(key, left)
        # The pooled tokens follow the polled ones without a gap.
        source = slot.where(is_polled, (most + slot - num_polled).clamp(max=most + MOST_POOLED - 1))  # (batch, M)
        key, value = (
            take_tokens(torch.cat((take_tokens(tokens, index), pool(tokens, weights)), dim=1), source)
            for tokens in (key, value)
        )
        bias = straight_through(score) * is_polled
        return key, value, bias.masked_fill(slot >= counts, -torch.inf)

    def pooling_weights(self, key: Tensor, left: Tensor) -> Tensor:
        """Return each pooled token's weights (batch, N, MOST_POOLED): a softmax over the tokens that are left.

        Args:
            key: (batch, N, d).
            left: bool (batch, N). If no token is left, the weights are equal.
        """
        dtype = at_least_float32(key.dtype)
        logits = F.linear(key.to(dtype), self.W_pool.weight.to(dtype))
        # Not minus infinity: the softmax over no token would be NaN.
        return logits.masked_fill(~left.unsqueeze(-1), torch.finfo(dtype).min).softmax(dim=1)


def pool(tokens: Tensor, weights: Tensor) -> Tensor:
    """Return the averages (batch, S, d) of tokens (batch, N, d) with weights (batch, N, S), in the tokens' dtype."""
    return (weights.transpose(1, 2) @ tokens.to(weights.dtype)).to(tokens.dtype)
